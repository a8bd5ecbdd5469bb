"""Masks on a finer grid, and masks that follow edges while training."""

import pytest
import torch
from test_method import RAMP, fill, make, make_batch
from torch.nn import functional as F

from mcic.objective import finer
from mcic.refine import pamr, refine_rows


def test_a_finer_grid_keeps_the_points_it_had():
    maps = torch.randn(2, 3, 5, 4)
    fine = finer(maps, 4)
    assert fine.shape == (2, 3, 17, 13)
    torch.testing.assert_close(fine[:, :, ::4, ::4], maps)
    torch.testing.assert_close(fine[:, :, 2, 0], (maps[:, :, 0, 0] + maps[:, :, 1, 0]) / 2)
    assert finer(maps.bfloat16(), 4).dtype == torch.float32  # so that gradients are added up in it
    assert finer(maps, 1) is maps
    assert finer(None, 4) is None


@pytest.mark.parametrize("context", ["bank", "self", "none"])
def test_masks_and_losses_are_on_the_finer_grid(context):
    """The same numbers as maps that were made finer by hand and went through the objective as they are."""
    model, objective = make(context=context, mask_upsampling=4, entropy_weight=0.0)
    model.eval()
    if model.memory is not None:
        fill(model)
    batch = make_batch()
    prediction = model(batch.images)
    logits = F.interpolate(prediction.logits, size=33, mode="bilinear", align_corners=True)
    terms = objective(model, batch, RAMP).terms
    heatmap = F.interpolate(prediction.heatmap, size=33, mode="bilinear", align_corners=True)
    _, plain = make(context="none", mask_upsampling=1)
    fine = type(prediction)(prediction.features, heatmap, logits)
    cam = plain.masks(fine, None, batch.tags, batch.saliency, batch.valid, batch.images).named()["cam"]
    assert cam.shape[-2:] == (33, 33)
    torch.testing.assert_close(terms["loss/s_cam"], F.cross_entropy(logits, cam.long(), ignore_index=255))


def test_full_supervision_reads_every_pixel_of_the_finer_grid():
    model, objective = make(supervision="full", mask_upsampling=4)
    model.eval()
    batch = make_batch()
    logits = F.interpolate(model(batch.images).logits, size=33, mode="bilinear", align_corners=True)
    terms = objective(model, batch, RAMP).terms
    torch.testing.assert_close(terms["loss/segmentation"], 3 * F.cross_entropy(logits, batch.masks.long()))


def test_refined_masks_follow_an_edge():
    """A soft border two pixels off the image's edge is drawn to the edge, by every row alike."""
    _, objective = make(refinement="pamr", context="self", cam_threshold=0.0)
    images = torch.zeros(1, 3, 33, 33)
    images[:, :, :, 16:] = 1.0
    images += 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    rows = torch.rand(1, 4, 33, 33) * 0.01
    rows[:, 1, :, 18:], rows[:, 0, :, :18] = 1.0, 1.0
    (refined,) = objective._from_rows([rows], None, images)
    assert (refined[0, :, 17:] == 1).float().mean() > 0.95
    assert (refined[0, :, :15] == 0).float().mean() > 0.95
    assert (rows.argmax(1)[0, :, 16:18] == 0).all()


def test_refinement_sees_the_image_alone_whatever_its_scale():
    rows, images = torch.rand(2, 4, 33, 33), torch.rand(2, 3, 33, 33)
    same = refine_rows(rows, images, method="pamr")
    torch.testing.assert_close(same, pamr(rows, images))
    scale, shift = torch.tensor([2.0, 0.3, 5.0]).view(3, 1, 1), torch.tensor([1.0, -3.0, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(same, refine_rows(rows, images * scale + shift, method="pamr"), rtol=1e-3, atol=1e-4)
    assert refine_rows(rows, images, method="none") is rows


def test_neighbours_keep_their_distance_in_the_image():
    """On a grid of a quarter of the pixels the neighbours are a quarter as far."""
    rows, images = torch.rand(1, 2, 9, 9), torch.rand(1, 3, 33, 33)
    expected = pamr(rows, images[:, :, ::4, ::4], dilations=(1, 2, 3, 6))
    torch.testing.assert_close(refine_rows(rows, images, method="pamr"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", ["bank", "self", "none"])
def test_refined_masks_train(context):
    model, objective = make(refinement="pamr", context=context, mask_upsampling=2)
    if model.memory is not None:
        fill(model)
    step = objective(model, make_batch(), RAMP)
    step.total.backward()
    assert step.total.isfinite()
    assert model.network.segmentation_head.weight.grad.any()


def test_what_a_crop_padded_is_no_neighbour():
    """Whatever stands there: saliency is 1 in it, and its heat is no part of the heat's maximum."""
    _, objective = make(refinement="pamr", context="self", cam_threshold=0.0)
    images = 0.05 * torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(1, 33, 33, dtype=torch.bool)
    valid[:, :, 20:] = False
    rows = torch.rand(1, 4, 33, 33, generator=torch.Generator().manual_seed(1))
    other = rows.clone()
    other[:, 2, :, 20:] = 50.0
    first, second = (objective._from_rows([each], valid, images)[0] for each in (rows, other))
    assert torch.equal(first, second)
    assert (first[:, :, 20:] == 255).all()
    whole = torch.ones_like(valid)
    assert torch.equal(objective._from_rows([rows], whole, images)[0], objective._from_rows([rows], None, images)[0])
