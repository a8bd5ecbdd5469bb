"""What each part of the method brings: `python -m bench.ablation [--data shapes|ROOT] [-- flags for every row]`.

A grid of rows × seeds, each cell in a process of its own; stopped or killed, the same command goes on. The baseline is
the preset with the flags after `--`, and every row (`--list`) changes one thing of it. Run folders are kept in
runs/ablation/NAME/<row>/<seed>; CSV, table and plots of all cells that are finished go to bench/results/ablation/NAME.
With `--select`, for choosing settings, no validation image is read.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image

from bench.ablation_grid import ROOT, Cell, Grid, Machine, Runner
from bench.ablation_results import Table, lost, read_cell, write
from bench.ablation_rows import GROUPS, Row, chosen, flag, rows, value_of
from mcic.build import choose_device
from mcic.cli import run
from mcic.config import DataConfig
from mcic.data import SHAPES_TRAIN, SHAPES_VAL, build_data
from mcic.data.shapes import Shapes
from mcic.defaults import SETTLED, settle
from mcic.durable import new_folder, write_text
from mcic.segmentation import save_image, save_mask


def parser() -> argparse.ArgumentParser:
    """The command line, without what follows `--`."""
    made = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=__doc__.split("\n")[0],
        epilog="Flags of train.py after -- change the baseline, and so every row: -- --train.epochs 6",
    )  # fmt: skip
    made.add_argument("--data", default="shapes", metavar="shapes|ROOT", help="data set; default: the embedded one")
    made.add_argument("--preset", help="default: shapes, or folder for a ROOT")
    made.add_argument(
        "--select", action="store_true", help="train on one part of train, measure on another; not on val"
    )
    made.add_argument("--saliency", type=Path, metavar="DIR", help="given saliency maps: a row more")
    made.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these, and what they need")
    made.add_argument("--group", nargs="+", default=[], metavar="GROUP", help=f"only of these: {', '.join(GROUPS)}")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    made.add_argument("--jobs", type=int, help="processes at a time; default: one a GPU, or what fits cores and memory")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="results; default: bench/results/ablation/NAME of the data"
    )
    made.add_argument("--runs", type=Path, metavar="DIR", help="run folders; default: runs/ablation/ and --out's name")
    made.add_argument("--redo", action="store_true", help="make cells anew that were made with other settings")
    made.add_argument("--keep-checkpoints", action="store_true", help="also of runs that no row needs")
    made.add_argument("--list", action="store_true", help="show the rows, and run nothing")
    made.add_argument(
        "--table-only", action="store_true", help="write the results of what is finished, and run nothing"
    )
    return made


def main(argv: list[str]) -> int:
    """Run the cells that are missing, write the results; 1 where a cell failed."""
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    options = parser().parse_args(own)
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {options.jobs}")
    name = _data_name(options.data) + "-select" * options.select
    options.out = (options.out or ROOT / "bench" / "results" / "ablation" / name).resolve()
    options.runs = (options.runs or ROOT / "runs" / "ablation" / options.out.name).resolve()
    options.preset = options.preset or ("shapes" if options.data == "shapes" else "folder")
    every = rows(saliency=options.saliency and options.saliency.resolve())
    wanted = chosen(every, names=options.rows, groups=options.group)
    flags = _flags(options, flags)
    grid = Grid.of(options.preset, flags, rows=every, runs=options.runs)
    if options.list:
        _list(grid, wanted)
        return 0
    if options.table_only:
        _keep_results(options, grid.stored())
        _write(grid, options, argv)
        return 0
    with _locked(options.runs) as lock:
        _prepare(options)
        flags += _settled(grid)
        grid = Grid.of(options.preset, flags, rows=every, runs=options.runs)
        cells = grid.cells(wanted, options.seeds)
        _check(grid, cells, redo=options.redo)
        _keep_results(options, [*grid.stored(), *cells])
        missing = sum(not grid.is_finished(cell) for cell in cells)
        machine = Machine.fit(grid.baseline.run.device, jobs=options.jobs, cells=missing)
        print(f"{missing} of {len(cells)} cells to make, {machine.jobs} at a time → {options.runs}", flush=True)
        runner = Runner(grid, machine, lock, keep=options.keep_checkpoints)
        try:
            failures = runner.run(cells)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on from there", flush=True)
            raise
        finally:
            _write(grid, options, argv)
    for cell, reason in failures.items():
        print(f"failed: {cell}: {reason}", file=sys.stderr)
    return int(bool(failures))


def _data_name(data: str) -> str:
    """Of results and runs."""
    if data != "shapes" and not Path(data).is_dir():
        raise ValueError(f"--data must be shapes or a folder, got {data}")
    return data if data == "shapes" else Path(data).resolve().name


def _flags(options: argparse.Namespace, further: Sequence[str]) -> list[str]:
    """Those that name the data, and `further` ones."""
    if options.data != "shapes":
        root = Path(options.data).resolve()
        return [*flag("data.root", root / "train" if options.select else root), *further]
    if options.select:
        return [*flag("data.name", "folder"), *flag("data.root", options.runs / "data"), *further]
    return list(further)


def _prepare(options: argparse.Namespace) -> None:
    """With `--select`, see to it that a part of the training images can take the place of val.

    A folder's `train/`, read as a data set of its own, has no val split, so that a fifth of it is held out. Of
    `shapes`, images that come after the training images in the same stream are drawn, and both written as files.

    Raises:
        ValueError: the data cannot be parted in this way.
    """
    if not options.select:
        return
    if options.data == "shapes":
        if not (options.runs / "data").is_dir():
            write_shapes(options.runs / "data", train=SHAPES_TRAIN, held_out=SHAPES_VAL)
        return
    root = Path(options.data)
    if options.preset != "folder" or not (root / "train").is_dir():
        raise ValueError(f"--select needs photographs with train/ apart from val/, got {root}, preset {options.preset}")
    names = root / "classes.txt"
    if names.is_file() and not (root / "train" / "classes.txt").is_file():
        listed = tuple(line.strip() for line in names.read_text(encoding="utf-8-sig").split("\n") if line.strip())
        found = build_data(DataConfig(name="folder", root=str(root / "train"))).train.classes
        if listed != found:
            raise ValueError(f"--select reads {root / 'train'} alone, where the order of the classes would be another "
                             f"than in {names}: copy that file into train/")  # fmt: skip


def write_shapes(folder: Path, *, train: int, held_out: int) -> None:
    """The first images of the training stream of `shapes` as `train/`, those that follow them as `val/`."""
    drawn = Shapes("train", count=train + held_out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as partial:
        write_text(partial / "classes.txt", "\n".join(drawn.classes) + "\n")
        for part, places in (("train", range(train)), ("val", range(train, len(drawn)))):
            table = ["image,tags"]
            for place in places:
                name = f"{drawn.ids[place]}.png"
                save_image(Image.fromarray(drawn.image(place)), partial / part / "images" / name, format="PNG")
                save_mask(drawn.mask(place), drawn.palette, partial / part / "masks" / name)
                tags = (tag for tag, there in zip(drawn.classes, drawn.tags[place], strict=True) if there)
                table.append(f"{name},{'|'.join(tags)}")
            write_text(partial / part / "tags.csv", "\n".join(table) + "\n")


def _settled(grid: Grid) -> list[str]:
    """Flags for what the baseline leaves to data and machine: chosen once, so that it is the same in every cell.

    A baseline of other flags chooses anew; what it chooses otherwise, `_check` finds in the cells that are there.
    """
    config = grid.baseline.resolved()
    unset = [name for name in SETTLED if value_of(config, name) is None]
    if not unset:
        return []
    path = grid.runs / "settled.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("flags") != list(grid.flags):
        settled = settle(config, build_data(config.data).train, choose_device(config.run.device))
        kept = {"flags": grid.flags, "values": {name: value_of(settled, name) for name in unset}}
        write_text(path, json.dumps(kept, indent=1))
    return [word for name in unset for word in flag(name, kept["values"][name])]


def _check(grid: Grid, cells: Sequence[Cell], *, redo: bool) -> None:
    """Cells that were made with other settings are refused, or with `redo` removed."""
    for cell in cells:
        complaint = grid.complaint(cell)
        if complaint and not redo:
            raise ValueError(f"{grid.folder(grid.origin(cell))} was made with {complaint}: --redo makes such cells "
                             "anew, another --out keeps both")  # fmt: skip
        if complaint:
            grid.discard(cell)


@contextmanager
def _locked(runs: Path) -> Iterator[IO]:
    """The folder of a grid is worked on by one command at a time, and by what a killed one left running."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{runs} is being worked on: wait for that command, or choose another --out") from None
        yield file


def _keep_results(options: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Raise ValueError where `--out` holds results of other cells than there will be: they may be all that is left."""
    if gone := lost(options.out, ((cell.row.name, cell.seed) for cell in cells)):
        raise ValueError(f"{options.out} holds results of cells that are neither in {options.runs} nor to be made "
                         f"({len(gone)}, {gone[0]} the first): another --out keeps both, else remove them")  # fmt: skip


def _write(grid: Grid, options: argparse.Namespace, argv: Sequence[str]) -> None:
    """The results of all cells that are finished, unless --out holds those of more."""
    stored = grid.stored()
    if not stored:
        print(f"No cell is finished in {options.runs}: no results written", flush=True)
        return
    if lost(options.out, ((cell.row.name, cell.seed) for cell in stored)):
        print(f"{options.out} keeps its results, of more cells than the {len(stored)} that are finished", flush=True)
        return
    cells = [read_cell(cell.row, cell.seed, grid.folder(cell)) for cell in stored]
    data = options.data if options.data == "shapes" else Path(options.data).resolve().name
    measured = f"a held-out part of the training images of {data}" if options.select else data
    title = f"Ablation: {options.out.name}, preset {options.preset}, measured on {measured}"
    command = shlex.join(["python", "-m", "bench.ablation", *map(_without_place, argv)])
    write(Table(cells, grid.rows, grid.same), options.out, title=title, command=command, runs=grid.runs)
    print(f"Results of {len(cells)} cells: {options.out}", flush=True)


def _without_place(word: str) -> str:
    """A path of this machine's by its name alone."""
    return Path(word).name if word.startswith("/") else word


def _list(grid: Grid, wanted: Sequence[Row]) -> None:
    for row in wanted:
        same = f"  [here: {grid.same[row.name]}]" if row.name in grid.same else ""
        print(f"{row.group or '–':<13} {row.name:<24} {row.about}{same}  {' '.join(row.flags)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as Ctrl-C does
    sys.exit(run("python -m bench.ablation", main, sys.argv[1:]))
