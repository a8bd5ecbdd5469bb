"""A trained network for other people's programs: weights, a `torch.export` program, an ONNX model and a model card.

    network.safetensors, network.json   for mcic; the JSON also states the contract of the other two and their checks
    network.pt2                         torch.export: runs where PyTorch is, without mcic
    network.onnx                        runs where ONNX Runtime is, without PyTorch
    README.md                           the model card

Program and model take RGB in 0…1 of any size and give logits and mask at that size: normalisation, padding and
enlarging are inside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcic.card import model_card, training_facts
from mcic.checkpoint import NETWORK, load_network, save_network
from mcic.config_io import load_config
from mcic.data import build_data
from mcic.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from mcic.data.transforms import BILINEAR, fitted
from mcic.inference import dense, pad_to_grid, to_pixels
from mcic.model import SegmentationNetwork
from mcic.predict import pixels_of, read_network

log = logging.getLogger(__name__)

FORMATS = ("safetensors", "torch", "onnx")
FILES = {"safetensors": f"{NETWORK}.safetensors", "torch": f"{NETWORK}.pt2", "onnx": f"{NETWORK}.onnx"}
DESCRIPTION, CARD = f"{NETWORK}.json", "README.md"
_TARGETS = (*FILES.values(), DESCRIPTION, CARD)

MAX_DIFFERENCE = 1e-3
"""a file is refused where a logit is off by more than this share of the largest logit (of 1 where that is smaller)"""

MIN_EQUAL = 99.9
"""… or where less than this percentage of the pixels has the same class"""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_NUM_IMAGES = 6

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images f32 [B, 3, H, W] in 0…1 → logits f32 [B, K, H, W], mask uint8 [B, H, W]"""


@dataclass(frozen=True, slots=True)
class Check:
    """How a written file compares with the network in memory.

    Attributes:
        format: one of `FORMATS`.
        file: its name.
        mebibytes: its size.
        max_difference: largest absolute difference of a logit.
        largest_logit: largest magnitude of a logit, for comparison.
        equal_labels: percent of the pixels whose class is the same.
        images: on how many images this was measured.
    """

    format: str
    file: str
    mebibytes: float
    max_difference: float
    largest_logit: float
    equal_labels: float
    images: int


class DeployedNetwork(nn.Module):
    """A network with all that comes before and after it: the graph of the exported files."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """RGB f32 [B, 3, H, W] in 0…1, H and W at least 2 → logits f32 [B, K, H, W] and mask uint8 [B, H, W]."""
        padded = pad_to_grid((images - self.mean) / self.std, self.network.stride)
        size = tuple(padded.shape[-2:])
        logits = to_pixels(self.network(padded), self.network.stride, size)
        # Negative padding, not a slice: of a slice the exporter must know whether it leaves all as it is, and would
        # fix that for good.
        logits = F.pad(logits, (0, images.shape[-1] - size[1], 0, images.shape[-2] - size[0]))
        return logits, logits.argmax(1).to(torch.uint8)


def export_network(
    model: Path, out: Path, *, formats: Sequence[str] | None = None, images: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> list[Check]:  # fmt: skip
    """Write the network of a run in several formats, each compared with the network in memory, and a model card.

    Args:
        model: a run folder, or one with `network.json` and `network.safetensors`.
        out: made if need be; it gets files only if all of them are written and pass.
        formats: of `FORMATS`, safetensors always; None: all that can be written here.
        images: files to compare on; none: images of the run's val split.
        overwrite: replace an earlier export, all of its files.

    Returns:
        One check per format.

    Raises:
        ValueError: no network at `model`, no images to compare on, packages that are missing, files at `out` that
            exist or (with `overwrite`) are of no export, or a file whose scores are off by more than `MAX_DIFFERENCE`
            or whose classes by more than `MIN_EQUAL` allows.
    """
    formats = _formats(formats)
    _check_target(out, overwrite=overwrite)
    network, card = read_network(model)
    config, summary = training_facts(model)
    batches = check_batches(model, images, card)
    out = Path(os.path.realpath(out))  # the files go to where a link leads
    staging = out / ".partial" if out.exists() else out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        checks = _write(staging, network, card, formats, batches)
        card = _describe(staging, checks)
        (staging / CARD).write_text(model_card(card, config=config, summary=summary), encoding="utf-8")
        if out.exists():
            for name in _TARGETS:
                if (staging / name).exists():
                    os.replace(staging / name, out / name)
                else:
                    (out / name).unlink(missing_ok=True)  # of the earlier export
        else:
            os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return checks


def _check_target(out: Path, *, overwrite: bool) -> None:
    """Raise ValueError where `out` is no folder, or holds files that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, and {out} is a file")
    existing = [name for name in _TARGETS if (out / name).exists()]
    if existing and not overwrite:
        raise ValueError(f"{out} has {', '.join(existing)} already: choose another folder for --out, or --overwrite")
    if existing and not _is_export(out):
        raise ValueError(
            f"{out} has {', '.join(existing)}, but no {DESCRIPTION} that says they are an earlier export: choose "
            "another folder for --out, or remove them yourself"
        )


def _is_export(folder: Path) -> bool:
    try:
        description = json.loads((folder / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(description, dict) and description.get("format") == "mcic-network"


def _formats(formats: Sequence[str] | None) -> list[str]:
    """The formats in the order of `FORMATS`."""
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    needed = f"the ONNX format needs {', '.join(missing)}: pip install {' '.join(missing)}"
    if formats is None and missing:
        log.info("left out: %s", needed)
        return ["safetensors", "torch"]
    chosen = {"safetensors", *(FORMATS if formats is None else formats)}
    if unknown := chosen - set(FORMATS):
        raise ValueError(f"a format must be one of {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}")
    if "onnx" in chosen and missing:
        raise ValueError(needed)
    return [name for name in FORMATS if name in chosen]


def check_batches(model: Path, images: Sequence[str | Path], card: dict[str, Any]) -> list[np.ndarray]:
    """uint8 [B, H, W, 3] each: the images as the network sees them, then a piece of odd size, alone and twice."""
    if images:
        pixels = [pixels_of(path) for path in images]
    elif (model / "config.yaml").is_file():
        try:
            val = build_data(load_config(model / "config.yaml").data).val
        except ValueError as error:
            raise ValueError(f"no val split to compare on, give images with --images: {error}") from error
        val.subset(_NUM_IMAGES)
        pixels = [val.image(index) for index in range(len(val))]
    else:
        raise ValueError(f"{model} is no run, so it has no images to compare on: give some with --images")
    pixels = [fitted(image, card.get("long_side") or min(1024, max(image.shape[:2])), BILINEAR) for image in pixels]
    height, width = pixels[0].shape[:2]
    piece = pixels[0][: max(2, height // 2 + 1), : max(2, width * 2 // 3)]
    return [image[None] for image in pixels] + [piece[None], np.stack([piece, piece[:, ::-1]])]


@torch.no_grad()
def _write(
    folder: Path, network: SegmentationNetwork, card: dict[str, Any], formats: list[str], batches: list[np.ndarray]
) -> list[Check]:
    """Write the formats and compare each, as read back from its file, with the network."""
    save_network(
        folder, network, classes=card["classes"], palette=card["palette"], long_side=card.get("long_side", 0),
        ground_truth_used=bool(card.get("ground_truth_used")),
    )  # fmt: skip
    shutil.copymode(folder / DESCRIPTION, folder / FILES["safetensors"])  # safetensors makes files for the owner only
    program = _program(network) if len(formats) > 1 else None
    checks = []
    for name in formats:
        path = folder / FILES[name]
        log.info("%s: writing and comparing", path.name)
        if name == "torch":
            torch.export.save(program, path, extra_files={DESCRIPTION: _text(folder / DESCRIPTION)})
        elif name == "onnx":
            _save_onnx(program, path, card)
        checks.append(compare(network, _READERS[name](path), batches, name=name, path=path))
    return checks


@torch.no_grad()
def compare(network: SegmentationNetwork, run: Run, batches: list[np.ndarray], *, name: str, path: Path) -> Check:
    """Compare `run` with what `mcic predict` computes; raises ValueError beyond `MAX_DIFFERENCE` and `MIN_EQUAL`."""
    difference, largest, equal, count = 0.0, 0.0, 0, 0
    for batch in batches:
        logits, mask = run(torch.from_numpy(batch.transpose(0, 3, 1, 2).astype(np.float32) / 255))
        expected = dense(network, torch.stack([normalize(image) for image in batch]), network.stride)
        off = (logits - expected).abs().nan_to_num(torch.inf)  # max() would pass over a NaN
        difference = max(difference, off.max().item())
        largest = max(largest, expected.abs().max().item())
        equal += int((mask == expected.argmax(1)).sum())
        count += mask.numel()
    check = Check(name, path.name, round(path.stat().st_size / 2**20, 2), difference, largest,
                  100 * equal / count, sum(map(len, batches)))  # fmt: skip
    if difference > MAX_DIFFERENCE * max(1.0, largest) or check.equal_labels < MIN_EQUAL:
        raise ValueError(
            f"{check.file} does not give what the network gives: logits up to {largest:.3g} differ by up to "
            f"{difference:.3g}, {check.equal_labels:.2f} % of the labels are equal; nothing was written"
        )
    return check


def _program(network: SegmentationNetwork) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.rand(2, 3, 5 * network.stride + 6, 7 * network.stride + 3)  # neither side on the grid
    deployed = DeployedNetwork(network).eval().requires_grad_(False)
    return torch.export.export(deployed, (example,), dynamic_shapes={"images": {0: dynamic, 2: dynamic, 3: dynamic}})


def _save_onnx(program: torch.export.ExportedProgram, path: Path, card: dict[str, Any]) -> None:
    import onnx

    with _quiet():
        written = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                                    output_names=["logits", "mask"])  # fmt: skip
    model = written.model_proto
    shape = model.graph.input[0].type.tensor_type.shape.dim
    names = {shape[place].dim_param: name for place, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*model.graph.input, *model.graph.output):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param in names:
                side.dim_param = names[side.dim_param]
    facts = {"classes": ["background", *card["classes"]], "palette": card["palette"],
             "long_side": card.get("long_side", 0)}  # fmt: skip
    onnx.helper.set_model_props(model, {name: json.dumps(fact, ensure_ascii=False) for name, fact in facts.items()})
    model.doc_string = "images: RGB f32 [batch, 3, height, width] in 0…1; mask: class of every pixel; logits before it"
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it would also know."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _read_weights(path: Path) -> Run:
    return DeployedNetwork(load_network(path.parent)[0])


def _read_program(path: Path) -> Run:
    return torch.export.load(path).module()


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, mask = session.run(["logits", "mask"], {"images": images.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(mask)

    return run


_READERS: dict[str, Callable[[Path], Run]] = {
    "safetensors": _read_weights, "torch": _read_program, "onnx": _read_onnx,
}  # fmt: skip


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _describe(folder: Path, checks: list[Check]) -> dict[str, Any]:
    """Add the contract and the checks to `network.json`; returns its content."""
    path = folder / DESCRIPTION
    card = json.loads(_text(path))
    card["contract"] = {
        "input": {"name": "images", "type": "float32", "shape": ["batch", 3, "height", "width"], "colour": "RGB",
                  "range": [0, 1], "sides": "2 or more"},
        "outputs": {"logits": {"type": "float32", "shape": ["batch", card["num_classes"], "height", "width"]},
                    "mask": {"type": "uint8", "shape": ["batch", "height", "width"], "values": "0 background, then "
                             "the classes in their order"}},
        "inside": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "stride": card["output_stride"],
                   "padding": "after normalisation with 0 at the right and below, to a multiple of the stride plus 1",
                   "enlarging": "bilinear with aligned corners, then cut to the image"},
        "outside": f"the longer side of an image is brought to {card['long_side']} pixels first"
                   if card["long_side"] else "nothing",
    }  # fmt: skip
    card["checks"] = [asdict(check) for check in checks]
    path.write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")
    return card
