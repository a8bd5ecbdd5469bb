"""What a step costs against ranks, classes, slots and image size, and a check of it: `python -m bench scaling`.

Counted is the context branch, on each rank: the gather of contexts from all ranks, their push into the bank, and the
attention that reads it, with its projections; beside them what the segmentation logits take, which grow with the
classes too. The counts are exact for the data that cross memory or the network at least once; `docs/scaling.md`
explains them. The check runs these parts on the CPU: processes of one torchrun, and sizes side by side in one process.
`python -m bench scaling tables` only writes the tables of the page anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import counts, documents
from bench.counts import Cost

PAGE = documents.ROOT / "docs" / "scaling.md"
RESULT = documents.RESULTS / "scaling-cpu.json"
INDEX_BYTES = 4 + 8
"""of a row's label and image id"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of a step; the defaults are those of `voc12-resnet101` on one rank.

    Attributes:
        ranks: R. images: per rank. size: side of the crop, pixels. stride: image pixels per feature pixel.
        channels: D. classes: L, without background. slots: S. tags: per image. rows_skipped: whether only the classes
            that the batch reads are projected (CPU), or all of them (GPU).
        entry: bytes of an element of the bank. element: of an activation. parameters: of all that is trained.
    """

    ranks: int = 1
    images: int = 16
    size: int = 321
    stride: int = 8
    channels: int = 2048
    classes: int = 20
    slots: int = 64
    tags: int = 2
    entry: int = 4
    element: int = 2
    parameters: int = 60_773_672
    rows_skipped: bool = False

    @property
    def rows(self) -> int:
        """K, with background."""
        return self.classes + 1

    @property
    def grid(self) -> int:
        """N, feature pixels of an image."""
        return ((self.size - 1) // self.stride + 1) ** 2

    @property
    def own(self) -> int:
        """Classes that an image reads: its tags and background."""
        return min(self.rows, self.tags + 1)

    @property
    def read_classes(self) -> int:
        """Classes that some image of a rank reads, at most."""
        return min(self.rows, 1 + self.images * self.tags)

    @property
    def projects_pixels(self) -> bool:
        """Whether the pixels are projected because the bank has more rows; see `mcic.model.propagation`."""
        return self.projectable > self.images * self.grid

    @property
    def projectable(self) -> int:
        """Rows of the bank that would be projected."""
        return self.slots * (self.read_classes if self.rows_skipped else self.rows)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one step on each rank; operations are multiplications and additions, two for each pair.

    Attributes:
        gather_received: bytes from the other ranks. gather_useful: of them, rows of classes that an image has.
        gradients_received: bytes of the sum of gradients (a ring), for comparison. gather_memory: bytes of all rows.
        push: bytes read and written. turnover: share of background's slots that a step replaces, at most 1.
        bank: bytes of the bank with its ids. projections: of bank or pixels, and of the output. read: projections and
            attention, forward only.
        attention: forward, and backward with the gradient that is wanted. attention_memory: bytes of the attention in
            `element`s, if all its weights are kept. logits: bytes of s and s̃ in `element`s.
    """

    gather_received: int
    gather_useful: int
    gather_memory: int
    gradients_received: int
    push: int
    turnover: float
    bank: int
    projections: Cost
    read: Cost
    attention: Cost
    attention_memory: int
    logits: int


def costs(setting: Setting) -> Costs:
    """The counts of one step; the bank is full, every pair of image and own class yields a context."""
    s = setting
    row = 4 * s.channels + INDEX_BYTES  # contexts travel in fp32
    batch, pixels = s.ranks * s.images, s.images * s.grid
    of_background, of_class = batch, batch * (s.own - 1) / max(1, s.classes)  # tags that are spread evenly
    stored = min(s.slots, of_background) + s.classes * min(s.slots, of_class)
    size = counts.AttentionSize(
        pixels=pixels, per_image=s.grid, channels=s.channels, out=s.channels, bank_rows=s.rows * s.slots,
        rows=s.read_classes * s.slots, readable=s.images * s.own * s.slots, element=s.element,
    )  # fmt: skip
    return Costs(
        gather_received=(s.ranks - 1) * s.images * s.rows * row,
        gather_useful=(s.ranks - 1) * s.images * s.own * row,
        gather_memory=batch * s.rows * row,
        gradients_received=2 * 4 * s.parameters * (s.ranks - 1) // s.ranks,
        push=round(stored * (s.channels * (4 + s.entry) + 2 * 8)) + 4 * batch * s.rows,
        turnover=min(1.0, batch / s.slots),
        bank=s.rows * s.slots * (s.channels * s.entry + 8) + 8 * s.rows,
        projections=_projections(s, size),
        read=_projections(s, size, backward=False) + counts.attention_forward(size),
        attention=counts.attention_forward(size) + _backward(s, size),
        attention_memory=s.element * s.grid * size.readable,
        logits=2 * s.element * pixels * s.rows,
    )


def _projections(s: Setting, size: counts.AttentionSize, *, backward: bool = True) -> Cost:
    """Four products forward, of the bank's rows or of the pixels; the gradients take six, or seven of the pixels."""
    projected = dataclasses.replace(size, rows=min(s.projectable, size.pixels))
    entry = s.element if s.projects_pixels else s.entry
    forward = counts.projections_forward(projected, entry=entry)
    if not backward:
        return forward
    seventh = Cost(0, s.projects_pixels * 2 * projected.rows * s.channels**2)
    return forward + counts.projections_backward(projected, entry=entry) + seventh


def _backward(s: Setting, size: counts.AttentionSize) -> Cost:
    """Gradients of keys and values; where the pixels are projected, of the query instead."""
    if not s.projects_pixels:
        return counts.attention_backward(size, query_gradient=False)
    width = size.channels + size.out
    read = size.element * (size.pixels * width + size.rows * width) + 4 * size.pixels
    return Cost(read + size.element * size.pixels * size.channels, 2 * size.per_image * size.readable * width)


# The tables of docs/scaling.md.

BASE = Setting()
SWEEPS: dict[str, tuple[str, Iterable[Setting]]] = {
    "ranks": ("ranks", [Setting(ranks=r) for r in (1, 2, 4, 8, 16, 64, 256, 1024)]),
    "classes": ("classes", [Setting(ranks=8, classes=c) for c in (20, 80, 254, 1000, 3000, 10_000)]),
    "slots": ("slots", [Setting(ranks=8, slots=n) for n in (8, 32, 64, 256, 1024, 4096)]),
    "size": ("size", [Setting(ranks=8, size=n) for n in (321, 417, 513, 769, 1025)]),
}
COLUMNS: dict[str, Callable[[Costs], str]] = {
    "gather": lambda c: size_of(c.gather_received),
    "of which useful": lambda c: size_of(c.gather_useful),
    "gradients": lambda c: size_of(c.gradients_received),
    "push": lambda c: size_of(c.push),
    "turnover": lambda c: f"{100 * c.turnover:.0f} %",
    "bank": lambda c: size_of(c.bank),
    "projections": lambda c: operations_of(c.projections),
    "attention": lambda c: operations_of(c.attention),
    "bytes of it": lambda c: size_of(c.attention.bytes),
    "attention weights": lambda c: size_of(c.attention_memory),
    "logits": lambda c: size_of(c.logits),
}


def size_of(value: float) -> str:
    """Bytes with three digits and a unit."""
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def operations_of(cost: Cost) -> str:
    return f"{cost.operations / 1e9:.3g} G"


def tables() -> str:
    """All sweeps in Markdown."""
    parts = []
    for name, (field, settings) in SWEEPS.items():
        head = f"| {name} | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}"
        rows = [
            f"| {getattr(s, field)} | {' | '.join(show(costs(s)) for show in COLUMNS.values())} |" for s in settings
        ]
        parts.append("\n".join([f"Against **{name}**:", "", head, *rows, ""]))
    return "\n".join(parts)


def measured(result: dict[str, Any]) -> str:
    """What the check found, in Markdown."""
    facts = result["facts"]
    lines = [
        f"`{facts['command']}`, {facts['cpu']}, {facts['cores']} cores, {facts['platform']}, torch {facts['torch']}, "
        f"commit {str(facts['commit'])[:7]}{'-dirty' if 'dirty' in str(facts['commit']) else ''}:", "",
        "| part | against | sizes | predicted | CPU time of a rank | wall clock |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        ratios = (" : ".join(f"{value:.3g}" for value in row[key]) for key in ("predicted", "cpu", "wall"))
        cells = [" : ".join(map(str, row["sizes"])), *ratios]
        lines.append(f"| {row['part']} | {row['against']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_page(result: Path = RESULT) -> None:
    """Write the tables, and the check if it was made, into docs/scaling.md."""
    text = tables()
    if result.is_file():
        text += "\n" + measured(json.loads(result.read_text(encoding="utf-8")))
    documents.insert(PAGE, text, title="# What a step costs as it grows\n")


def main() -> None:
    """Measure, unless only the tables are wanted, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench scaling", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=("all", "tables"), default="all")
    if parser.parse_args().what == "all":
        from bench import scaling_check

        RESULT.write_text(json.dumps(scaling_check.run(), indent=1) + "\n", encoding="utf-8")
    write_page()
    print(measured(json.loads(RESULT.read_text(encoding="utf-8"))) if RESULT.is_file() else tables())


if __name__ == "__main__":
    main()
