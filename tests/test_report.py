import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from mcic.charts import Line, confusion_chart, line_chart, number, ticks
from mcic.cli.report import main
from mcic.preview import CellReading, Example, Source, colorize, heat, overlay, write_examples
from mcic.report import write_report
from mcic.report_comparison import write_comparison

CLASSES = ["background", "circle", "<b>bold</b>", "star & moon", "cross", "ring", "arrow"]
PALETTE = [[0, 0, 0], [226, 88, 62], [66, 135, 201], [240, 180, 41], [92, 168, 90], [150, 98, 190], [60, 180, 180]]
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source"}


def make_run(folder: Path, *, steps: int = 300, complete: bool = True) -> Path:
    """A run folder as training writes it; an incomplete one stopped before its evaluation."""
    folder.mkdir(parents=True)
    config = {
        "preset": "shapes",
        "data": {"name": "shapes", "root": None, "saliency": "auto"},
        "model": {"backbone": "tiny", "weights": "none"},
        "method": {"rules": "paper", "context": "bank", "masks": ["cam", "context", "merged"], "supervision": "tags"},
        "train": {"epochs": 5, "batch_size": 16, "lr": 0.01, "size": 96, "seed": 0, "scale": [0.5, 1.5]},
        "run": {"dir": "runs/<script>alert(1)</script>"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rng = np.random.default_rng(0)
    lines = [json.dumps(_metrics(step, steps, rng)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if complete:
        evaluations = [{"step": 60 * e, "epoch": e, "val/miou": 30 + 7 * e} for e in range(1, 6)]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
        (folder / "env.json").write_text(json.dumps({"python": "3.12", "torch": "2.13.0", "commit": "abc123"}))
        (folder / "summary.json").write_text(json.dumps(make_summary()))
        write_gallery(folder)
    return folder


def write_gallery(folder: Path, count: int = 3, *, bank: bool = True) -> None:
    """Examples of a run; with `bank` also what they read, see `make_reading`."""
    sources = [
        Source(CLASSES[1], "shapes-0000", 2), Source("background", "far </script><i>away</i>", 1),
        Source(CLASSES[2], None, 3), Source(CLASSES[3], "never read", 1),
    ]  # fmt: skip
    examples = [make_example(i, bank=bank) for i in range(count)]
    thumbnail = {"shapes-0000": examples[0].pixels[::4, ::4]}
    write_examples(folder, examples, sources=sources if bank else (), thumbnails=thumbnail if bank else {})


def _metrics(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    t = step / steps
    noise = rng.normal(1, 0.06, 12)
    return {
        "step": step, "epoch": t * 5, "lambda": min(1.0, 3 * t**2 - 2 * t**3), "lr": 0.01 * (1 - t) ** 0.9,
        "loss/total": (2.4 - t) * noise[0], "loss/classification": 0.7 * (1.2 - t) * noise[1],
        "loss/entropy": 4.1 * (1 - 0.6 * t) * noise[2], "loss/segmentation": 1.9 * (1.15 - t) * noise[3],
        "loss/s_cam": 0.6 * (1.2 - t) * noise[4], "loss/s_context": 0.4 * (1.2 - t) * noise[5],
        "loss/c_context": 0.3 * (1.2 - t) * noise[6], "images_per_second": 52 * noise[7],
        "feature_norm": 9 + t * noise[8], "message_norm": 4 * t * noise[9], "bank_fill": min(1.0, 3 * t),
        "coverage/cam": 78 + 6 * t * noise[10], "coverage/context": 60 + 30 * t * noise[11],
    }  # fmt: skip


def make_summary() -> dict[str, object]:
    rng = np.random.default_rng(1)
    confusion = rng.integers(0, 400, (7, 7)) + np.diag([90000, 6000, 5000, 5500, 4000, 3000, 0])
    confusion[6] = 0  # a class that val has not
    base = np.array([94, 71, 66, 69, 55, 48, 0])
    shift = {"val": 0, "train_cam": -14, "train_seg": -6, "train_context": 3, "train_merged": 1}
    per_class = {name: [*(base[:6] + delta).tolist(), None] for name, delta in shift.items()}
    return {
        "val/miou": 67.2, "val/miou_context": 70.4, "train/mask_miou_cam": 53.1, "train/mask_miou_seg": 60.9,
        "train/mask_miou_context": 68.4, "train/mask_miou_merged": 66.0, "train/mask_coverage_cam": 84.2,
        "train/mask_coverage_seg": 88.3,
        "train/mask_coverage_context": 91.0, "train/mask_coverage_merged": 77.5, "images_per_second": 51.8,
        "seconds": 252.4, "backend": "reference", "classes": CLASSES, "palette": PALETTE, "per_class": per_class,
        "confusion": confusion.tolist(),
    }  # fmt: skip


def make_reading() -> CellReading:
    """4×6 cells, all alike but for (0, 0), which reads only source 2, and (1, 4), which reads mostly source 1."""
    sources = np.tile([0, 1], (4, 6, 1))
    weights = np.tile([0.6, 0.25], (4, 6, 1))
    sources[0, 0], weights[0, 0] = [2, 0], [1.0, 0.0]
    sources[1, 4], weights[1, 4] = [1, 0], [0.875, 0.1]
    return CellReading(sources, weights)


def make_example(number: int, side: int = 96, *, bank: bool = True) -> Example:
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:side, :side]
    ground = rng.integers(60, 170, 3)
    pixels = np.clip(ground + 25 * np.sin(x / 5 + number)[..., None] + rng.normal(0, 10, (side, side, 3)), 0, 255)
    truth = np.zeros((side, side), dtype=np.uint8)
    for label in (1 + number % 5, 2 + number % 5):
        cy, cx = rng.uniform(25, side - 25, 2)
        radius = rng.uniform(14, 24)
        disk = np.hypot(y - cy, x - cx) < radius
        truth[disk] = label
        pixels[disk] = np.clip(0.7 * np.array(PALETTE[label]) + rng.normal(20, 12, (disk.sum(), 3)), 0, 255)
    pixels = pixels.astype(np.uint8)
    scores = np.exp(-(np.hypot(y - cy, x - cx) ** 2) / 500)
    cam = np.where(scores > 0.6, truth, np.where(scores > 0.3, 255, 0)).astype(np.uint8)
    palette = np.array(PALETTE, dtype=np.uint8)
    panels = {
        "heatmap": heat(pixels, scores),
        "CAM mask": colorize(cam, palette),
        "prediction": overlay(pixels, truth, palette),
        "ground truth": colorize(truth, palette),
    }
    tags = (CLASSES[1 + number % 5], CLASSES[2 + number % 5])
    iou = {"CAM mask": 41.2 + number, "prediction": None if number == 1 else 70.0 - 3 * number}
    return Example(
        f"shapes-{number:04d}", tags, pixels, panels, iou,
        uncertainty=[20.5, 5.25, 31.0][number % 3], reading=make_reading() if bank else None,
    )  # fmt: skip


class Balance(HTMLParser):
    """Every tag that opens closes, in order; collects what the page would load and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster", "action")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(path: Path) -> tuple[str, Balance]:
    page = path.read_text(encoding="utf-8")
    parsed = Balance(page)
    assert parsed.open == []
    return page, parsed


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return read(write_report(make_run(tmp_path_factory.mktemp("report") / "full")))


def test_full_report_shows_every_section(full):
    page, parsed = full
    text = " ".join("".join(parsed.text).split())
    for section in ("scores", "examples", "curves", "classes", "confusion", "configuration"):
        assert f'<section id="{section}">' in page
        assert f'href="#{section}"' in page
    for value in ("67.2", "70.4", "53.1", "60.9", "68.4", "66.0", "covers 84.2 %", "4 min 12 s", "+15.3", "abc123"):
        assert value in text
    assert "15.3 points better than the CAM mask and 7.5 points better than the control" in text
    assert 'aria-label="Notes"' not in page
    assert page.count("<img") == 15
    assert page.count('class="chart"') == 9  # all but the gradient norm, which the run has not
    assert 'class="confusion"' in page


def test_report_loads_nothing(full):
    page, parsed = full
    assert [load for load in parsed.loads if not load.startswith(("#", "data:"))] == []
    assert not re.search(r"https?://|@import|url\(|\bfetch\(|XMLHttp|import\(", page, re.IGNORECASE)


def test_only_the_page_s_own_script_may_run(full):
    page, parsed = full
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in scripts[0]
    assert parsed.tags.count("script") == 2  # and its data


def test_report_escapes_what_it_is_given(full):
    page, parsed = full
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "star &amp; moon" in page
    assert parsed.tags.count("i") == 5  # the scale of the bars: none came with the data
    assert "<b>bold</b>" in "".join(parsed.text)


def gallery_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="gallery-data">(.*?)</script>', page).group(1))


def test_gallery_data_are_what_the_run_stored(full):
    data = gallery_data(full[0])
    names = [entry["name"] for entry in data["classes"]]
    assert names == CLASSES
    assert [example["id"] for example in data["examples"]] == ["shapes-0000", "shapes-0001", "shapes-0002"]
    assert [example["tags"] for example in data["examples"]] == [[1, 2], [2, 3], [3, 4]]
    labels = re.findall(r'<option value="\d+"(?: data-descending)?>([^<]*)</option>', full[0])
    keys = dict(zip(labels, zip(*(example["keys"] for example in data["examples"]), strict=True), strict=True))
    assert keys == {
        "order of the data": (0, 1, 2), "uncertainty": (20.5, 5.25, 31.0), "IoU of the prediction": (70.0, None, 64.0),
        "IoU of the CAM mask": (41.2, 42.2, 43.2), "class": (0, 1, 2),
    }  # fmt: skip
    first = data["examples"][0]["readings"][0]
    assert (first["rows"], first["columns"]) == (4, 6)
    assert first["sources"][:4] == [2, 0, 0, 1]
    assert first["weights"][:4] == [10000, 0, 6000, 2500]
    assert data["sources"] == [[[1, 0, 2], [0, 1, 1], [2, -1, 3]]]  # what was never read is not stored
    assert [image["name"] for image in data["images"]] == ["shapes-0000", "far </script><i>away</i>"]
    assert data["images"][0]["uri"].startswith("data:image/")
    assert data["images"][1]["uri"] is None


@pytest.mark.parametrize("lost", ["readings.json", "keys", "truth"])
def test_examples_of_runs_that_know_less(tmp_path, lost):
    run = make_run(tmp_path / "run", steps=1)
    final = run / "previews" / "final"
    if lost == "readings.json":  # a run without a bank, or an older one
        write_gallery(run, bank=False)
        assert not (final / "readings.json").exists()
    index = json.loads((final / "index.json").read_text())
    for entry in index:
        if lost == "keys":
            del entry["uncertainty"]
        if lost == "truth":
            entry["iou"] = dict.fromkeys(entry["iou"])
    (final / "index.json").write_text(json.dumps(index))
    page, parsed = read(write_report(run))
    assert page.count('<article class="example"') == 3
    assert ("Click into a picture" in "".join(parsed.text)) == (lost != "readings.json")
    assert (">uncertainty</option>" in page) == (lost != "keys")
    assert (">IoU of the prediction</option>" in page) == (lost != "truth")


def test_interrupted_run_is_reported_with_what_it_has(tmp_path):
    run = make_run(tmp_path / "run", steps=7, complete=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/to')  # torn by the interruption
    page, parsed = read(write_report(run))
    text = "".join(parsed.text)
    assert "There is no summary.json" in text
    assert "There are no examples" in text
    assert '<section id="curves">' in page
    for section in ("examples", "classes", "confusion"):
        assert f'id="{section}"' not in page
        assert f'href="#{section}"' not in page


@pytest.mark.parametrize("absent", list(make_summary()))
def test_any_score_may_be_absent(tmp_path, absent):
    run = make_run(tmp_path / "run", steps=2)
    summary = make_summary()
    summary.pop(absent, None)
    (run / "summary.json").write_text(json.dumps(summary))
    read(write_report(run))
    (run / "summary.json").write_text(json.dumps(summary | {absent: None}))
    _, parsed = read(write_report(run))
    if absent == "train/mask_miou_seg":
        text = "".join(parsed.text)
        assert "Not measured: Control." in text
        assert "the control was not measured" in text


def test_lines_without_a_step_count_by_their_place(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").write_text('{"grad_norm": 1.5}\n{"grad_norm": 2.5}\n')
    page = write_report(run).read_text()
    assert "step 0\ngradient norm: 1.500" in page
    assert "step 1\ngradient norm: 2.500" in page


def test_summary_alone_is_enough(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    (run / "metrics.jsonl").unlink()
    _, parsed = read(write_report(run))
    assert "There are no curves" in "".join(parsed.text)


def test_divergence_and_full_supervision_are_said(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss/total": NaN}\n')
    (run / "config.yaml").write_text("method: {supervision: full}\n")
    text = "".join(read(write_report(run))[1].text)
    assert "not finite in 1 logged steps, first in step 2" in text
    assert "the ceiling, not the method" in text


def test_resumed_steps_count_once(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    rows = [{"step": 1, "grad_norm": 1.5}, {"step": 2, "grad_norm": 9.25}, {"step": 2, "grad_norm": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    assert "gradient norm: 2.500" in page
    assert "9.25" not in page


def test_lost_picture_leaves_a_gap(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    (run / "previews/final/001-cam-mask.png").unlink()
    page, _ = read(write_report(run))
    assert page.count("<img") == 14
    assert "file is missing" in page


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no run folder: expected a config\.yaml"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("preset: shapes\n")
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor summary\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", r"summary\.json is not JSON"),
        ("summary.json", "[]", r"must hold a dict, got a list"),
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
        ("metrics.jsonl", '{"step": 1}\noops\n', r"line 2 is not JSON"),
        ("metrics.jsonl", "3\n", r"line 1: expected an object, got int"),
        ("previews/final/000-image.png", "no picture", r"cannot read the picture .*000-image\.png"),
        ("previews/final/readings.json", "{", r"readings\.json is not JSON"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    run = make_run(tmp_path / "run", steps=1)
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(run)


def test_report_needs_no_torch():
    code = "import sys, mcic.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 2400, [0, 500, 1000, 1500, 2000]), (-3, 7, [-2, 0, 2, 4, 6]), (5, 5, [5])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.2345, "1.23"), (-3.2, "−3.20"), (123456, "123,456"), (1e-5, "1e−5"), (2.5e7, "2.5e7"),
     (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


def test_line_chart_skips_gaps_and_averages_neighbours():
    x = np.arange(1000.0)
    values = np.full(1000, np.nan)
    values[500:] = 2.0
    svg = line_chart(x, [Line("a < b", "cam", values)], label="loss", bins=10)
    points = re.search(r'points="([^"]*)"', svg).group(1).split()
    assert len(points) == 5
    assert len({point.split(",")[1] for point in points}) == 1
    assert svg.count("a &lt; b: 2.000") == 5
    assert line_chart(x, [Line("none", "cam", np.full(1000, np.nan))], label="loss") == ""


def test_line_chart_of_one_step_is_a_dot():
    svg = line_chart(np.array([3.0]), [Line("a", "a", np.array([0.0]))], label="loss")
    dot = '<circle r="3" cx="281.0" cy="214.0" fill="var(--a)"/>'
    assert svg.count(dot) == 2  # drawn, and under the pointer
    assert "nan" not in svg.lower()


def test_confusion_is_in_percent_of_the_truth():
    svg = confusion_chart(np.array([[30, 10], [0, 0]]), ["cat", "dog"])
    assert "cat → cat: 75.0 % of the true pixels (30)" in svg
    assert "cat → dog: 25.0 % of the true pixels (10)" in svg
    assert svg.count('class="cell"') == 2


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two finished runs and one that has just begun, side by side."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = [make_run(folder / name / "run") for name in ("a", "b")] + [make_run(folder / "new", complete=False)]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    config["method"]["rules"] = "<authors>"
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    (runs[1] / "summary.json").write_text(json.dumps(make_summary() | {"val/miou": 69.7, "train/mask_miou_cam": 50.0}))
    return read(write_comparison(runs, out=folder / "comparison.html"))


def test_comparison_names_differences(compared):
    page, parsed = compared
    text = " ".join("".join(parsed.text).split())
    assert "a/run" in text
    assert "b/run" in text
    assert "the network of b/run is best with 69.7 mIoU, 2.5 points above a/run" in text
    row = re.search(r'<th scope="row">Network alone</th>(.*?)</tr>', page).group(1)
    assert re.findall(r'class="n( best)?">([^<]*?) ?(?:<small>([^<]*)</small>)?</td>', row) == [
        ("", "67.2", ""), (" best", "69.7", "+2.5"), ("", "–", ""),
    ]  # fmt: skip
    settings = re.search(r'<table class="settings">(.*?)</table>', page, re.DOTALL).group(1)
    assert re.findall(r'<th scope="row">([^<]*)', settings) == ["method.rules"]
    assert "<mark>&lt;authors&gt;</mark>" in settings
    assert "new is unfinished" in text


def test_comparison_of_different_classes_and_nearly_equal_settings_says_so(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    config["train"]["lr"] *= 1 + 1e-6
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    summary = make_summary()
    summary["classes"] = [*summary["classes"][:-1], "another"]
    (runs[1] / "summary.json").write_text(json.dumps(summary))
    page, parsed = read(write_comparison(runs, out=tmp_path / "comparison.html"))
    assert "The runs have different classes" in " ".join("".join(parsed.text).split())
    assert '<th scope="row">train.lr' in page


def test_comparison_lays_curves_over_each_other(compared):
    page, _ = compared
    chart = re.search(r'<svg class="chart"[^>]*aria-label="Loss terms: total">(.*?)</svg>', page, re.DOTALL).group(1)
    assert re.findall(r'<polyline class="curve" stroke="var\(--(run-\d)\)"', chart) == ["run-0", "run-1", "run-2"]
    assert page.count('class="confusion"') == 2
    assert 'id="gallery"' not in page  # no image is in the gallery of all three


def test_comparison_puts_every_value_at_its_step(tmp_path):
    runs = [make_run(tmp_path / name, steps=1) for name in "ab"]
    for run, every in zip(runs, (1, 2), strict=True):
        rows = [{"step": step, "grad_norm": step / 4} for step in range(every, 5, every)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_comparison(runs, out=tmp_path / "comparison.html").read_text()
    titles = [title for title in re.findall("<title>(step [^<]*)", page) if "val" not in title][-4:]
    assert titles == [
        "step 1\na: 0.2500", "step 2\na: 0.5000\nb: 0.5000", "step 3\na: 0.7500", "step 4\na: 1.000\nb: 1.000",
    ]  # fmt: skip


def test_comparison_shares_the_gallery(tmp_path):
    runs = [make_run(tmp_path / name, steps=1) for name in "ab"]
    index = json.loads((runs[1] / "previews/final/index.json").read_text())
    del index[0]["panels"]["heatmap"]
    index[0]["iou"]["prediction"] = 30.0
    index[2]["id"] = "elsewhere"
    (runs[1] / "previews/final/index.json").write_text(json.dumps(index))
    page, _ = read(write_comparison(runs, out=tmp_path / "comparison.html"))
    data = gallery_data(page)
    assert [example["id"] for example in data["examples"]] == ["shapes-0000", "shapes-0001"]
    assert page.count('<div class="row">') == 4
    assert page.count("<img") == 19
    assert len(data["images"]) == 2  # the same in both banks, embedded once
    labels = re.findall(r'<option value="\d+"(?: data-descending)?>([^<]*)</option>', page)
    spread = labels.index("difference between the runs")
    assert [example["keys"][spread] for example in data["examples"]] == [40.0, None]


def test_large_comparisons_show_fewer_examples(tmp_path):
    runs = [make_run(tmp_path / name, steps=1) for name in "abc"]
    for run in runs:
        write_gallery(run, 20, bank=False)
    page, _ = read(write_comparison(runs, out=tmp_path / "comparison.html"))
    chosen = [int(example["id"][-4:]) for example in gallery_data(page)["examples"]]
    assert len(chosen) == 12
    assert (chosen[0], chosen[-1]) == (0, 19)


def test_command_writes_where_it_is_told_and_over_no_other_file(tmp_path, monkeypatch, capsys):
    runs = [str(make_run(tmp_path / name, steps=1)) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    main(runs)
    main([runs[0], "--out", "page.html"])
    main([runs[0], "--out", "page.html"])  # over our own page
    assert capsys.readouterr().out.split() == ["comparison.html", "page.html", "page.html"]
    (tmp_path / "notes.html").write_text("mine")
    for out, message in (
        ("notes.html", "is no report"),
        ("nowhere/page.html", "there is no folder"),
        (".", "no report"),
    ):
        for chosen in (runs, runs[:1]):
            with pytest.raises(ValueError, match=message):
                main([*chosen, "--out", out])
    assert (tmp_path / "notes.html").read_text() == "mine"
    with pytest.raises(ValueError, match="two or more different runs"):
        main([runs[0], runs[0]])
    with pytest.raises(ValueError, match=r"a run's folder|required"):
        main([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "comparison.html", "notes.html", "page.html"]
