"""Dense predictions: any size, nothing cut, protocols as written."""

import pytest
import torch

from mcic.inference import dense, dense_protocol, pad_to_grid, to_pixels

SIZES = [(33, 33), (32, 40), (1, 1), (7, 50), (100, 63)]


def subsampled(stride):
    """A network whose features are the image's own values at 0, stride, 2·stride, …"""
    return lambda images: images[..., ::stride, ::stride]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [4, 8, 16])
def test_padding_reaches_the_grid_and_cuts_nothing(size, stride):
    images = torch.randn(1, 3, *size)
    padded = pad_to_grid(images, stride)
    assert all((side - 1) % stride == 0 for side in padded.shape[-2:])
    assert all(0 <= side - old < stride for side, old in zip(padded.shape[-2:], size, strict=True))
    assert torch.equal(padded[..., : size[0], : size[1]], images)


@pytest.mark.parametrize("size", SIZES[:2] + SIZES[3:])
def test_a_linear_image_comes_back_exactly(size):
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    image = torch.stack([rows, columns, rows + columns])[None]
    maps = dense(subsampled(4), image, 4)
    inside = tuple((side - 1) // 4 * 4 + 1 for side in size)  # beyond, the padding's zeros are mixed in
    torch.testing.assert_close(maps[..., : inside[0], : inside[1]], image[..., : inside[0], : inside[1]])
    assert maps.shape == image.shape


def test_to_pixels_puts_features_on_their_pixels():
    maps = torch.randn(1, 2, 5, 5)
    pixels = to_pixels(maps, 4, (16, 17))
    torch.testing.assert_close(pixels[..., ::4, ::4], maps[..., :4, :])


def test_protocols():
    images = torch.randn(1, 3, 33, 33)
    calls = []

    def network(batch):
        calls.append(tuple(batch.shape[-2:]))
        # Symmetric under mirroring, and different at every scale.
        return torch.full((1, 2, batch.shape[-2] // 4 + 1, batch.shape[-1] // 4 + 1), float(len(calls)))

    assert dense_protocol(network, images, 4, "single").unique().item() == 1
    calls.clear()
    assert dense_protocol(network, images, 4, "voc").unique().item() == pytest.approx((1.5 + 3.5 + 5.5) / 3)
    assert calls == [(25, 25)] * 2 + [(33, 33)] * 2 + [(41, 41)] * 2
    calls.clear()
    authors = dense_protocol(network, images, 4, "authors").unique().item()
    assert authors == pytest.approx((3.5 + 5.5) / 2)


@pytest.mark.parametrize("protocol", ["voc", "authors"])
def test_mirrored_predictions_are_mirrored_back(protocol):
    ramp = torch.arange(33.0).expand(1, 3, 33, 33)  # not mirrored back, the mean of both would be level
    maps = dense_protocol(lambda images: images[..., ::4, ::4], ramp, 4, protocol)
    assert (maps.diff(dim=-1)[..., 4:-12] > 0.5).all()
