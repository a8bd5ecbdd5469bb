"""The gallery of a report: examples of one run, or those that several runs share, and what their pixels read.

The template draws the examples; `templates/report.js` sorts and filters them and answers for a pixel, from the JSON
that is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mcic.preview import EXAMPLES
from mcic.report_page import classes_of, data_uri, script_data
from mcic.runfolder import RunFolder, finite

_SIDE = 320  # longest side of an embedded picture, pixels: a gallery of 24 examples stays a few MB
_MOST_ROWS = 36  # of panels, over all runs


@dataclass(frozen=True, slots=True)
class Sort:
    """An order in which the gallery can be shown.

    Attributes:
        label: as the menu calls it.
        keys: one for each example, None where it is not known: those come last.
        descending: whether the largest come first unless asked otherwise.
    """

    label: str
    keys: list[float | None]
    descending: bool = False


@dataclass(frozen=True, slots=True)
class Gallery:
    """What the template shows.

    Attributes:
        examples: {"id", "tags", "rows": [one for each run: {"name", "color", "uncertainty", "readable", "panels"}]}.
        sorts: the orders to choose from; the first is that of the examples.
        classes: names of the classes that any example has.
        colors: CSS colour of every class that is named, by name.
        data: for the script.
    """

    examples: list[dict[str, Any]]
    sorts: list[Sort]
    classes: list[str]
    colors: dict[str, str]
    data: Markup

    @property
    def readable(self) -> bool:
        """Whether any pixel can be asked what it read."""
        return any(row["readable"] for example in self.examples for row in example["rows"])


def build_gallery(runs: Sequence[RunFolder], names: Sequence[str] = ("",), colors: Sequence[str] = ("ink",)) -> Gallery:
    """The examples that all runs have, evenly thinned out where they are too many for one page.

    Args:
        runs: one or more.
        names: of the runs.
        colors: CSS custom property of each run.
    """
    entries = [{entry["id"]: (place, entry) for place, entry in enumerate(run.examples)} for run in runs]
    shared = [key for key in entries[0] if all(key in other for other in entries)]
    count = min(len(shared), max(1, _MOST_ROWS // len(runs)))
    shared = [shared[place] for place in np.linspace(0, len(shared) - 1, count).round().astype(int)]
    found = [[of_run[key] for of_run in entries] for key in shared]  # of every example, of every run: place and entry
    classes, class_color = _classes(runs)
    sorts = _sorts([[entry for _, entry in row] for row in found], names, classes)
    examples, for_script = [], []
    for number, places_and_entries in enumerate(found):
        entry = places_and_entries[0][1]
        tags = entry.get("tags") or []
        readings = [_reading(run, place) for run, (place, _) in zip(runs, places_and_entries, strict=True)]
        rows = [_row(run, entry) for run, (_, entry) in zip(runs, places_and_entries, strict=True)]
        columns = list(dict.fromkeys(panel for row in rows for panel in row["panels"]))
        for row, name, color, reading in zip(rows, names, colors, readings, strict=True):
            row |= {"name": name, "color": color, "readable": reading is not None}
            row["panels"] = [row["panels"].get(column) for column in columns]  # the same below the same
        examples.append({"id": entry["id"], "tags": tags, "rows": rows})
        numbers = [classes.index(tag) for tag in tags]
        keys = [sort.keys[number] for sort in sorts]
        for_script.append({"id": entry["id"], "tags": numbers, "keys": keys, "readings": readings})
    bank = _Bank(classes)
    sources = [bank.sources_of(run) for run in runs]
    known = [{"name": name, "color": class_color[name]} for name in classes]
    data = {"examples": for_script, "sources": sources, "images": bank.images, "classes": known}
    tagged = {tag for example in examples for tag in example["tags"]}
    return Gallery(examples, sorts, [name for name in classes if name in tagged], class_color, script_data(data))


def _classes(runs: Sequence[RunFolder]) -> tuple[list[str], dict[str, str]]:
    """Every class that a run knows, an example has or a bank held, and the colour of each."""
    colors: dict[str, str] = {}
    for run in runs:
        colors |= {entry["name"]: entry["color"] for entry in classes_of(run.summary) if entry["name"] not in colors}
    tags = [tag for run in runs for entry in run.examples for tag in entry.get("tags") or []]
    stored = [source["class"] for run in runs for source in run.readings.get("sources", [])]
    colors |= dict.fromkeys([name for name in (*tags, *stored) if name not in colors], "gray")
    return list(colors), colors


def _sorts(examples: list[list[dict[str, Any]]], names: Sequence[str], classes: Sequence[str]) -> list[Sort]:
    """The orders for which any key is known; `examples` are the entries of every run, for every example."""
    several = len(names) > 1
    scored = dict.fromkeys(name for entries in examples for entry in entries for name in entry.get("iou") or {})
    panels = sorted(scored, key=lambda name: name != "prediction")
    panels = panels[:1] if several else panels  # for several runs, of each the prediction alone
    sorts = [Sort("order of the data", list(range(len(examples))))]
    for run, name in enumerate(names):
        of = f", {name}" if several else ""
        entries = [of_example[run] for of_example in examples]
        sorts.append(Sort(f"uncertainty{of}", [finite(entry, "uncertainty") for entry in entries], descending=True))
        sorts += [Sort(f"IoU of the {panel}{of}", [_iou(entry, panel) for entry in entries]) for panel in panels]
    if several:
        sorts.append(Sort("difference between the runs", [_spread(entries) for entries in examples], descending=True))
    places = [sorted(classes.index(tag) for tag in entries[0].get("tags") or []) for entries in examples]
    sorts.append(Sort("class", [sorted(places).index(place) for place in places]))
    return [option for option in sorts if any(key is not None for key in option.keys)]


def _iou(entry: dict[str, Any], panel: str) -> float | None:
    return finite(entry.get("iou") or {}, panel)


def _spread(entries: list[dict[str, Any]]) -> float | None:
    """How far the IoUs of the runs' predictions lie apart."""
    values = [_iou(entry, "prediction") for entry in entries]
    return None if None in values else max(values) - min(values)


def _row(run: RunFolder, entry: dict[str, Any]) -> dict[str, Any]:
    """The panels of an example by name, as data URIs (None where the file is gone), each with its IoU."""
    scored = entry.get("iou") or {}
    panels = {}
    for name, file in entry["panels"].items():
        uri = data_uri(run.path / EXAMPLES / Path(file).name, _SIDE)
        panels[name] = {"name": name, "uri": uri, "iou": _iou(entry, name), "scored": name in scored}
    return {"uncertainty": finite(entry, "uncertainty"), "panels": panels}


def _reading(run: RunFolder, place: int) -> dict[str, Any] | None:
    readings = run.readings.get("readings", [])
    return readings[place] if place < len(readings) else None


class _Bank:
    """The images in the banks of all runs, each embedded once."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes
        self.images: list[dict[str, str | None]] = []
        self._places: dict[tuple[str, str | None], int] = {}

    def sources_of(self, run: RunFolder) -> list[list[int]]:
        """[class, image or -1, contexts] of every source of a run."""
        thumbnails = run.readings.get("thumbnails", {})
        uris = {name: data_uri(run.path / EXAMPLES / Path(file).name, _SIDE) for name, file in thumbnails.items()}
        return [
            [self.classes.index(source["class"]), self._place(source.get("image"), uris), source["contexts"]]
            for source in run.readings.get("sources", [])
        ]

    def _place(self, name: str | None, uris: dict[str, str | None]) -> int:
        if name is None:
            return -1
        key = (name, uris.get(name))
        if key not in self._places:
            self._places[key] = len(self.images)
            self.images.append({"name": name, "uri": uris.get(name)})
        return self._places[key]
