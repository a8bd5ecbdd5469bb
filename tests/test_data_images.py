"""Image and mask files of every kind."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mcic.data.images import denormalize, normalize, probe_image, read_image, read_map, read_mask, read_thumbnail
from mcic.data.palette import voc_palette


def gradient(height=6, width=9):
    values = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    return values


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
     (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))],
)  # fmt: skip
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    image = Image.fromarray(gradient())
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), turn(gradient()))


def test_grey_palette_and_one_bit_take_their_displayed_colour(tmp_path):
    grey = np.array([[0, 100, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    palette.putpalette([9, 8, 7, 200, 100, 50, 1, 2, 3])
    palette.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").tolist() == [[[9, 8, 7], [200, 100, 50], [1, 2, 3]]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png").tolist() == [[[255] * 3, [0] * 3]]


def test_alpha_is_laid_over_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png").tolist() == [[[255, 0, 0], [255] * 3, [204] * 3]]
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8)).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[10] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255] * 3, [200, 100, 50]]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_maps_its_full_range(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535, 200]], np.uint16)).save(path)
    assert read_image(path)[0, :, 0].tolist() == [0, 1, 128, 255, 1]


def test_cmyk(tmp_path):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[:, :, 0] = 255
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, 0].tolist() == [0, 255, 255]
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg")[0, 0], [0, 255, 255], atol=4)


def test_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_unreadable_images_name_the_file(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
    for name in ("text.jpg", "empty.png", "cut.jpg", "float.tif", "missing.jpg"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "missing.jpg")


def test_a_damaged_png_fails_at_the_first_look(tmp_path):
    """As it would when it is read: Pillow decodes a PNG when asked for its EXIF, and must not do so unheard."""
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    for look in (read_image, probe_image, lambda file: read_thumbnail(file, 8)):
        with pytest.raises(ValueError, match=r"cannot read the image .*a\.png"):
            look(path)


def test_masks_keep_indices(tmp_path):
    mask = np.array([[0, 1, 20, 255]], np.uint8)
    palette = Image.fromarray(mask)
    palette.putpalette(voc_palette(256).tobytes())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(mask).save(tmp_path / "grey.png")
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("palette", "grey", "deep"):
        read = read_mask(tmp_path / f"{name}.png")
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, mask)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert read_mask(tmp_path / "bit.png").tolist() == [[1, 0]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_keep_indices(tmp_path, bits):
    mask = np.array([[0, 1, 1, 0]], np.uint8) * (2**bits - 1)
    palette = Image.fromarray(mask)
    palette.putpalette(voc_palette(2**bits).tobytes())
    palette.save(tmp_path / "palette.png", bits=bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png"), mask)


def test_4_bit_grey_mask(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0\x01\x2f")), chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert read_mask(tmp_path / "a.png").tolist() == [[0, 1, 2, 15]]


def test_masks_that_hold_no_indices_are_refused(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour.png: a mask holds one class index per pixel .* this has RGB"):
        read_mask(tmp_path / "colour.png")
    Image.fromarray(np.array([[256]], np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png.*256"):
        read_mask(tmp_path / "deep.png")


def test_maps_of_8_and_16_bits(tmp_path):
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 13107, 65535]], np.uint16)).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        np.testing.assert_allclose(read_map(tmp_path / name), [[0, 0.2, 1]], atol=1e-6)


def test_normalize_and_back():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    normal = normalize(image)
    assert normal.shape == (3, 5, 7)
    assert normal.dtype == torch.float32
    expected = (image[2, 3, 1] / 255 - 0.456) / 0.224
    assert normal[1, 2, 3].item() == pytest.approx(expected, abs=1e-5)
    np.testing.assert_array_equal(denormalize(normal), image)


def test_voc_palette():
    assert voc_palette(21)[[0, 1, 2, 8, 15, 20]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128]
    ]  # fmt: skip
    assert len(np.unique(voc_palette(256), axis=0)) == 256
