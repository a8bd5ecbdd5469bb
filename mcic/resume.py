"""Which folder a run writes to, and what it goes on from. Every rank asks, before any of them writes."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcic import distributed
from mcic.checkpoint import MANIFEST, checkpoints, newest_good
from mcic.config import Config, RunConfig
from mcic.config_io import load_config
from mcic.runfolder import read_document


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        folder: of the run; it is made when training starts, so that a mistake leaves nothing behind.
        named_by_time: nobody named the folder: `claim_folder` makes it.
        checkpoint: to go on from; None: the run begins anew.
        config: as the run stored it that goes on in its own folder, else None.
        summary: of a run that has all its epochs already, else None.
    """

    folder: Path
    named_by_time: bool = False
    checkpoint: Path | None = None
    config: Config | None = None
    summary: dict[str, Any] | None = None


def find_start(config: Config) -> Start:
    """What `run.dir` and `run.resume` come to; fills `run.dir` where it is unset.

    Raises:
        ValueError: the folder holds another run, a later part of this one, or differs between machines; or what it
            holds cannot be read.
    """
    run = config.run
    named_by_time = run.dir is None
    if named_by_time:
        run.dir = distributed.from_first(f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        if run.resume == "auto":
            run.resume = "none"  # whatever is there when training starts, another run made just now
    folder = Path(run.dir)
    source = Path(run.resume) if run.resume not in ("none", "auto") else None
    own = source is not None and source.resolve().parent == (folder / "checkpoints").resolve()
    if not named_by_time or source is not None:
        _check_folder(folder, run, source if own else None)
    summary = _finished_summary(folder, config) if run.resume == "auto" else None
    if summary is not None:
        return Start(folder, summary=summary)
    checkpoint = newest_good(folder / "checkpoints") if run.resume == "auto" else source
    if not distributed.same_everywhere(_identity(checkpoint)):
        raise ValueError(
            f"the checkpoint to go on from, {source or folder}, is not the same on all ranks: a machine cannot "
            "read it, or has another there"
        )
    path = folder / "config.yaml"
    stored = load_config(path) if (own or run.resume == "auto") and path.is_file() else None
    return Start(folder, named_by_time, checkpoint, stored)


def changes(before: Config, now: Config) -> list[str]:
    """The settings of a run that goes on which decide over its numbers and are not as they were, as flags."""
    fields = [
        (group.name, field.name)
        for group in dataclasses.fields(Config)
        if group.name != "run" and dataclasses.is_dataclass(getattr(now, group.name))
        for field in dataclasses.fields(getattr(now, group.name))
        if field.name not in ("workers", "cache")
    ]
    values = ((f"{group}.{name}", *(getattr(getattr(each, group), name) for each in (now, before)))
              for group, name in fields)  # fmt: skip
    return [f"--{name.replace('_', '-')} {new} (was {old})" for name, new, old in values if new != old]


def claim_folder(folder: Path) -> Path:
    """Make the folder whose name is the time, or one beside it: runs may start in the same second."""
    name, number = str(folder), 1
    if distributed.rank() == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
    while distributed.rank() == 0:
        try:
            Path(name).mkdir()
            break
        except FileExistsError:
            number += 1
            name = f"{folder}-{number}"
    return Path(distributed.from_first(name))


def _check_folder(folder: Path, run: RunConfig, own: Path | None) -> None:
    """Refuse to write over a run; `own`: the checkpoint of this folder that `run.resume` names."""
    if run.resume != "auto" and own is None and any(folder.glob("*")):
        raise ValueError(
            f"--run.dir {folder} already holds files: continue that run with --run.resume auto, "
            "or choose another folder"
        )
    saved = checkpoints(folder / "checkpoints") if own is not None else []
    newer = [path.name for path in saved if path.name > own.resolve().name]
    if newer:
        raise ValueError(
            f"--run.resume {own} goes back behind {newer[-1]} of the same run: choose another --run.dir, so "
            "that both ways on stay, or remove the newer checkpoints"
        )
    distributed.barrier()  # every rank has looked before the first one writes
    if run.resume == "auto" and not distributed.same_everywhere(_fingerprint(folder)):
        raise ValueError(
            f"--run.dir {folder} is not the same on all machines: to resume, it must lie on a disk that they share"
        )


def _fingerprint(folder: Path) -> str:
    """What a run that goes on reads first."""
    names = [path.name for path in (*folder.glob("*.json"), *checkpoints(folder / "checkpoints"))]
    config = folder / "config.yaml"
    return "\n".join([*sorted(names), config.read_text(encoding="utf-8") if config.is_file() else ""])


def _identity(checkpoint: Path | None) -> str:
    """Its name and the digests of its files."""
    if checkpoint is None:
        return ""
    manifest = checkpoint / MANIFEST
    return f"{checkpoint.name} {manifest.read_text(encoding='utf-8') if manifest.is_file() else ''}"


def _finished_summary(folder: Path, config: Config) -> dict[str, Any] | None:
    """The summary of the folder's run, if it has all the epochs that are asked for."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary, epochs = read_document(path, dict), config.train.epochs
    if epochs is None:  # the run keeps what it chose
        epochs = load_config(folder / "config.yaml").train.epochs
    return summary if summary.get("epochs", 0) >= epochs else None
