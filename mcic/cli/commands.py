"""The commands of `mcic`. Each has a module of its name in this folder, with `main(argv)`, loaded when it runs.

A module there imports what it runs when it runs: help and errors of a command line need no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

COMMANDS = {
    "train": ("[PRESET] [--group.field VALUE …]", "train, evaluate and report: as python train.py"),
    "doctor": ("DIR [--json FILE|-]", "examine a folder of photographs: what a run would use, drop and cost"),
    "evaluate": ("RUN", "score a run's network on a split of its data"),
    "calibrate": ("RUN [--masks DIR]", "choose how much the CAM mask gives to objects, without masks or with a few"),
    "masks": ("RUN", "masks of the training images, from their tags, refined"),
    "retrain": ("RUN [--group.field VALUE …]", "train a plain network on the masks of mcic masks RUN"),
    "predict": ("MODEL IMAGES… --out DIR", "masks, pictures and class areas of new images"),
    "export": ("RUN --out DIR", "the network as safetensors, torch.export and ONNX, with a model card"),
    "report": ("RUN [RUN …] [--out FILE]", "the page of a run, or one page that compares several"),
}
"""name → (what it takes, what it does)"""

Command = Callable[[list[str]], int | None]


def load(name: str) -> Command:
    """The command: called with the words behind its name, it returns an exit status or None for 0."""
    return import_module(f"mcic.cli.{name}").main


def usage() -> str:
    """The page of `mcic --help`."""
    lines = [f"  {f'{name} {takes}':<40} {does}" for name, (takes, does) in COMMANDS.items()]
    head = ["usage: mcic COMMAND …", "", "Semantic segmentation networks from images and image-level tags.", ""]
    foot = ["", "mcic COMMAND --help says more. MCIC_DEBUG=1 shows the traceback of an error."]
    return "\n".join([*head, "commands", *lines, *foot])
