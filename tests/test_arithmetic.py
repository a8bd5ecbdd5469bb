"""Masks, losses, schedules and metrics: values by hand, and library oracles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from mcic.losses import classification_loss, entropy_loss, labelled_pixels, resize_mask, segmentation_loss
from mcic.metrics import ConfusionMatrix
from mcic.pseudo import IGNORE, cam_mask, cam_scores, context_mask, merge_masks, normalized_heatmap
from mcic.schedule import poly, ramp_up, warm_up

X = IGNORE


def row(*values):
    """[1, 1, len(values)], one image of one row."""
    return torch.tensor(values, dtype=torch.float64)[None, None]


def heatmap(*classes):
    """[1, L, 1, N]."""
    return torch.tensor(classes, dtype=torch.float64)[None, :, None]


def tags(*flags):
    return torch.tensor([flags], dtype=torch.bool)


def test_heatmap_is_relu_over_its_peak_and_absent_classes_are_zero():
    scores = normalized_heatmap(heatmap([-1, 2, 4], [5, 5, 5]), tags(1, 0))
    torch.testing.assert_close(scores[0, :, 0], torch.tensor([[0, 2, 4], [0, 0, 0]], dtype=torch.float64) / (4 + 1e-5))


def test_heatmap_peak_is_of_valid_pixels():
    valid = torch.tensor([[[True, True, False]]])
    scores = normalized_heatmap(heatmap([1, 2, 100]), tags(1), valid=valid, rules="authors")
    assert scores[0, 0, 0, :2].tolist() == [0.5, 1.0]


def test_cam_mask_with_saliency():
    heat = heatmap([0.0, 1.0, 4.0, 0.0])
    mask = cam_mask(heat, tags(1), row(0.0, 0.7, 0.9, 0.95), threshold=0.1)
    # background rows 1, .3, .1, .05; heat 0, .25, 1, 0: the last pixel's best is below the threshold
    assert mask[0, 0].tolist() == [0, 0, 1, X]


def test_cam_background_rows():
    heat = heatmap([0.0, 1.0, 4.0])
    saliency = row(0.05, 0.5, 0.9)

    def background(*args, **more):
        return cam_scores(heat, tags(1), *args, threshold=0.1, **more)[0, 0, 0]

    torch.testing.assert_close(background(saliency), torch.tensor([0.95, 0.5, 0.1], dtype=torch.float64))
    assert background(saliency, rules="authors").tolist() == [1, 0, 0]
    normalised = heat[0, 0, 0] / (4 + 1e-5)
    torch.testing.assert_close(background(None), 1 - normalised)
    torch.testing.assert_close(background(None, background_power=2.0), (1 - normalised) ** 2)


def test_ties_go_to_the_lowest_class():
    heat = heatmap([1.0, 0.0], [1.0, 0.0])
    mask = cam_mask(heat, tags(1, 1), row(1.0, 1.0), threshold=0.1, rules="authors")
    assert mask[0, 0].tolist() == [1, X]


def test_context_mask_restricts_to_the_tags_without_renormalising():
    logits = torch.log(torch.tensor([[0.3, 0.3, 0.4], [0.04, 0.06, 0.9]], dtype=torch.float64))  # [N, K]
    logits = logits.T[None, :, None]
    mask = context_mask(logits, tags(1, 0), None, threshold=0.1)
    assert mask[0, 0].tolist() == [0, X]
    assert context_mask(logits, tags(1, 1), None, threshold=0.1)[0, 0].tolist() == [2, 2]


def test_context_background_of_the_authors():
    logits = torch.log(torch.tensor([0.5, 0.5], dtype=torch.float64))[None, :, None, None].expand(1, 2, 1, 2)
    mask = context_mask(logits, tags(1), row(0.0, 1.0), threshold=0.1, rules="authors")
    assert mask[0, 0].tolist() == [0, 1]  # .5·1 + .5·.5 = .75 > .5, and .5·0 + .25 < .5


@pytest.mark.parametrize(
    ("first", "second", "paper", "authors"),
    [(0, 0, 0, 0), (0, X, X, X), (X, X, X, X), (1, X, 1, 1), (1, 1, 1, 1), (1, 2, X, X), (1, 0, X, 1)],
)
def test_merge_table(first, second, paper, authors):
    one, two = torch.tensor([[[first]]], dtype=torch.uint8), torch.tensor([[[second]]], dtype=torch.uint8)
    for rules, expected in (("paper", paper), ("authors", authors)):
        assert merge_masks(one, two, rules=rules).item() == expected
        assert merge_masks(two, one, rules=rules).item() == expected


def test_classification_loss_is_the_mean_binary_cross_entropy():
    scores = torch.randn(4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(4, 3) > 0.5
    labels[0] = False
    expected = F.binary_cross_entropy_with_logits(scores.mean((2, 3)), labels.double(), reduction="none")
    torch.testing.assert_close(classification_loss(scores, labels), expected.mean())
    shared = (expected.mean(1) / labels.sum(1).clamp(min=1)).mean()
    torch.testing.assert_close(classification_loss(scores, labels, rules="authors"), shared)
    assert torch.autograd.gradcheck(lambda s: classification_loss(s, labels), scores)


def test_means_leave_padding_out():
    scores = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[:, :2] = True
    torch.testing.assert_close(
        classification_loss(scores, labels, valid=valid), classification_loss(scores[:, :, :2], labels)
    )
    entropy = torch.rand(2, 16)
    torch.testing.assert_close(entropy_loss(entropy, valid), entropy[:, :8].mean())
    nothing = valid & False
    assert entropy_loss(entropy, nothing) == 0
    assert classification_loss(scores, labels, valid=nothing).isfinite()


def test_segmentation_loss():
    logits = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 4, (2, 3, 3), dtype=torch.uint8)
    mask[0, 0] = IGNORE
    expected = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE)
    torch.testing.assert_close(segmentation_loss(logits, mask), expected)
    torch.testing.assert_close(segmentation_loss(logits, mask, count=torch.tensor(30)), expected * 15 / 30)
    assert labelled_pixels(mask) == 15
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, mask), logits)


def test_segmentation_loss_of_nothing_is_zero_with_zero_gradient():
    logits = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 3, 3), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_resized_masks_keep_clear_majorities():
    mask = torch.tensor([[[0, 1]]], dtype=torch.uint8)
    assert resize_mask(mask, 2, (1, 5))[0, 0].tolist() == [0, 0, X, 1, 1]


@given(st.integers(0, 2000), st.integers(1, 1000), st.sampled_from([1, 2]))
def test_ramp_up_properties(step, total, power):
    value = ramp_up(step, total, power=power)
    assert 0 <= value <= 1
    assert ramp_up(step + 1, total, power=power) >= value
    assert (value == 1) == (step >= total) or math.isclose(value, 1)


def test_schedules_at_known_points():
    assert ramp_up(0, 10) == 0
    assert ramp_up(5, 10) == 0.5
    assert ramp_up(5, 10, power=2) == 0.25
    assert ramp_up(3, 0) == 1
    assert poly(0, 100) == 1
    assert poly(100, 100) == 0
    assert poly(50, 100, power=0.9) == pytest.approx(0.5**0.9)
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warm_up(0, 0) == 1


def test_confusion_against_torchmetrics():
    truth = torch.randint(0, 4, (3, 20, 20))
    truth[truth == 3] = 0  # class 3 never occurs
    prediction = torch.where(torch.rand(truth.shape) < 0.6, truth, torch.randint(0, 4, truth.shape))
    truth[0, :5] = IGNORE
    ours = ConfusionMatrix(4)
    for p, t in zip(prediction, truth, strict=True):
        ours.update(p.to(torch.uint8), t.to(torch.uint8))
    theirs = MulticlassConfusionMatrix(4, ignore_index=IGNORE)(prediction, truth)
    assert torch.equal(ours.counts, theirs)
    assert ours.counts.dtype == torch.int64
    jaccard = MulticlassJaccardIndex(4, average=None, ignore_index=IGNORE)(prediction, truth)
    assert ours.iou()[:3] == pytest.approx((100 * jaccard[:3]).tolist())
    assert ours.iou()[3] is None
    assert ours.miou() == pytest.approx(100 * jaccard[:3].mean().item())


def test_ignored_pixels_of_a_mask_are_background_and_lower_its_coverage():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1, X, X]), torch.tensor([0, 1, 0, 1]))
    assert matrix.counts.tolist() == [[2, 0], [1, 1]]
    assert matrix.coverage() == 50
    assert matrix.miou() == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_without_truth_there_is_no_score():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([X, X]))
    assert matrix.miou() is None
    assert matrix.coverage() is None
    with pytest.raises(ValueError, match="expected one shape"):
        matrix.update(torch.zeros(2), torch.zeros(3))
