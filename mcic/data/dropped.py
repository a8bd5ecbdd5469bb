"""What a folder of photographs holds and a run does not use, and the list of it that a run keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcic.durable import write_text
from mcic.pictures import readable_suffixes
from mcic.untrusted import shown

QUARANTINE = "quarantine.json"

DROPPED = {
    "row": "rows without an image",
    "image": "images without a row",
    "folder": "folders with images only in their sub-folders",
    "loose": "images beside the folders of the classes",
    "part": "folders beside those that are read",
    "kind": "files of a kind that is not read",
    "broken": "images that cannot be read",
    "link": "links that are not followed",
    "special": "pipes, sockets and devices",
    "closed": "folders that cannot be opened",
    "mask": "masks that cannot be used",
    "stray": "masks without an image",
    "masks": "folders of masks beside train/, where none are looked for",
    "table": "further tables of tags",
}
"""kinds of what is left out, in words"""

_BAD = {"broken", "link", "special", "closed", "mask"}
"""kinds that are a fault of the file"""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something in the folder that a run does not use.

    Attributes:
        kind: a key of `DROPPED`.
        name: a file, or the image that a row names.
        reason: why, in a few words; "" where the kind says it.
    """

    kind: str
    name: str
    reason: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether it goes to the quarantine list."""
        return self.kind in _BAD

    @property
    def is_bad_image(self) -> bool:
        """Whether it would have been an image."""
        return self.is_bad and self.kind != "mask" and Path(self.name).suffix.lower() in readable_suffixes()


def describe(dropped: Iterable[Dropped]) -> str:
    """What was left out as the middle of a sentence: counts and the first names of every kind; "" if nothing was."""
    parts = []
    entries = list(dropped)
    for kind, words in DROPPED.items():
        names = [shown(Path(entry.name).name if kind != "row" else entry.name)
                 for entry in entries if entry.kind == kind]  # fmt: skip
        if names:
            parts.append(f"{len(names)} {words} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})")
    return " and ".join([", ".join(parts[:-1]), *parts[-1:]] if len(parts) > 1 else parts)


def require_few(dropped: Iterable[Dropped], *, usable: int, share: float) -> None:
    """Raise ValueError where more than `share` (0…1) of the images, `usable` ones and bad ones, are bad."""
    bad = [entry for entry in dropped if entry.is_bad_image]
    total = usable + len(bad)
    if len(bad) > share * total:
        first = ", ".join(f"{shown(Path(entry.name).name)} ({entry.reason})" for entry in bad[:3])
        raise ValueError(
            f"{len(bad)} of {total} images cannot be used, more than the {share:.0%} of --data.max-bad-share "
            f"{share:g}: {first}{', …' if len(bad) > 3 else ''}; mcic doctor lists all of them"
        )


def write_quarantine(folder: Path, dropped: Sequence[Dropped]) -> None:
    """Write `quarantine.json`, a list of {"file", "kind", "reason"}, into a run's folder; the files stay as they are.

    Where nothing is bad there is no list, nor one of an earlier part of the run. Bytes of a name that are not UTF-8
    are surrogates in it, as Python's `os.fsencode` turns them back.
    """
    path = folder / QUARANTINE
    entries = [{"file": entry.name, "kind": entry.kind, "reason": entry.reason} for entry in dropped if entry.is_bad]
    if entries:
        write_text(path, json.dumps(entries, indent=1) + "\n")
    else:
        path.unlink(missing_ok=True)
