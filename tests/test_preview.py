import json

import numpy as np
import pytest
from PIL import Image

from mcic.fonts import font_for
from mcic.preview import (
    CellReading,
    Example,
    Source,
    colorize,
    contact_sheet,
    heat,
    ignore_hatch,
    overlay,
    write_examples,
)

PALETTE = np.array([[0, 0, 0], [200, 30, 30], [20, 120, 220]], dtype=np.uint8)
GREY = np.full((12, 10, 3), 100, dtype=np.uint8)


def test_colorize_paints_the_palette_and_hatches_ignore():
    mask = np.array([[0, 1, 2], [255, 255, 255]], dtype=np.uint8)
    colors = colorize(mask, PALETTE)
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors[0], PALETTE)
    np.testing.assert_array_equal(colors[1], ignore_hatch(2, 3)[1])


def test_ignore_is_no_plain_colour():
    assert len(np.unique(ignore_hatch(8, 8).reshape(-1, 3), axis=0)) == 2


def test_colorize_names_values_without_a_colour():
    with pytest.raises(ValueError, match=r"\[3, 7\].*3 colours"):
        colorize(np.array([[0, 3, 7, 255]], dtype=np.uint8), PALETTE)


def test_overlay_keeps_the_background_tints_the_object_and_outlines_it():
    mask = np.zeros((12, 10), dtype=np.uint8)
    mask[3:8, 3:8] = 1
    drawn = overlay(GREY, mask, PALETTE, alpha=0.25)
    np.testing.assert_array_equal(drawn[mask == 0], GREY[mask == 0])
    np.testing.assert_array_equal(drawn[3, 3], PALETTE[1])
    np.testing.assert_array_equal(drawn[5, 5], np.rint(0.75 * 100 + 0.25 * PALETTE[1]))


def test_heat_grows_lighter_and_ignores_colour_and_nan():
    scores = np.linspace(0, 1, 10, dtype=np.float32)[None].repeat(12, axis=0)
    red = np.zeros((12, 10, 3), dtype=np.uint8)
    red[..., 0] = 100
    drawn = heat(red, scores)
    lightness = (drawn[0] @ [0.299, 0.587, 0.114]).tolist()
    assert lightness == sorted(lightness)
    assert lightness[-1] - lightness[0] > 100
    holes = scores.copy()
    holes[:, 0] = np.nan
    np.testing.assert_array_equal(heat(red, holes), drawn)
    np.testing.assert_array_equal(heat(red, scores * 2 - 0.0)[:, -1], drawn[:, -1])


@pytest.mark.parametrize("draw", [lambda p, s: overlay(p, s, PALETTE), heat])
def test_sizes_must_agree(draw):
    with pytest.raises(ValueError, match=r"\(12, 10, 3\) and \(6, 5\)"):
        draw(GREY, np.zeros((6, 5), dtype=np.uint8))


def test_contact_sheet_places_every_image_in_its_cell():
    red, blue = (np.full((20, 20, 3), color, dtype=np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    wide = np.full((10, 40, 3), (0, 255, 0), dtype=np.uint8)
    sheet = contact_sheet([[red, blue], [wide, None]], ["left", "right"], ["first", "second\nline"], cell=64)
    assert sheet.dtype == np.uint8
    colors = {color: np.argwhere((sheet == color).all(axis=2)) for color in ((255, 0, 0), (0, 0, 255), (0, 255, 0))}
    spans = {color: tuple(np.ptp(places, axis=0) + 1) for color, places in colors.items()}
    assert spans == {(255, 0, 0): (64, 64), (0, 0, 255): (64, 64), (0, 255, 0): (16, 64)}
    assert colors[0, 0, 255].min(axis=0)[1] > colors[255, 0, 0].max(axis=0)[1]
    assert colors[0, 255, 0].min(axis=0)[0] > colors[255, 0, 0].max(axis=0)[0]


def test_contact_sheet_writes_its_labels():
    blank = contact_sheet([[GREY]], [""], [""])
    assert (contact_sheet([[GREY]], ["CAM"], [""]) != blank).any()
    assert (contact_sheet([[GREY]], [""], ["cat"]) != blank).any()
    long = contact_sheet([[GREY]], ["many words " * 20], ["many words " * 20])
    assert long.shape == blank.shape
    np.testing.assert_array_equal(long[:, -14:], blank[:, -14:])


def test_contact_sheet_wants_a_title_per_column_and_a_caption_per_row():
    with pytest.raises(ValueError, match="title per column"):
        contact_sheet([[GREY, GREY]], ["one"], ["row"])
    with pytest.raises(ValueError, match="caption per row"):
        contact_sheet([[GREY]], ["one"], [])


def test_examples_are_stored_and_replaced(tmp_path):
    panels = {"CAM mask": GREY + 1, "CAM-mask": GREY + 2}
    example = Example("img/1", ("cat", "dog"), GREY, panels, {"CAM mask": float("nan"), "CAM-mask": 12.5})
    write_examples(tmp_path, [example, example])
    index = json.loads(write_examples(tmp_path, [example]).read_text())
    folder = tmp_path / "previews" / "final"
    assert index[0]["id"] == "img/1"
    assert index[0]["tags"] == ["cat", "dog"]
    assert index[0]["iou"] == {"CAM mask": None, "CAM-mask": 12.5}
    assert list(index[0]["panels"]) == ["image", "CAM mask", "CAM-mask"]
    assert index[0]["panels"]["CAM mask"] == "000-cam-mask.png"
    assert {path.name for path in folder.glob("*.png")} == set(index[0]["panels"].values())
    for name, pixels in {"image": GREY, **panels}.items():
        np.testing.assert_array_equal(np.asarray(Image.open(folder / index[0]["panels"][name])), pixels)


def test_readings_are_stored_beside_the_examples_and_replaced(tmp_path):
    reading = CellReading(np.array([[[3, 1], [1, 3]]]), np.array([[[0.75, 0.1], [0.33333, 0.2]]]))
    examples = [Example("a", (), GREY, {}, {}, 12.5, reading), Example("b", (), GREY, {}, {})]
    sources = [Source("cat", f"img/{number}", number) for number in range(4)]
    write_examples(tmp_path, examples, sources=sources, thumbnails={"img/3": GREY})
    folder = tmp_path / "previews" / "final"
    assert [entry["uncertainty"] for entry in json.loads((folder / "index.json").read_text())] == [12.5, None]
    assert json.loads((folder / "readings.json").read_text()) == {
        "sources": [
            {"class": "cat", "image": "img/1", "contexts": 1},
            {"class": "cat", "image": "img/3", "contexts": 3},
        ],
        "readings": [
            {"rows": 1, "columns": 2, "sources": [1, 0, 0, 1], "weights": [7500, 1000, 3333, 2000]},
            None,
        ],
        "thumbnails": {"img/3": "bank-000.png"},
    }
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "bank-000.png")), GREY)
    write_examples(tmp_path, examples[1:])
    assert {path.name for path in folder.iterdir()} == {"index.json", "000-image.png"}


def test_names_in_any_alphabet_are_drawn(caplog):
    """Not as the box that stands for what a font lacks."""
    font = font_for(["Fußgänger", "собака", "σκύλος"], 20)
    box = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != box for letter in "ßäобакσύ")
    assert not caplog.text
    rare = font_for(["\U0010fffd dog"], 20)  # private use: in no font but the one that draws a box for everything
    assert "no font of this machine has" in caplog.text
    assert "Last Resort" not in rare.getname()[0]
    font_for(["\U0001e900"], 20)  # an alphabet that few fonts have
    assert font_for(["dog"], 20).size == 20
