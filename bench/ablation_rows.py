"""The rows of the ablation: what each changes of the baseline, which is a preset with the flags for every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mcic.config import Config
from mcic.defaults import fill_unset
from mcic.suggest import nearest

BASELINE = "baseline"

GROUPS = {
    "memory": "What the memory brings",
    "attention": "How the memory is read",
    "bank": "What the memory holds",
    "masks": "How the masks are made",
    "losses": "How the losses are weighted",
    "rules": "The paper's rules and those of its published code",
    "second-stage": "Refined masks, and a plain network trained on them",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: a run like the baseline but for `changes`, or a command on what another row left.

    Attributes:
        name: also of its folder.
        group: of `GROUPS`; the baseline is in none.
        about: what it is, in a few words.
        changes: `group.field` of the configuration → value.
        kind: run: a training run | masks: `mcic masks` | retrain: `mcic retrain`.
        needs: of masks the row whose run they are made from, of retrain the row of the masks.
        refine: of masks, the refinement.
    """

    name: str
    group: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kind: Literal["run", "masks", "retrain"] = "run"
    needs: str | None = None
    refine: str | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """`changes` as the command line of `train.py` has them; of masks, those of `mcic masks`."""
        if self.refine is not None:
            return ("--refine", self.refine)
        return tuple(word for name, value in self.changes.items() for word in flag(name, value))


def flag(name: str, value: Any) -> tuple[str, ...]:
    """The words that set the field `group.field` on a command line."""
    section, field_name = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        return (f"--{section}.{'' if value else 'no-'}{field_name}",)
    return (f"--{section}.{field_name}", *map(str, value if isinstance(value, tuple) else (value,)))


def _sweep(group: str, name: str, field_name: str, values: Iterable[Any], about: str) -> Iterator[Row]:
    """A row for every value, the baseline's among them, since that is another one for each preset."""
    for value in values:
        text = "none" if value is None else value
        yield Row(name=f"{name}-{text}", group=group, about=f"{about} {text}", changes={field_name: value})


def _either(group: str, field_name: str, on: tuple[str, str], off: tuple[str, str]) -> Iterator[Row]:
    """The rows (name, about) of a field that is on or off."""
    for (name, about), value in ((on, True), (off, False)):
        yield Row(name=name, group=group, about=about, changes={field_name: value})


_RULES: dict[str, tuple[str, Any, Any, str]] = {
    "ramp-power": ("method.ramp_power", 1, 2, "power of λ"),
    "cam-floor": ("method.cam_floor", 1.0, 0.6, "least factor of the CAM mask's losses"),
    "entropy-weight": ("method.entropy_weight", 1.0, 0.0, "factor of the entropy"),
    "merge": ("method.merge_rule", "paper", "authors", "object against background in M''"),
    "confidence": ("method.confidence_rule", "paper", "authors", "weights of a context"),
    "classification": ("method.classification_rule", "paper", "authors", "normalisation of the classification loss"),
    "cam-background": ("method.cam_background", "paper", "authors", "background row of M"),
    "context-background": ("method.context_background", "paper", "authors", "background row of M'"),
    "padding": ("method.padding_rule", "paper", "authors", "pixels that a crop padded"),
    "head": ("model.classification_head", "linear", "deep", "classification head"),
    "lr-schedule": ("train.lr_schedule", "step", "epoch", "the learning rate moves every"),
}
"""name → field, the paper's value, the published code's, what it decides"""


def _rules() -> Iterator[Row]:
    unset = {field_name: None for field_name, *_ in _RULES.values()}
    for rules, about in (("paper", "all rules of the paper"), ("authors", "all rules of the published code")):
        yield Row(name=f"rules-{rules}", group="rules", about=about, changes={"method.rules": rules, **unset})
    for name, (field_name, *values, about) in _RULES.items():
        for source, value in zip(("paper", "authors"), values, strict=True):
            told = f"{about}: {'' if value == source else f'{value}, '}{source}"
            yield Row(name=f"{name}-{source}", group="rules", about=told, changes={field_name: value})


_FIRST_STAGES = {BASELINE: "", "control": "of the control, ", "cam-only": "without a context branch, "}


def _second_stage() -> Iterator[Row]:
    for first, whose in _FIRST_STAGES.items():
        prefix = "" if first == BASELINE else f"{first}-"
        for refine in ("none", "pamr", "crf") if first == BASELINE else ("crf",):
            how = f"{whose}{'not refined' if refine == 'none' else f'refined by {refine}'}"
            masks = Row(
                name=f"{prefix}masks-{refine}", group="second-stage", about=f"written masks {how}", kind="masks",
                needs=first, refine=refine,
            )  # fmt: skip
            yield masks
            yield Row(
                name=f"{prefix}retrain-{refine}", group="second-stage", about=f"network trained on masks {how}",
                kind="retrain", needs=masks.name,
            )  # fmt: skip


def _memory() -> Iterator[Row]:
    runs = {
        "cam-only": ("CAM masks only, no context branch", {"method.context": "none"}),
        "control": ("self-training: M' from s, no memory, the same losses", {"method.context": "self"}),
        "bank": ("with the memory, no entropy term", {"method.entropy_weight": 0.0}),
        "bank-entropy": ("with the memory and the entropy term", {"method.entropy_weight": 1.0}),
        "full": ("full supervision: the ceiling", {"method.supervision": "full"}),
    }
    for name, (about, changes) in runs.items():
        yield Row(name=name, group="memory", about=about, changes=changes)


def rows(*, saliency: Path | None = None) -> tuple[Row, ...]:
    """All rows, the baseline first; `saliency`: a folder of maps, to be compared with those that are computed."""
    given = {"given": str(saliency)} if saliency else {}
    return (
        Row(name=BASELINE, group="", about="the preset as it stands"),
        *_memory(),
        *_sweep("attention", "threshold", "method.attention_threshold", (0.0, 0.25, 0.5, 1.0, 1.5), "θ"),
        *_sweep("attention", "entropy", "method.entropy_weight", (0.03, 0.1, 0.3), "factor of the entropy"),
        *_sweep("attention", "heads", "method.heads", (1, 2, 4), "attention heads:"),
        *_sweep("attention", "gain", "method.message_gain", (0.01, 0.03, 0.1, 0.3, 1.0), "first gain of the message"),
        *_sweep("bank", "slots", "method.slots", (8, 16, 32, 64, 256), "S"),
        *_sweep("bank", "pool", "method.pool_threshold", (0.1, 0.3, 0.5, 0.7, 0.9), "T_b"),
        Row(name="pixels", group="bank", about="single pixels, 4096 a class, in the place of pooled contexts",
            changes={"method.pixel_bank": True, "method.slots": 4096}),
        *_either(
            "bank", "method.self_read", ("self-read", "an image reads itself"),
            ("no-self-read", "an image reads only others"),
        ),
        *_sweep("bank", "ema", "method.ema_momentum", (None, 0.99, 0.999), "contexts of a moving average:"),
        *_sweep("masks", "cam", "method.cam_threshold", (0.1, 0.3, 0.5, 0.7), "T_a"),
        *_sweep("masks", "background", "method.background_power", (0.5, 1.0, 1.5, 2.0), "α of the background row:"),
        *(Row(name=f"saliency-{name}", group="masks", about=f"saliency maps: {name}", changes={"data.saliency": value})
          for name, value in ({"auto": "auto", "none": "none"} | given).items()),
        Row(name="merged", group="masks", about="M, M' and M'' supervise",
            changes={"method.masks": ("cam", "context", "merged")}),
        Row(name="no-merged", group="masks", about="M and M' supervise, not M''",
            changes={"method.masks": ("cam", "context")}),
        Row(name="only-merged", group="masks", about="M'' alone supervises", changes={"method.masks": ("merged",)}),
        *_sweep("masks", "context-head", "method.context_head", ("segmentation", "classification"),
                "M' from the head of"),
        *_sweep("masks", "grid", "method.mask_upsampling", (1, 2, 4),
                "steps of the masks' grid for one of the features':"),
        *_sweep("masks", "refinement", "method.refinement", ("none", "pamr"), "masks refined while training:"),
        *_either(
            "losses", "method.stop_gradient", ("stop-gradient", "the context branch trains nothing else"),
            ("no-stop-gradient", "the context branch also trains backbone and head"),
        ),
        *_sweep("losses", "ramp", "method.ramp_epochs", (0.0, 2.0, 5.0, 12.0), "epochs until λ is 1:"),
        *_sweep("losses", "segmentation", "method.segmentation_weight", (0.33, 1.0, 3.0),
                "factor of the losses on masks:"),
        *_rules(),
        *_second_stage(),
    )  # fmt: skip


def chosen(every: tuple[Row, ...], *, names: Iterable[str], groups: Iterable[str]) -> tuple[Row, ...]:
    """The rows called so and those of these groups, all where nothing is said, with those that they need.

    Raises:
        ValueError: there is no such row or group; the nearest is named.
    """
    by_name = {row.name: row for row in every}
    for what, given, known in (("row", names, by_name), ("group", groups, GROUPS)):
        for word in given:
            if word not in known:
                raise ValueError(f"there is no {what} {word!r}{nearest(word, known) or '; --list shows them'}")
    wanted = set(names) | {row.name for row in every if row.group in groups} or set(by_name)
    wanted.add(BASELINE)
    for row in reversed(every):  # what a row needs stands above it
        if row.name in wanted and row.needs:
            wanted.add(row.needs)
    return tuple(row for row in every if row.name in wanted)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with the fields `group.field` changed, and checked; raises ValueError as the flags would."""
    for name, value in changes.items():
        section, field_name = name.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field_name: value})}
        )
    return config


def value_of(config: Config, name: str) -> Any:
    """The field `group.field`."""
    section, field_name = name.split(".")
    return getattr(getattr(config, section), field_name)


def same_as(every: Iterable[Row], baseline: Config) -> dict[str, str]:
    """Name → name of the first row that computes the same, for the rows that are not the first themselves."""
    first: dict[str, str] = {}
    same: dict[str, str] = {}
    for row in every:
        made_from = same.get(row.needs, row.needs)
        key = repr((row.kind, made_from, row.refine, changed(baseline, row.changes).resolved()))
        if key in first:
            same[row.name] = first[key]
        else:
            first[key] = row.name
    return same


def difference(stored: Config, wanted: Config) -> str | None:
    """Where two configurations would compute something else: the first field and both values, None if nowhere.

    Fields that `wanted` leaves to data and machine are taken as stored, paths are compared as paths, and what decides
    over no number is not compared: `run` but for what it starts from, the loader's processes, the cache.
    """
    wanted = fill_unset(wanted.resolved(), stored)
    ours, theirs = _compared(wanted), _compared(stored.resolved())
    name = next((name for name, value in ours.items() if theirs[name] != value), None)
    return None if name is None else f"{name} {theirs[name]}, not {ours[name]}"


def _compared(config: Config) -> dict[str, Any]:
    values = {
        f"{section}.{name}": value
        for section, fields in dataclasses.asdict(config).items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if (section != "run" or name == "init_from") and name not in ("workers", "cache")
    }
    for name in ("data.root", "run.init_from"):
        if values[name] is not None:
            values[name] = str(Path(values[name]).resolve())
    return values
