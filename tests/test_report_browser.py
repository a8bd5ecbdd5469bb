"""The report in a real browser: what a person does with mouse and keyboard, and what the page never does."""

import re
import shutil
from pathlib import Path
from urllib.request import url2pathname

import numpy as np
import pytest
from test_report import make_run, write_gallery

from mcic.report import write_report
from mcic.report_comparison import write_comparison

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (pip install -e .[test])")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")

COUNT = 6


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of a run's page, of one without a bank, and of their comparison with a third."""
    folder = tmp_path_factory.mktemp("browser")
    runs = {name: make_run(folder / name, steps=20) for name in ("full", "bankless", "other")}
    for name, run in runs.items():
        write_gallery(run, COUNT, bank=name != "bankless")
    stored = runs["other"] / "previews" / "final" / "readings.json"
    stored.write_text(stored.read_text().replace('"class": "circle"', '"class": "cross"'))
    comparison = write_comparison(list(runs.values()), out=folder / "comparison.html")
    return {name: write_report(run).as_uri() for name, run in runs.items()} | {"comparison": comparison.as_uri()}


@pytest.fixture
def visit(browser, pages):
    """Open a page by name; at the end of the test it must have complained of nothing and asked for nothing."""
    contexts, said, asked = [], [], []

    def open_page(name, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(pages[name])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:") and url not in pages.values()] == []


def shown(page):
    """Numbers of the images that are shown, in order."""
    labels = page.eval_on_selector_all(".example:not([hidden])", "all => all.map(a => a.getAttribute('aria-label'))")
    return [int(label[-4:]) for label in labels]


def click_cell(page, example, row, column, *, frame=0):
    """Click into the middle of a cell of the 4×6 grid, in a panel of the example that stands at that place."""
    target = page.locator(f".example >> nth={example} >> .frame >> nth={frame}")
    box = target.bounding_box()
    target.click(position={"x": (column + 0.5) * box["width"] / 6, "y": (row + 0.5) * box["height"] / 4})


def test_gallery_sorts(visit):
    page = visit("full")
    assert shown(page) == [0, 1, 2, 3, 4, 5]
    page.select_option("#gallery-sort", label="uncertainty")  # 20.5, 5.25 and 31, in turn
    assert shown(page) == [2, 5, 0, 3, 1, 4]
    page.click("#gallery-order")
    assert shown(page) == [1, 4, 0, 3, 2, 5]
    page.select_option("#gallery-sort", label="IoU of the prediction")  # falls with the number; image 1 has none
    assert shown(page) == [5, 4, 3, 2, 0, 1]
    page.click("#gallery-order")
    assert shown(page) == [0, 2, 3, 4, 5, 1]
    page.select_option("#gallery-sort", label="class")  # images 0 and 5 have the first two classes
    assert shown(page) == [0, 5, 1, 2, 3, 4]
    page.select_option("#gallery-sort", label="order of the data")
    assert shown(page) == [0, 1, 2, 3, 4, 5]


def test_gallery_filters_by_class(visit):
    page = visit("full")
    page.select_option("#gallery-class", label="star & moon")
    assert shown(page) == [1, 2]
    assert page.inner_text("#gallery-count") == "2 of 6 images"
    page.select_option("#gallery-sort", label="uncertainty")
    assert shown(page) == [2, 1]
    page.select_option("#gallery-class", value="")
    assert shown(page) == [2, 5, 0, 3, 1, 4]


def test_clicked_pixel_says_what_it_read(visit):
    page = visit("full")
    assert page.locator(".reading:visible").count() == 0
    click_cell(page, 0, 2, 3)
    reading = page.locator(".reading:visible")
    lines = [line for line in reading.inner_text().split("\n") if line]
    assert lines[0] == "What the pixels around row 3 of 4, column 4 of 6 read:"
    assert [line for line in lines if "%" in line] == ["60.0 %", "25.0 %", "15.0 %"]
    assert [line for line in lines[1:] if "%" not in line] == [
        "circle", "this image", "no picture", "background", "far </script><i>away</i>", "from all others",
    ]  # fmt: skip
    picture = reading.locator("img")
    assert picture.count() == 1
    assert picture.evaluate("image => image.naturalWidth") == 24
    assert reading.locator("li").first.get_attribute("title") == "shapes-0000: 2 contexts of circle in the memory"
    click_cell(page, 0, 0, 0, frame=3)  # in any panel
    assert page.locator(".reading:visible").count() == 1
    text = page.inner_text(".reading:visible")
    assert "100.0 %" in text
    assert "unknown image" in text
    click_cell(page, 0, 1, 4)
    assert "87.5 %" in page.inner_text(".reading:visible")
    click_cell(page, 1, 3, 5)
    assert page.locator(".reading:visible").count() == 2
    assert "row 4 of 4, column 6 of 6" in page.inner_text(".example >> nth=1 >> .reading")
    assert "shapes-0000" in page.inner_text(".example >> nth=1 >> .reading")  # there it is not "this image"


def test_the_mark_lies_on_the_pixel_in_every_panel(visit):
    page = visit("full")
    click_cell(page, 0, 1, 4)
    frames = page.locator(".example >> nth=0 >> .frame")
    assert frames.count() == 5
    for frame in frames.all():
        box = frame.bounding_box()
        left, top = frame.evaluate("f => { const s = getComputedStyle(f, '::after'); return [s.left, s.top] }")
        assert float(left[:-2]) == pytest.approx(box["width"] * 4 / 6, abs=0.1)
        assert float(top[:-2]) == pytest.approx(box["height"] * 1 / 4, abs=0.1)


def test_keyboard_walks_the_gallery_and_the_pixels(visit):
    page = visit("full")
    page.select_option("#gallery-sort", label="uncertainty")
    page.focus("#gallery-large")
    focused = "document.activeElement.getAttribute('aria-label')"

    def press(*keys):
        for key in keys:
            page.keyboard.press(key)
        return page.evaluate(focused)

    assert press("Tab") == "shapes-0002"
    assert press("ArrowDown") == "shapes-0005"
    assert press("Shift+Tab", "Tab") == "shapes-0005"  # one stop, at the example that was left
    assert press("End") == "shapes-0004"
    assert press("ArrowDown") == "shapes-0004"
    assert press("Home", "ArrowDown", "ArrowUp") == "shapes-0002"
    assert press("Enter").startswith("Pixels of shapes-0002")
    assert page.locator(".reading:visible").count() == 0
    press("Enter")
    assert "row 3 of 4, column 4 of 6" in page.inner_text(".reading:visible")
    press("ArrowUp", "ArrowUp", "ArrowUp", "ArrowLeft")  # not beyond the edge
    assert "row 1 of 4, column 3 of 6" in page.inner_text(".reading:visible")
    press("ArrowLeft", "ArrowLeft")
    assert "100.0 %" in page.inner_text(".reading:visible")
    assert press("Escape") == "shapes-0002"
    assert page.locator(".reading:visible").count() == 0
    assert press("Enter", "Tab") == "IoU by class"  # out of the gallery, not into the next example
    assert press("Shift+Tab").startswith("Pixels of shapes-0002")
    assert press("Shift+Tab") == "shapes-0002"


def test_large_pictures(visit):
    page = visit("full")
    before = page.locator(".frame").first.bounding_box()["width"]
    page.check("#gallery-large")
    assert page.locator(".frame").first.bounding_box()["width"] > 1.3 * before


def test_without_a_bank_nothing_can_be_asked(visit):
    page = visit("bankless")
    assert "Click into a picture" not in page.inner_text("#examples")
    page.locator(".frame").first.click()
    assert page.locator(".reading").count() == 0
    page.select_option("#gallery-sort", label="uncertainty")
    assert shown(page) == [2, 5, 0, 3, 1, 4]


def test_runs_side_by_side_answer_each_for_itself(visit):
    page = visit("comparison")
    assert shown(page) == [0, 1, 2, 3, 4, 5]
    rows = page.locator(".example >> nth=0 >> .row")
    assert rows.locator("h4").all_inner_texts() == [
        f"{name} uncertainty 20.5 %" for name in ("full", "bankless", "other")
    ]
    rows.nth(1).locator(".frame").first.click()
    assert page.locator(".reading:visible").count() == 0
    rows.nth(2).locator(".frame").first.click()
    assert "cross" in rows.nth(2).locator(".reading").inner_text()
    assert not rows.nth(0).locator(".reading").is_visible()
    rows.nth(0).locator(".frame").first.click()
    assert "circle" in rows.nth(0).locator(".reading").inner_text()
    page.select_option("#gallery-sort", label="IoU of the prediction, other")
    assert shown(page) == [5, 4, 3, 2, 0, 1]


@pytest.mark.parametrize("name", ["full", "comparison"])
def test_light_and_dark_and_every_width(visit, name):
    for scheme, dark in (("light", False), ("dark", True)):
        for width in (360, 1280):
            page = visit(name, color_scheme=scheme, viewport={"width": width, "height": 800})
            style = page.evaluate(
                "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] })()"
            )
            ground, ink = (np.mean([int(value) for value in re.findall(r"\d+", color)[:3]]) for color in style)
            assert (ground < ink) == dark
            assert abs(ground - ink) > 150
            overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow == 0, f"{scheme}, {width} pixels wide: {overflow} pixels too wide"


def test_policy_stops_every_other_script(browser, pages, tmp_path):
    """A script that got into the page by a fault of ours does not run, and nothing can be sent."""
    page_file = tmp_path / "injected.html"
    source = Path(url2pathname(pages["full"].removeprefix("file://"))).read_text(encoding="utf-8")
    page_file.write_text(source.replace("</body>", "<script>window.injected = true</script></body>"), encoding="utf-8")
    page = browser.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(page_file.as_uri())
    assert page.evaluate("window.injected") is None
    assert any("Content Security Policy" in text for text in refused)
    assert shown(page) == [0, 1, 2, 3, 4, 5]
    page.close()


def test_without_script_the_page_is_whole(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["full"])
    assert page.locator(".example").count() == COUNT
    assert page.locator("#gallery-toolbar").is_hidden()
    assert page.locator("#gallery-help").is_hidden()
    context.close()
