"""The joint random transform."""

import numpy as np
import pytest
import torch

from mcic.data.images import denormalize
from mcic.data.transforms import Augment

COLOURS = np.array([[20, 20, 20], [220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)


def blocks(height, width, block=16):
    """A mask of large blocks, the image that shows it in colours, and a saliency map that repeats it."""
    rows, columns = np.mgrid[:height, :width] // block
    mask = ((rows * 7 + columns * 3) % 4).astype(np.uint8)
    return COLOURS[mask], (mask == 2).astype(np.float32), mask


def augment(**changes):
    return Augment(**{"size": 48, "scale": (0.5, 1.5), "flip": True, "color_jitter": 0.0, "seed": 3} | changes)


def fields(sample):
    return [sample.image, sample.saliency, sample.mask, sample.valid]


def test_is_a_pure_function_of_seed_epoch_and_index():
    data = blocks(60, 80)
    jitter = augment(color_jitter=0.4)
    first = jitter(*data, epoch=1, index=5)
    np.random.seed(123)
    torch.manual_seed(7)
    for a, b in zip(fields(first), fields(jitter(*data, epoch=1, index=5)), strict=True):
        assert torch.equal(a, b)
    for other in (
        jitter(*data, epoch=2, index=5),
        jitter(*data, epoch=1, index=6),
        augment(color_jitter=0.4, seed=4)(*data, epoch=1, index=5),
    ):
        assert not torch.equal(first.image, other.image)


@pytest.mark.parametrize("size", [(60, 80), (200, 31), (17, 400), (48, 48)])
def test_image_mask_and_saliency_stay_aligned(size):
    data = blocks(*size)
    agreeing = total = 0
    for index in range(24):
        sample = augment()(*data, epoch=0, index=index)
        distance = np.linalg.norm(denormalize(sample.image).astype(float)[:, :, None] - COLOURS, axis=3)
        shown, valid = torch.from_numpy(distance.argmin(2)), sample.valid
        agreeing += (shown == sample.mask)[valid].sum().item()
        agreeing += ((sample.saliency > 0.5) == (sample.mask == 2))[valid].sum().item()
        total += 2 * valid.sum().item()
    assert agreeing / total > 0.93  # pixels on the blocks' outlines may differ


def test_padding_is_mean_colour_ignored_salient_and_invalid():
    image, _, mask = blocks(30, 20)
    sample = augment(scale=(1, 1))(image, np.zeros((30, 20), np.float32), mask, epoch=0, index=0)
    assert sample.valid.sum() == 30 * 20
    assert (sample.image[:, ~sample.valid] == 0).all()
    assert (sample.mask[~sample.valid] == 255).all()
    assert (sample.saliency[~sample.valid] == 1).all()
    assert (sample.mask[sample.valid] != 255).all()
    assert (sample.saliency[sample.valid] == 0).all()
    rows, columns = np.nonzero(sample.valid.numpy())
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    shown = sample.mask.numpy()[box]
    assert np.array_equal(shown, mask) or np.array_equal(shown, mask[:, ::-1])


def test_without_scale_and_flip_a_crop_is_cut_out_unchanged():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (70, 90, 3), np.uint8)
    mask = random.integers(0, 4, (70, 90), np.uint8)
    sample = augment(scale=(1, 1), flip=False)(image, None, mask, epoch=0, index=1)
    assert sample.saliency is None
    windows = np.lib.stride_tricks.sliding_window_view(mask, (48, 48))
    place = np.argwhere((windows == sample.mask.numpy()).all((2, 3)))
    assert len(place) == 1
    top, left = place[0]
    np.testing.assert_array_equal(denormalize(sample.image), image[top : top + 48, left : left + 48])


def test_flip_scale_and_jitter_take_place():
    image = np.zeros((48, 48, 3), np.uint8)
    image[:, :24] = 200
    still = augment(scale=(1, 1), flip=False)
    flips = [augment(scale=(1, 1))(image, None, None, epoch=0, index=i).image[0, 0, 0] > 0 for i in range(200)]
    assert 70 < sum(flips) < 130
    shares = [augment()(image, None, None, epoch=0, index=i).valid.float().mean().item() for i in range(100)]
    assert min(shares) < 0.35
    assert max(shares) == 1
    plain = still(image, None, None, epoch=0, index=0).image
    jittered = augment(scale=(1, 1), flip=False, color_jitter=0.5)(image, None, None, epoch=0, index=0).image
    assert torch.equal(plain, still(image, None, None, epoch=9, index=4).image)
    assert not torch.equal(plain, jittered)


def test_without_a_mask_everything_is_ignored():
    image, saliency, _ = blocks(60, 60)
    assert (augment()(image, saliency, None, epoch=0, index=0).mask == 255).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_extreme_shapes(shape):
    image, saliency, mask = blocks(*shape)
    for index in range(10):
        sample = augment()(image, saliency, mask, epoch=0, index=index)
        assert sample.valid.any()
        assert torch.isfinite(sample.image).all()
