"""Pages of runs whose names are markup: whatever they are called, the page shows it and nothing else happens."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from mcic.config_io import load_config
from mcic.measures import MASKS, NETWORK
from mcic.preview import CellReading, Example, Source, write_examples
from mcic.report import write_report
from mcic.report_comparison import write_comparison

NASTY = (
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "</style><b>", '" onload="alert(3)', "' x='",
    "&lt;i&amp;", "<!--", "]]>", "{{ 7 * 7 }}", "{% raw %}", "\\u003c/script>", "</svg></title><i>",
    "\u202e\u2028\u2029", "half \udce9 letter",
)  # fmt: skip
"""and a lone half of a letter, as names of files that are not UTF-8 have"""


class Page(HTMLParser):
    """Every start tag with its attributes, and the text by the tag that it stands in."""

    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        in_script = self.lasttag == "script" and self.cdata_elem == "script"
        (self.scripts if in_script else self.text).append(data)


def make_run(folder: Path, names: tuple[str, ...]) -> Path:
    """A run all of whose names are `names`."""
    folder.mkdir(parents=True)
    first, last = names[0], names[-1]
    config = {"preset": first, "data": {"name": "folder", "root": first, last: last}, first: {first: list(names)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "env.json").write_text(json.dumps({name: name for name in names}))
    rows = [{"step": step, "epoch": 0, "loss/total": 2.0 - step, "lr": 0.1, first: first} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {measure.per_class: [50.0] * len(names) for measure in (NETWORK, *MASKS)}
    summary = {measure.key: 50.0 for measure in (NETWORK, *MASKS)}
    summary |= {"classes": names, "palette": [[9, 9, 9]] * len(names), "per_class": scores, "backend": first,
                first: last, "confusion": np.ones((len(names),) * 2, int).tolist(), "protocol": last}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    pixels = np.zeros((8, 8, 3), np.uint8)
    reading = CellReading(np.zeros((1, 1, len(names)), int) + np.arange(len(names)), np.full((1, 1, len(names)), 0.05))
    text = [name for name in names if name.isprintable() or "\u2028" in name]  # what training writes is UTF-8
    examples = [Example(name, (name,), pixels, {name: pixels}, {name: 50.0}, 5.0, reading) for name in text]
    sources = [Source(name, name, 1) for name in text]
    write_examples(folder, examples, sources=(sources * 2)[: len(names)], thumbnails={text[0]: pixels})
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The tags and attributes of pages whose names need no escaping."""
    return pages(tmp_path_factory.mktemp("plain"), tuple(f"name {place}" for place in range(len(NASTY))))


def pages(root: Path, names: tuple[str, ...], titles: tuple[str, str] = ("one", "two")) -> list[Page]:
    runs = [make_run(root / title, names) for title in titles]
    files = [write_report(runs[0]), write_comparison(runs, out=root / "comparison.html")]
    return [Page(file.read_text(encoding="utf-8")) for file in files]


def test_names_that_are_markup_are_text(tmp_path, plain):
    titles = ("<script>alert(4)<", '" onclick="alert(5)')
    for page, other in zip(pages(tmp_path, NASTY, titles), plain, strict=True):
        assert skeleton(page) == skeleton(other)
        text = " ".join(page.text)
        for name in (*NASTY[:-1], titles[0]):
            assert " ".join(name.split()) in " ".join(text.split()), name
        assert "half ? letter" in text
        own, data = sorted(page.scripts, key=lambda script: script.startswith("{"))
        assert own == next(script for script in other.scripts if not script.startswith("{"))
        shown = json.loads(data)
        assert {entry["name"] for entry in shown["classes"]} == {name.replace("\udce9", "?") for name in NASTY}
        assert not re.search(r"<(/script|!--)", data, re.IGNORECASE)


def skeleton(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    """Tags and the names of their attributes, but for those of which there is one for every name that is printable."""
    return sorted({(tag, tuple(attributes)) for tag, attributes in page.tags})


def test_yaml_that_would_fill_the_memory_is_refused(tmp_path):
    """Each line ten times the one before: printing it would take longer than anyone has."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{new}: &a{new} [{', '.join([f'*a{new - 1}'] * 10)}]" for new in range(1, 12)]
    run = make_run(tmp_path / "run", ("cat",))
    (run / "config.yaml").write_text("\n".join(lines))
    for read in (load_config, lambda path: write_report(path.parent)):
        with pytest.raises(ValueError, match=r"config.yaml is not YAML: aliases are not allowed"):
            read(run / "config.yaml")
