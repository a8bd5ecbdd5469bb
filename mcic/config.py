"""The configuration: nested dataclasses, one field per choice, checked when built.

A field that is `None` follows something else, which its docstring names; `Config.resolved()` puts the value in
its place, so what a run stores in `config.yaml` leaves nothing to guess. Components receive the fields they need,
never the whole tree.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

Rules = Literal["paper", "authors"]
MaskName = Literal["cam", "context", "merged"]


def _require(ok: bool, flag: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"--{flag} must be {expected}, got {got!r}")


def _at_home(path: str | None) -> str | None:
    """A path whose ~ the shell left as it is, as it does behind `--flag=`."""
    return path if path is None else os.path.expanduser(path)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which images, tags and saliency maps."""

    name: Literal["shapes", "voc12", "coco14", "folder"] = "shapes"
    """kind of data set (docs: README, "Your own photographs")"""
    root: str | None = None
    """folder of the data set; `shapes` needs none. `folder`: also tars that webdataset wrote (README)"""
    val_root: str | None = None
    """tars to validate on, as root; unset: val/ beside train/, else a share of the tars"""
    saliency: str = "auto"
    """auto (geodesic distance to the image border) | none (background from the heatmap) | folder of <id>.png or .jpg"""
    masks: str | None = None
    """folder that `mcic masks` wrote: the targets of --method.supervision masks"""
    calibration: str | None = None
    """run or file of `mcic calibrate`: what it chose replaces that setting of the method"""
    long_side: int | None = 0
    """pixels that the longer side of every image is brought to when read; 0: as it is; unset: from the data"""
    val_share: float = 0.2
    """share of the images held out where the data set names no val split, 0…1"""
    max_bad_share: float = 0.1
    """`folder`: share of the images, 0…1, that may be unusable (RUN/quarantine.json); more, and training is refused"""
    follow_links: bool = False
    """links may lead out of data.root"""
    train_images: int | None = None
    """use only that many training images; all when unset (`shapes`: how many to make, 1200)"""
    val_images: int | None = None
    """use only that many validation images; all when unset (`shapes`: how many to make, 200)"""
    workers: int | None = None
    """loader processes; unset: 0 for `shapes`, else up to 8, leaving one core free"""
    cache: str | None = None
    """folder for computed saliency maps and for fetched tars; unset: the user's cache folder"""
    shard_cache: float = 20.0
    """GiB of the disk that tars fetched from commands and URLs may take"""

    def __post_init__(self) -> None:
        self.masks, self.calibration = _at_home(self.masks), _at_home(self.calibration)
        self.cache = _at_home(self.cache)
        _require(0 < self.val_share < 1, "data.val-share", "between 0 and 1", self.val_share)
        _require(0 <= self.max_bad_share <= 1, "data.max-bad-share", "0…1", self.max_bad_share)
        _require(self.workers is None or self.workers >= 0, "data.workers", "0 or more", self.workers)
        _require(0 < self.shard_cache < math.inf, "data.shard-cache", "positive", self.shard_cache)
        _require(self.long_side is None or self.long_side >= 0, "data.long-side", "0 or more", self.long_side)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network."""

    backbone: Literal["tiny", "vgg16", "resnet50", "resnet101", "efficientnet_lite0"] = "tiny"
    """feature extractor"""
    weights: str = "none"
    """initial weights of the backbone: imagenet | none | path of a .pth or .safetensors file"""
    output_stride: int | None = None
    """image pixels per feature pixel; unset: the backbone's own (tiny 4, efficientnet_lite0 16, others 8)"""
    segmentation_head: Literal["linear", "lfov", "aspp"] = "lfov"
    """linear: one 1×1 convolution | lfov: DeepLab large field of view | aspp: four dilations, summed"""
    classification_head: Literal["linear", "deep"] | None = None
    """linear: 1×1 convolution (paper) | deep: fc6–fc8 as convolutions or one 3×3 (authors); unset: as method.rules"""


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """The method (docs/method.md). Fields that are unset follow `rules`, so that each can be ablated alone."""

    rules: Rules = "paper"
    """rule set: the paper's, or that of its published code"""
    context: Literal["bank", "self", "none"] = "bank"
    """bank: the method | self: M' from s, no bank (the control) | none: CAM masks only"""
    supervision: Literal["tags", "full", "masks"] = "tags"
    """tags: image labels | full: ground truth | masks: data.masks"""
    masks: tuple[MaskName, ...] = ("cam", "context", "merged")
    """which of M, M', M'' supervise the segmentation head (E14)"""
    cam_threshold: float = 0.1
    """T_a: masks ignore pixels whose best score is below (E3)"""
    pool_threshold: float = 0.5
    """T_b: only pixels of this confidence enter a context, 0…1 (E5)"""
    mask_upsampling: int = 1
    """steps of the masks' grid for one of the features'"""
    refinement: Literal["none", "pamr"] = "none"
    """masks follow the image's edges in training (mcic.refine)"""
    background_power: float = 1.0
    """α of the background row (1 - saliency)^α, or (1 - max h̃)^α"""
    slots: int = 64
    """S: contexts kept per class (E6)"""
    bank_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """number format of the stored contexts"""
    heads: int = 1
    """attention heads (E7)"""
    temperature: float | None = None
    """τ of the attention (E7); unset: √(D / heads)"""
    attention_threshold: float = 0.0
    """θ: entries below θ times the uniform weight are not read"""
    dropout: float = 0.1
    """dropout of the output embedding O (E10)"""
    message_gain: float = 1.0
    """first gain of O's layer norm; below 1, f̃ starts near f"""
    self_read: bool = True
    """an image's contexts enter the bank before it reads; off: afterwards"""
    stop_gradient: bool = True
    """the context branch trains neither backbone nor head (E16)"""
    pixel_bank: bool = False
    """store every confident pixel, not one context per image and class"""
    ema_momentum: float | None = None
    """contexts come from a moving average of the network with this momentum, e.g. 0.999; unset: from the network"""
    context_head: Literal["segmentation", "classification"] = "segmentation"
    """M' from the segmentation head on f̃, or from the classification head's heatmap of f̃ (E11)"""
    segmentation_weight: float = 1.0
    """factor of the segmentation losses in E14"""
    ramp_epochs: float = 5.0
    """I: epochs until λ is 1 (E15)"""
    ramp_power: int | None = None
    """power of the ramp (E15): paper 1, authors 2"""
    cam_floor: float | None = None
    """CAM-mask terms are scaled by max(1-λ, floor): paper 1 (never scaled), authors 0.6"""
    entropy_weight: float | None = None
    """factor of the entropy term (E8): paper 1, authors 0"""
    merge_rule: Rules | None = None
    """object against background in M'': paper ignore, authors object (E12)"""
    confidence_rule: Rules | None = None
    """context weights: paper softmax, authors relu over the spatial maximum (E5)"""
    classification_rule: Rules | None = None
    """E1: paper mean over classes, authors also over the tags"""
    cam_background: Rules | None = None
    """CAM background row: paper 1 - saliency, authors 1 where saliency < T_a, else 0"""
    context_background: Rules | None = None
    """context-mask background row: paper softmax, authors mixed with 1 - saliency"""
    saliency_weight: float = 0.5
    """w of the authors' context-mask background row"""
    padding_rule: Rules | None = None
    """pixels a crop padded: paper ignored everywhere, authors salient"""

    def __post_init__(self) -> None:
        _require(len(set(self.masks)) == len(self.masks), "method.masks", "each named once", self.masks)
        for name in ("cam_threshold", "pool_threshold", "saliency_weight"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"method.{name.replace('_', '-')}", "between 0 and 1", value)
        for name in ("slots", "heads", "mask_upsampling"):
            _require(getattr(self, name) >= 1, f"method.{name.replace('_', '-')}", "1 or more", getattr(self, name))
        for name in ("background_power", "segmentation_weight", "ramp_epochs", "entropy_weight"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < math.inf, f"method.{name.replace('_', '-')}", "0 or more", value)
        _require(self.ramp_power is None or self.ramp_power >= 1, "method.ramp-power", "1 or more", self.ramp_power)
        _require(self.cam_floor is None or 0 <= self.cam_floor <= 1, "method.cam-floor", "0 to 1", self.cam_floor)
        _require(self.attention_threshold >= 0, "method.attention-threshold", "0 or more", self.attention_threshold)
        _require(self.temperature is None or self.temperature > 0, "method.temperature", "positive", self.temperature)
        _require(0 < self.message_gain < math.inf, "method.message-gain", "positive", self.message_gain)
        _require(0 <= self.dropout < 1, "method.dropout", "from 0 to below 1", self.dropout)
        _require(
            self.ema_momentum is None or 0 <= self.ema_momentum < 1,
            "method.ema-momentum", "from 0 to below 1", self.ema_momentum,
        )  # fmt: skip
        _require(len(self.masks) > 0, "method.masks", "one or more of cam, context, merged", self.masks)

    def resolved(self) -> MethodConfig:
        """A copy in which every unset rule has the value of its rule set; `masks` names those that are made."""
        authors = self.rules == "authors"
        defaults: dict[str, Any] = {
            "ramp_power": 2 if authors else 1,
            "cam_floor": 0.6 if authors else 1.0,
            "entropy_weight": 0.0 if authors else 1.0,
        }
        rows = ("merge_rule", "confidence_rule", "classification_rule", "cam_background", "context_background",
                "padding_rule")  # fmt: skip
        defaults |= dict.fromkeys(rows, self.rules)
        filled = _fill(self, defaults)
        return dataclasses.replace(filled, masks=("cam",)) if self.context == "none" else filled


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Optimisation and augmentation."""

    epochs: int | None = 20
    """passes over the training images; unset: from their number"""
    batch_size: int | None = 16
    """images per update, over all ranks and accumulation steps; unset: what fits the memory, at most 16"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd, as the paper | adamw: one learning rate fits backbones, heads and propagation of any scale"""
    accumulate: int = 1
    """micro-batches per update; losses are normalised per micro-batch"""
    lr: float = 1e-3
    """learning rate of the pretrained layers"""
    new_layer_lr: float = 10.0
    """factor, no rate: layers that start from scratch learn at it times lr"""
    momentum: float = 0.9
    """momentum; of adamw β₁"""
    weight_decay: float = 5e-4
    """L2 penalty; of adamw decoupled"""
    lr_schedule: Literal["step", "epoch"] | None = None
    """when the poly schedule moves; unset: step (paper), epoch (authors)"""
    lr_power: float = 0.9
    """power of the poly schedule"""
    warmup_steps: int = 0
    """updates over which the learning rate grows linearly from 0"""
    clip_grad: float | None = None
    """largest norm of the gradient; unset: no clipping"""
    max_nonfinite: int = 10
    """updates in a row whose gradient may be not finite (they are skipped) before the run ends"""
    size: int | None = 321
    """side of the square training crop, pixels: a multiple of the output stride plus 1; unset: from the images"""
    scale: tuple[float, float] = (0.5, 1.5)
    """range of the random scale"""
    flip: bool = True
    """flip half of the images horizontally"""
    color_jitter: float = 0.0
    """strength of random brightness, contrast and saturation, 0…1"""
    precision: Literal["fp32", "bf16", "fp16"] | None = "fp32"
    """arithmetic of the forward pass; weights and the bank stay fp32; unset: bf16 where a GPU has it"""
    compile: bool = False
    """torch.compile the backbone"""
    cuda_graph: bool = False
    """record the update as a CUDA graph: one launch a step (one GPU; fp32 or bf16)"""
    deterministic: bool = False
    """refuse operations without a deterministic form"""
    seed: int = 0
    """seed of weights, data order, augmentation and dropout"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "size", "max_nonfinite"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name.replace('_', '-')}", "1 or more", value)
        for name in ("lr", "new_layer_lr", "lr_power"):
            value = getattr(self, name)
            _require(0 < value < math.inf, f"train.{name.replace('_', '-')}", "positive", value)
        for name in ("momentum", "weight_decay", "warmup_steps", "seed", "color_jitter"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"train.{name.replace('_', '-')}", "0 or more", value)
        in_order = 0 < self.scale[0] <= self.scale[1] < math.inf
        _require(in_order, "train.scale", "two positive numbers, the lower first", self.scale)
        _require(self.momentum < 1, "train.momentum", "below 1", self.momentum)
        _require(self.color_jitter <= 1, "train.color-jitter", "0…1", self.color_jitter)
        _require(self.seed < 2**63, "train.seed", "below 2⁶³", self.seed)
        _require(self.clip_grad is None or self.clip_grad > 0, "train.clip-grad", "positive", self.clip_grad)
        _require(
            self.batch_size is None or self.batch_size % self.accumulate == 0,
            "train.batch-size", f"a multiple of --train.accumulate {self.accumulate}", self.batch_size,
        )  # fmt: skip


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation."""

    protocol: Literal["single", "voc", "authors"] = "single"
    """single: one scale | voc: 0.75/1/1.25 and flip | authors: those, mean of mean and maximum"""
    every: int = 0
    """evaluate on val every that many epochs; 0: at the end only"""
    mask_images: int = 400
    """training images on which the masks that the run trains are measured at the end; 0: none"""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "eval.every", "0 or more", self.every)
        _require(self.mask_images >= 0, "eval.mask-images", "0 or more", self.mask_images)


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where and how a run is kept."""

    dir: str | None = None
    """run folder; unset: runs/<preset>-<time>"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N"""
    backend: Literal["auto", "reference", "triton", "native"] = "auto"
    """who computes the hot path; the environment's MCIC_BACKEND is the default of auto"""
    resume: str = "none"
    """none | auto (continue what is in run.dir) | path of a checkpoint, of another run into an empty run.dir"""
    init_from: str | None = None
    """start from the weights of this checkpoint or exported network, of the same classes; new optimizer and bank"""
    keep: int = 2
    """newest checkpoints kept, 2 or more; the best on val stays too"""
    checkpoint_every: int = 0
    """updates between checkpoints within an epoch; 0: at the end of every epoch only"""
    log_every: int = 1
    """steps between lines of metrics.jsonl"""
    rank_timeout: float = 600.0
    """seconds that a process may let the others wait before the run ends and names it"""
    previews: int = 4
    """training images drawn each epoch; 0: none"""
    tensorboard: bool = True
    """write tensorboard/"""
    report: bool = True
    """write report.html"""

    def __post_init__(self) -> None:
        _require(self.keep >= 2, "run.keep", "2 or more", self.keep)
        _require(self.checkpoint_every >= 0, "run.checkpoint-every", "0 or more", self.checkpoint_every)
        _require(self.previews >= 0, "run.previews", "0 or more", self.previews)
        _require(self.log_every >= 1, "run.log-every", "1 or more", self.log_every)
        _require(0 < self.rank_timeout <= 1e9, "run.rank-timeout", "positive, at most 1e9", self.rank_timeout)
        self.dir, self.init_from = _at_home(self.dir), _at_home(self.init_from)
        self.resume = os.path.expanduser(self.resume)


@dataclass(kw_only=True, slots=True)
class Config:
    """Train a segmentation network from image tags."""

    preset: str = "shapes"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def resolved(self) -> Config:
        """A copy in which no field is left to follow another one; a run may write into its `run`."""
        authors = self.method.rules == "authors"
        return dataclasses.replace(
            self,
            model=_fill(self.model, {"classification_head": "deep" if authors else "linear"}),
            method=self.method.resolved(),
            train=_fill(self.train, {"lr_schedule": "epoch" if authors else "step"}),
            run=dataclasses.replace(self.run),
        )


def _fill(config: Any, defaults: dict[str, Any]) -> Any:
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)
