"""Hold out scenes of training photographs: `python -m bench.scenes ROOT OUT --held 2 7 12 13`.

For choosing settings without val, where val shows scenes that training does not. Images whose borders have like colours
are taken for one scene, and whole scenes are held out. ROOT has `images/`, `tags.csv` and `masks/`, and `classes.txt`
in it or beside it; OUT becomes a folder with `train/` and `val/`, all copies. Without `--held` the scenes are listed.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.cluster import hierarchy

from mcic.cli import run
from mcic.data.images import read_image
from mcic.durable import new_folder

SIDE, BORDER, LEVELS = 112, 16, 8
"""images are brought to SIDE pixels; of a border so wide, colours of so many levels a channel are counted"""


def scenes_of(images: Sequence[np.ndarray], *, number: int) -> np.ndarray:
    """The scene of each image: average linkage of the roots of their borders' colour histograms.

    Args:
        images: uint8 [H, W, 3] each.
        number: of scenes at most.

    Returns:
        int [len(images)], 1…number.
    """
    roots = np.sqrt(np.stack([_histogram(image) for image in images]))
    return hierarchy.fcluster(hierarchy.linkage(roots, "average"), number, "maxclust")


def hold_out(root: Path, out: Path, held: Sequence[int], scenes: dict[str, int]) -> dict[str, int]:
    """Copy the images of the scenes `held` to `out/val`, the others to `out/train`; the number of images of both.

    Args:
        root: see the module.
        out: must not be there.
        held: scenes.
        scenes: of every image, by file name.

    Raises:
        ValueError: `out` is there, or a part would be empty.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: choose another folder")
    text = (root / "tags.csv").read_text(encoding="utf-8-sig")
    rows = {row["image"]: row["tags"] for row in csv.DictReader(io.StringIO(text))}
    parts = {
        "val": [n for n in sorted(scenes) if scenes[n] in held],
        "train": [n for n in sorted(scenes) if scenes[n] not in held],
    }
    if not all(parts.values()):
        raise ValueError(
            f"--held must leave images on both sides, got {', '.join(map(str, held))}: without it the scenes are listed"
        )
    classes = next((path for path in (root / "classes.txt", root.parent / "classes.txt") if path.is_file()), None)
    if classes is None:
        raise ValueError(f"{root} has no classes.txt, in it or beside it: line i names mask value i")
    with new_folder(out) as folder:
        shutil.copy(classes, folder / "classes.txt")
        for part, names in parts.items():
            for kind in ("images", "masks"):
                (folder / part / kind).mkdir(parents=True)
            table = io.StringIO()
            writer = csv.writer(table, lineterminator="\n")
            writer.writerow(("image", "tags"))
            for name in names:
                shutil.copy(root / "images" / name, folder / part / "images" / name)
                mask = f"{Path(name).stem}.png"
                shutil.copy(root / "masks" / mask, folder / part / "masks" / mask)
                writer.writerow((name, rows[name]))
            (folder / part / "tags.csv").write_text(table.getvalue(), encoding="utf-8")
    return {part: len(names) for part, names in parts.items()}


def _histogram(image: np.ndarray) -> np.ndarray:
    small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE))).astype(int)
    outside = np.ones((SIDE, SIDE), bool)
    outside[BORDER:-BORDER, BORDER:-BORDER] = False
    levels = small[outside] * LEVELS // 256
    counts = np.bincount(levels @ np.array([LEVELS**2, LEVELS, 1]), minlength=LEVELS**3)
    return counts / counts.sum()


def main(argv: list[str]) -> int:
    """List the scenes, or hold some out."""
    made = argparse.ArgumentParser(prog="python -m bench.scenes", description=__doc__.split("\n")[0])
    made.add_argument("root", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--held", type=int, nargs="+", help="scenes that become val")
    made.add_argument("--number", type=int, default=20, help="of scenes at most")
    options = made.parse_args(argv)
    files = sorted((options.root / "images").iterdir())
    numbers = scenes_of([read_image(path) for path in files], number=options.number)
    scenes = {path.name: int(scene) for path, scene in zip(files, numbers, strict=True)}
    if options.held is None:
        for scene in range(1, int(numbers.max()) + 1):
            names = [name for name in scenes if scenes[name] == scene]
            print(f"{scene:3}  {len(names):4} images  {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
        return 0
    counts = hold_out(options.root, options.out, options.held, scenes)
    print(f"{options.out}: {counts['train']} images to train, {counts['val']} held out")
    return 0


if __name__ == "__main__":
    sys.exit(run("python -m bench.scenes", main, sys.argv[1:]))
