"""Saliency maps: where an image shows an object of whatever class, rather than background.

`auto` needs no training. An image's border mostly shows background, and background reaches it over small changes of
colour; an object is cut off by its outline (Wei et al., Geodesic Saliency Using Background Priors, ECCV 2012).
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.csgraph import dijkstra
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu

from mcic.data.base import Dataset
from mcic.data.images import read_map
from mcic.suggest import nearest

log = logging.getLogger(__name__)

ALGORITHM = "geodesic-1"
"""names the cache folder: a change of the numbers below or of the arithmetic takes a new name"""

_LONG_SIDE = 112  # pixels of the grid that is searched
_BLUR = 0.7  # grid pixels
_NOISE = 1.0  # Lab units: smaller colour steps cost nothing
_STEP = 0.03  # cost of the way itself, Lab units per grid pixel
_RARE_SHARE, _RARE_FROM, _RARE_COST = 0.25, 2.0, 2.0
_BINS = (12, 10, 10)  # of L, a and b
_COLOUR_WEIGHT = 0.5
_ROUNDING = 1e-12  # relative difference of values that are equal


class SaliencySource(Protocol):
    """Gives the saliency map of an image of a data set."""

    def __call__(self, dataset: Dataset, index: int, image: np.ndarray) -> np.ndarray:
        """f32 [H, W] in 0…1, 1 salient, of `image`, uint8 [H, W, 3]: `dataset.image(index)` at `dataset.long_side`."""

    def check(self, dataset: Dataset) -> None:
        """Raise ValueError where a map that must be given is not there; no map is opened."""


def build_saliency(spec: str, *, cache: str | None) -> SaliencySource | None:
    """The source that `--data.saliency` names.

    Args:
        spec: `auto` (the map that came with the image, else geodesic distance to the border), `none`, or a folder of
            grey maps named by image id.
        cache: folder in which `auto` keeps its maps; the user's cache folder when None.

    Raises:
        ValueError: `spec` is neither a known word nor a folder.
    """
    if spec == "none":
        return None
    if spec == "auto":
        return GeodesicSaliency(Path(cache) if cache else _user_cache())
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        hint = nearest(spec, ("auto", "none"))
        raise ValueError(f"--data.saliency must be auto, none or a folder of maps, got {spec!r}{hint}")
    return DirectorySaliency(folder)


class DirectorySaliency:
    """Maps from `<id>.png` or `<id>.jpg`, grey of 8 or 16 bits, brought to the image's size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, dataset: Dataset, index: int, image: np.ndarray) -> np.ndarray:
        return _scaled(read_map(self._path(dataset.ids[index])), image.shape[:2])

    def check(self, dataset: Dataset) -> None:
        for image_id in dataset.ids:
            self._path(image_id)

    def _path(self, image_id: str) -> Path:
        candidates = [self.folder / f"{image_id}{suffix}" for suffix in (".png", ".jpg")]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            names = " or ".join(path.name for path in candidates)
            raise ValueError(f"--data.saliency {self.folder} lacks image {image_id}: expected {names}")
        return found


class GeodesicSaliency:
    """Computed maps, kept on disk under `cache`, or in memory for images that have no file.

    The key is the image's content, so an edited image gets a new map and equal images share one. A map takes the
    same way through 8 bits whether it was computed or read, so the cache never changes the data.
    """

    def __init__(self, cache: Path) -> None:
        self._memory: dict[str, np.ndarray] = {}
        self._folder: Path | None = cache / ALGORITHM
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            self._give_up(error)

    def __call__(self, dataset: Dataset, index: int, image: np.ndarray) -> np.ndarray:
        given = dataset.saliency(index)
        if given is not None:
            return _scaled(given, image.shape[:2])
        key = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).hexdigest()
        kept = self._on_disk(key, image) if dataset.stored else self._in_memory(key, image)
        return _scaled(kept.astype(np.float32) / 255, image.shape[:2])

    def check(self, dataset: Dataset) -> None:
        """What is not given is computed."""

    def _in_memory(self, key: str, image: np.ndarray) -> np.ndarray:
        if key not in self._memory:
            self._memory[key] = _quantized(image)
        return self._memory[key]

    def _on_disk(self, key: str, image: np.ndarray) -> np.ndarray:
        if self._folder is None:
            return _quantized(image)
        path = self._folder / key[:2] / f"{key}.png"
        kept = _read_kept(path)
        if kept is None:
            kept = _quantized(image)
            try:
                _write_atomically(path, kept)
            except OSError as error:
                self._give_up(error)
        return kept

    def _give_up(self, error: OSError) -> None:
        log.warning("saliency maps are computed anew each time, which is slower: the cache cannot be written (%s); "
                    "--data.cache names another folder", error)  # fmt: skip
        self._folder = None


def geodesic_saliency(image: np.ndarray) -> np.ndarray:
    """f32 [h, w] in 0…1 of uint8 [H, W, 3], the long side reduced to 112 pixels.

    The distance of every pixel to the border, over changes of Lab colour, becomes a score that is 1/2 at Otsu's
    threshold; it is averaged with how salient the pixel's colour is elsewhere in the image, which closes holes.
    """
    lab = rgb2lab(_reduced(image)).astype(np.float32)
    lab = ndimage.gaussian_filter(lab, (_BLUR, _BLUR, 0))
    score = _around_otsu(_border_distance(lab), least=4.0, power=1)
    score = (1 - _COLOUR_WEIGHT) * score + _COLOUR_WEIGHT * _by_colour(lab, score)
    return _around_otsu(score, least=0.25, power=2).astype(np.float32)


def _border_distance(lab: np.ndarray) -> np.ndarray:
    """Length [h, w] of the cheapest way from each pixel of f32 [h, w, 3] to the border, in Lab units."""
    height, width = lab.shape[:2]
    grid = np.arange(height * width).reshape(height, width)
    starts, ends, costs = zip(*(_edges(lab, grid, *step) for step in ((0, 1), (1, 0), (1, 1), (1, -1))), strict=True)
    border = np.unique(np.concatenate([grid[0], grid[-1], grid[:, 0], grid[:, -1]]))
    outside = height * width  # one more node, next to every border pixel
    graph = sparse.csr_matrix(
        (np.concatenate([*costs, _entry_cost(lab.reshape(-1, 3)[border])]),
         (np.concatenate([*starts, np.full(len(border), outside)]), np.concatenate([*ends, border]))),
        shape=(outside + 1, outside + 1),
    )  # fmt: skip
    return dijkstra(graph, directed=False, indices=outside)[:outside].reshape(height, width)


def _edges(lab: np.ndarray, grid: np.ndarray, down: int, right: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of pixels one step apart, and what the step between them costs."""
    height, width = grid.shape
    here = slice(0, height - down), slice(max(0, -right), width - max(0, right))
    there = slice(down, height), slice(max(0, right), width + min(0, right))
    change = np.sqrt(((lab[here] - lab[there]) ** 2).sum(2))
    cost = np.maximum(change - _NOISE, 0) + _STEP * np.hypot(down, right)
    return grid[here].ravel(), grid[there].ravel(), cost.ravel()


def _entry_cost(colours: np.ndarray) -> np.ndarray:
    """What it costs to start at each border pixel, from colours [n, 3]: much where an object touches the border.

    Its colour is then rare along the border: the distance to the nearest quarter of the border's colours stands out.
    """
    products = colours @ colours.T
    squares = products.diagonal()
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0))
    rank = int(_RARE_SHARE * len(colours))
    rarity = np.partition(distances, rank, axis=1)[:, rank]
    return np.maximum(rarity - _RARE_FROM * np.median(rarity), 0) * _RARE_COST + 1e-3  # a stored 0 would be no edge


def _by_colour(lab: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Mean score [h, w] of the pixels whose colour is about the same."""
    unit = lab / (100, 160, 160) + np.array((0, 0.5, 0.5))
    bins = tuple(np.clip(unit[..., i] * n, 0, n - 1).astype(np.intp) for i, n in enumerate(_BINS))
    flat = np.ravel_multi_index(bins, _BINS).ravel()

    def histogram(weights: np.ndarray | None) -> np.ndarray:
        counts = np.bincount(flat, weights, minlength=int(np.prod(_BINS))).reshape(_BINS).astype(np.float64)
        return ndimage.gaussian_filter(counts, 0.5, mode="constant").ravel()

    return (histogram(score.ravel())[flat] / histogram(None)[flat]).reshape(score.shape)


def _around_otsu(values: np.ndarray, *, least: float, power: int) -> np.ndarray:
    """Values from 0 up to 0…1, 1/2 at Otsu's threshold, or at `least` where all values are about the same."""
    same = np.ptp(values) <= _ROUNDING * values.max()  # where all is border, say: no histogram tells them apart
    middle = max(float(values.max() if same else threshold_otsu(values)), least)
    return values**power / (values**power + middle**power)


def _quantized(image: np.ndarray) -> np.ndarray:
    return (geodesic_saliency(image) * 255).round().astype(np.uint8)


def _reduced(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    factor = min(1.0, _LONG_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _scaled(saliency: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """f32 map at [H, W] = `shape`."""
    if saliency.shape == shape:
        return saliency
    resized = Image.fromarray(saliency).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.array(resized).clip(0, 1)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mcic" / "saliency"


def _read_kept(path: Path) -> np.ndarray | None:
    """The cached map, or None where there is none; a damaged one counts as none and is written anew."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("L"))
    except (OSError, SyntaxError, ValueError):
        return None


def _write_atomically(path: Path, kept: np.ndarray) -> None:
    """Write the PNG beside its place and move it there, so that no other process ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(kept).save(file, format="PNG")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
