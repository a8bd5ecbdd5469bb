"""A trained network for new images: `mcic.load(folder).predict(image)`.

An image is a path, a Pillow image, a numpy array or a tensor; see `Predictor.predict`. Files have up to 178,956,970
pixels, see `mcic.pictures`; what is in memory already may have any size.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mcic.build import PRECISIONS, choose_device
from mcic.checkpoint import NETWORK, load_network
from mcic.data.images import IMAGENET_MEAN, IMAGENET_STD, read_image, to_rgb
from mcic.data.transforms import BILINEAR, fitted
from mcic.inference import PROTOCOLS, dense_protocol
from mcic.model import SegmentationNetwork
from mcic.pictures import upright
from mcic.segmentation import Segmentation
from mcic.suggest import nearest
from mcic.tiles import resized, tiled_protocol

ImageLike = str | Path | Image.Image | np.ndarray | Tensor

TILE = 1536
"""largest side, pixels, that goes through the network at once"""

BATCH_PIXELS = 2**20
"""images of one size share a batch up to this many pixels, in their files or as the network sees them"""


def load(
    path: str | Path, *, device: str = "auto", precision: str = "fp32", protocol: str = "single", tile: int = TILE,
    long_side: int | None = None,
) -> Predictor:  # fmt: skip
    """The network of a run or of an exported folder, ready for `predict`.

    Args:
        path: a run folder, or one with `network.json` and `network.safetensors`.
        device: auto (the GPU where there is one) | cpu | cuda | cuda:N.
        precision: fp32 | bf16 | fp16, the arithmetic of the network; scores are fp32 in any case.
        protocol: of `mcic.inference.PROTOCOLS`: single | voc and authors (three scales and the mirror image, six
            times the work).
        tile: images with a longer side, pixels, are predicted in overlapping tiles; see `mcic.tiles`.
        long_side: pixels that an image's longer side is brought to before the network sees it; its scores are brought
            back to full size; 0: as it is; None: as in training.

    Raises:
        ValueError: no such folder, no finished network in it, or no such device.
    """
    network, card = read_network(Path(path))
    return Predictor(
        network, classes=card["classes"], palette=np.array(card["palette"], np.uint8), device=device,
        precision=precision, protocol=protocol, tile=tile,
        long_side=card.get("long_side", 0) if long_side is None else long_side,
    )  # fmt: skip


def read_network(path: Path) -> tuple[SegmentationNetwork, dict]:
    """The network of a run folder or an exported one, and its card; raises as `load` does."""
    folder = next((f for f in (path, path / "checkpoints") if (f / f"{NETWORK}.json").is_file()), None)
    if folder is None:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder: expected a run or an exported network")
        unfinished = (path / "config.yaml").is_file()
        reason = "this run has not finished" if unfinished else "expected a run, or a folder that mcic export wrote"
        raise ValueError(f"{path} holds no {NETWORK}.json: {reason}")
    try:
        network, card = load_network(folder)
        classes, colors = len(card["classes"]) + 1, np.array(card["palette"], np.uint8).shape
        long_side = card.get("long_side", 0)
    except (KeyError, TypeError, OverflowError, OSError, SafetensorError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a network that cannot be read: {type(error).__name__}: {error}") from error
    if (classes, *colors) != (card["num_classes"], classes, 3) or not isinstance(long_side, int):
        raise ValueError(
            f"{folder / NETWORK}.json is damaged: expected {card['num_classes']} classes with background, a colour for "
            f"each and long_side in pixels, got {classes} classes, colours {list(colors)} and long_side {long_side!r}"
        )
    return network, card


class Predictor:
    """A network and how it is applied.

    Args:
        network: put into evaluation mode and moved to `device`.
        classes: the L object classes.
        palette: uint8 [L + 1, 3].
        device, precision, protocol, tile, long_side: see `load`.

    Attributes:
        classes: the K names, "background" first.
    """

    def __init__(
        self, network: SegmentationNetwork, *, classes: Sequence[str], palette: np.ndarray, device: str = "auto",
        precision: str = "fp32", protocol: str = "single", tile: int = TILE, long_side: int = 0,
    ) -> None:  # fmt: skip
        for name, value, known in (("precision", precision, PRECISIONS), ("protocol", protocol, PROTOCOLS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if tile < 1 or long_side < 0:
            raise ValueError(f"tile must be 1 pixel or more and long_side 0 or more, got {tile} and {long_side}")
        self.device = choose_device(device)
        self.network = network.to(self.device, memory_format=torch.channels_last).eval()
        self.classes = ("background", *classes)
        self.palette = palette
        self.precision = precision
        self.protocol = protocol
        self.tile = tile
        self.long_side = long_side
        self._mean = torch.tensor(IMAGENET_MEAN, device=self.device).view(3, 1, 1) * 255
        self._std = torch.tensor(IMAGENET_STD, device=self.device).view(3, 1, 1) * 255

    def predict(
        self, image: ImageLike, *, tags: Iterable[str] | None = None, probabilities: bool = False
    ) -> Segmentation:
        """Segment one image.

        Args:
            image: a file (read the way a person sees it, see `mcic.data.images.read_image`), a Pillow image
                (likewise), an array uint8 [H, W, 3] RGB, or a tensor [3, H, W] RGB, uint8 or floating in 0…1.
            tags: names of the classes that may occur beside the background; None: all.
            probabilities: also keep those of all classes, 4·K bytes a pixel.

        Raises:
            ValueError: an image that cannot be read, an array of another shape or type, a class that is not known.
        """
        return self._segment([pixels_of(image)], self.allowed(tags), probabilities)[0]

    def predict_batch(self, images: Iterable[ImageLike], *, tags: Iterable[str] | None = None) -> list[Segmentation]:
        """Segment several images, those of one size together; the results are in the order of the images."""
        allowed = self.allowed(tags)
        pixels = [pixels_of(image) for image in images]
        order = sorted(range(len(pixels)), key=lambda place: pixels[place].shape)
        results = self._stream((pixels[place] for place in order), allowed, BATCH_PIXELS)
        return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]

    def predict_stream(
        self, images: Iterable[ImageLike], *, tags: Iterable[str] | None = None, batch_pixels: int = 0
    ) -> Iterator[Segmentation]:
        """Segment images as they come, in constant memory.

        Args:
            images: any iterable, also one without end.
            tags: as for `predict`, the same for all images.
            batch_pixels: wait for neighbours of the same size until a batch has that many pixels, in their files or as
                the network sees them, for speed on a GPU; 0: answer every image at once.
        """
        return self._stream(map(pixels_of, images), self.allowed(tags), batch_pixels)

    def _stream(self, images: Iterable[np.ndarray], allowed: Tensor, batch_pixels: int) -> Iterator[Segmentation]:
        waiting: list[np.ndarray] = []
        for pixels in images:
            if waiting and pixels.shape != waiting[0].shape:
                yield from self._segment(waiting, allowed)
                waiting = []
            waiting.append(pixels)
            if (len(waiting) + 1) * self._area(pixels) > batch_pixels:
                yield from self._segment(waiting, allowed)
                waiting = []
        if waiting:
            yield from self._segment(waiting, allowed)

    def _area(self, image: np.ndarray) -> int:
        """Pixels of an image in its file or as the network sees it, whichever are more."""
        height, width = image.shape[:2]
        return math.ceil(height * width * max(1.0, self.long_side / max(height, width)) ** 2)

    def allowed(self, tags: Iterable[str] | None) -> Tensor:
        """bool [K] on the device: the classes that `tags` leave; raises ValueError for a class that is not known."""
        names = self.classes if tags is None else (self.classes[0], *([tags] if isinstance(tags, str) else tags))
        for name in names:
            if name not in self.classes:
                known = ", ".join(self.classes[1:])
                raise ValueError(
                    f"the network has no class {name!r}{nearest(name, self.classes) or f': it has {known}'}"
                )
        return torch.tensor([name in names for name in self.classes], device=self.device)

    @torch.inference_mode()
    def _segment(
        self, images: list[np.ndarray], allowed: Tensor, keep_probabilities: bool = False
    ) -> list[Segmentation]:
        """Images uint8 [H, W, 3] of one size."""
        size = images[0].shape[:2]
        masks = np.empty((len(images), *size), np.uint8)
        confidences = np.empty((len(images), *size), np.float32)
        probabilities = np.empty((len(images), len(self.classes), *size), np.float32) if keep_probabilities else None
        try:
            for part, scores in self._scores(images):
                scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)  # [b, K, h, w]
                best, labels = scores.max(1)
                masks[part] = labels.byte().cpu().numpy()
                confidences[part] = (best - scores.logsumexp(1)).exp_().cpu().numpy()
                if probabilities is not None:
                    probabilities[part[0], :, *part[1:]] = scores.softmax(1).cpu().numpy()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # CPU
                raise
            raise ValueError(
                f"the memory of {self.device} does not hold {len(images)} images in pieces of up to {self.tile} pixels "
                "a side: choose a smaller tile or long side"
            ) from error
        kept = [None] * len(images) if probabilities is None else probabilities
        return [Segmentation(mask, confidence, self.classes, self.palette, pixels, values)
                for mask, confidence, pixels, values in zip(masks, confidences, images, kept, strict=True)]  # fmt: skip

    def _scores(self, images: list[np.ndarray]) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
        """Parts that cover the images: (images, rows, columns) and their logits [b, K, h, w]."""
        seen = [fitted(pixels, self.long_side, BILINEAR) for pixels in images]
        if seen[0].shape == images[0].shape:
            yield from self._seen_scores(images)
            return
        small = torch.empty(len(seen), len(self.classes), *seen[0].shape[:2], device=self.device)
        for (batch, rows, columns), scores in self._seen_scores(seen):
            small[batch, :, rows, columns] = scores
        for place, scores in enumerate(small):
            for rows, wide in resized(scores, images[0].shape[:2]):
                yield (slice(place, place + 1), rows, slice(None)), wide[None]

    def _seen_scores(self, images: list[np.ndarray]) -> Iterator[tuple[tuple[slice, slice, slice], Tensor]]:
        """As `_scores`, of images of the size that the network sees."""
        stride = self.network.stride
        if max(images[0].shape[:2]) <= self.tile:
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            yield (slice(None),) * 3, dense_protocol(self._logits, self._prepare(batch), stride, self.protocol)
            return
        for place, pixels in enumerate(images):
            parts = tiled_protocol(
                self._logits, torch.from_numpy(pixels).permute(2, 0, 1), stride, self.protocol, limit=self.tile,
                prepare=lambda piece: self._prepare(piece[None]),
            )  # fmt: skip
            for rows, columns, scores in parts:
                yield (slice(place, place + 1), rows, columns), scores[None]

    def _prepare(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, h, w] → f32, minus ImageNet's mean, divided by its standard deviation, on the device."""
        images = images.to(self.device).float().contiguous(memory_format=torch.channels_last)
        return images.sub_(self._mean).div_(self._std)

    def _logits(self, images: Tensor) -> Tensor:
        dtype = PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return self.network(images).float()


def pixels_of(image: ImageLike) -> np.ndarray:
    """uint8 [H, W, 3] RGB, memory of its own; what may come and what is refused: `Predictor.predict`."""
    if isinstance(image, str | Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # 90 to 179 megapixels: large, but wanted
            return read_image(image)
    if isinstance(image, Image.Image):
        return np.array(to_rgb(upright(image)))
    if isinstance(image, Tensor):
        return _tensor_pixels(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"an image is a path, a Pillow image, an array uint8 [H, W, 3] or a tensor [3, H, W], got {got}"
        )
    return _not_empty(image.copy())


def _tensor_pixels(image: Tensor) -> np.ndarray:
    values = image.detach()
    if values.ndim != 3 or len(values) != 3 or not (values.is_floating_point() or values.dtype == torch.uint8):
        raise ValueError(f"a tensor must be [3, H, W], uint8 or floating, got {values.dtype} {list(values.shape)}")
    if values.is_floating_point():
        if values.numel() and not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("a floating tensor must be RGB in 0…1, not normalised: it has values outside")
        values = (values.float() * 255).round().byte()
    return _not_empty(values.permute(1, 2, 0).contiguous().cpu().numpy().copy())


def _not_empty(pixels: np.ndarray) -> np.ndarray:
    if pixels.size == 0:
        raise ValueError(f"an image has at least one pixel, got {list(pixels.shape)}")
    return pixels
