"""The training loop: what happens in a step, at the end of an epoch, and at the end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from mcic import distributed
from mcic.build import PRECISIONS, build_model, choose_device, in_words, peak_memory, seed_everything
from mcic.calibrate import apply_calibration
from mcic.checkpoint import (
    load_checkpoint,
    load_initial,
    load_random_state,
    read_state,
    save_checkpoint,
    save_network,
)
from mcic.config import Config
from mcic.config_io import save_config
from mcic.data import (
    Batch,
    Dataset,
    EvalItem,
    SaliencySource,
    TrainLoader,
    build_data,
    build_saliency,
    default_workers,
    eval_items,
    write_quarantine,
)
from mcic.defaults import fill_unset, settle
from mcic.durable import optional, remove, write_text, write_with
from mcic.evaluate import SMALLER_IMAGES, evaluate_masks, evaluate_network, share_of_rank, summarize
from mcic.guard import NonFiniteGuard
from mcic.log import RunLog, environment
from mcic.measures import summary_rows
from mcic.meter import Meter
from mcic.model import MCIC
from mcic.model.backbones.layers import normalises_alone
from mcic.objective import Objective
from mcic.ops import describe_backends, rejected_labels
from mcic.optim import build_optimizer, set_lr
from mcic.panels import draw_examples, draw_previews
from mcic.preview import EXAMPLES
from mcic.report import write_report
from mcic.resume import changes, claim_folder, find_start
from mcic.schedule import poly, ramp_up, warm_up
from mcic.stop import Stopped, StopRequest
from mcic.supervision import build_targets, uses_ground_truth
from mcic.update import GraphedUpdate, Update

logger = logging.getLogger("mcic.trainer")


class Trainer:
    """One run, from a configuration to a summary.

    Args:
        config: see `mcic.config`; stored in the run folder as resolved.

    Raises:
        ValueError: data, weights, device or run folder that cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self.config = config = config.resolved()
        self.device = choose_device(config.run.device)
        distributed.initialize(self.device, timedelta(seconds=config.run.rank_timeout))
        self.stop = StopRequest()
        self.start = find_start(config)
        self.folder, self.resumed_from = self.start.folder, self.start.checkpoint
        if self.start.summary is not None:
            return  # a finished run, of which `fit` only says so
        seed_everything(config)
        self.data = build_data(config.data)
        self.config = config = self._settled()
        self.targets = build_targets(config, self.data.train)
        stored = None if self.resumed_from is None else self.start.config  # without a checkpoint the run begins anew
        self.ground_truth_used = uses_ground_truth(config, self.targets, stored=stored)
        self.saliency = build_saliency(config.data.saliency, cache=config.data.cache)
        if self.saliency is not None:
            self.saliency.check(self.data.train)
        self.loader = self._build_loader()
        self.model = self._build_model()
        self.objective = Objective(config.method, backend=config.run.backend)
        train = config.train
        self.optimizer = build_optimizer(
            self.model, kind=train.optimizer, lr=train.lr, new_layer_lr=train.new_layer_lr, momentum=train.momentum,
            weight_decay=train.weight_decay,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.step = 0
        self.total_steps = train.epochs * self.loader.steps
        self.meter = Meter(self.device)
        self.checkpoint_seconds = 0.0  # over all parts of a resumed run, as the meter's of training
        self.epoch_closed = True  # False: the run stopped between an epoch's last step and what follows it
        self.guard = NonFiniteGuard(
            self.folder / "nonfinite", limit=train.max_nonfinite, dataset=self.data.train, batch_of=self._batch_of,
            scaled=self.scaler.is_enabled(),
        )  # fmt: skip
        self._check()
        self._load_state()
        self.logged = self.step, self.meter.seconds  # of the last line in metrics.jsonl
        if train.compile:
            self.model.network.backbone.compile()
        update = Update(
            self.model, self.objective, self.optimizer, self.scaler, dtype=PRECISIONS[train.precision],
            accumulate=train.accumulate, clip_grad=train.clip_grad,
        )  # fmt: skip
        self.update = GraphedUpdate(update) if train.cuda_graph else update

    def fit(self) -> dict[str, Any]:
        """Train, evaluate, write the summary and the report; returns the summary."""
        if self.start.summary is not None:
            logger.warning("%s is finished: nothing is left to do", self.folder)
            distributed.finish()
            return self.start.summary
        run, train, leads = self.config.run, self.config.train, distributed.rank() == 0
        if self.start.named_by_time:
            self.folder = claim_folder(self.folder)
            self.config.run.dir, self.guard.folder = str(self.folder), self.folder / "nonfinite"
        if leads:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_with(self.folder / "config.yaml", lambda path: save_config(self.config, path))
            write_quarantine(self.folder, self.data.train.dropped)
            for name in ("summary.json", "report.html", EXAMPLES):  # of a run that goes on: of its earlier end
                remove(self.folder / name)
            write_text(self.folder / "env.json", json.dumps(environment(), indent=1))
            if self.step and self.step % self.loader.steps == 0 and self.epoch_closed:
                self._save_network()  # the run may have ended between the checkpoint and this
        evaluated = min(self.step if self.epoch_closed else self.step - 1, self.total_steps - 1)
        with (
            self.stop as stop,
            RunLog(
                self.folder, tensorboard=run.tensorboard, total_steps=self.total_steps, start_step=self.step,
                evaluated_step=max(0, evaluated), enabled=leads,
            ) as log,
        ):  # fmt: skip
            log.message(self._opening_line())
            with in_words(self.device, f"--train.batch-size {train.batch_size} or --train.size {train.size} must be "
                          "lower, or --train.accumulate higher"):  # fmt: skip
                self._train(log, stop)
            try:
                summary = self._summarize(log)
            except Stopped:
                self._leave(log)
            if leads:
                self._close(summary, log)
        distributed.barrier()
        distributed.finish()
        return summary

    def _train(self, log: RunLog, stop: StopRequest) -> None:
        """All epochs that are left; a stop that was asked for leaves by `Stopped`, after saving."""
        steps = self.loader.steps
        if not self.epoch_closed:
            self._end_epoch(self.step // steps - 1, log)
        for epoch in range(self.step // steps, self.config.train.epochs):
            if self._train_epoch(epoch, log, stop):
                self._save(log, epoch_closed=self.step % steps != 0)
                self._leave(log)
            self._end_epoch(epoch, log)

    def _leave(self, log: RunLog) -> NoReturn:
        """End a run that was asked to stop and is saved."""
        log.message(
            f"Stopped after step {self.step}; the same command with --run.dir {self.folder} --run.resume auto goes on "
            "from there"
        )
        distributed.finish()
        raise Stopped

    def _train_epoch(self, epoch: int, log: RunLog, stop: StopRequest) -> bool:
        """The steps that are left of an epoch; returns whether the run is to stop."""
        self.model.train()
        self.meter.start()
        every = self.config.run.checkpoint_every
        for batch in self.loader.epoch(epoch, start=self.step % self.loader.steps):
            figures = self._train_step(batch.to(self.device))
            self.step += 1
            self.meter.put(self.step, figures, self._facts(), stop=stop.made)
            saving = every and self.step % every == 0 and self.step % self.loader.steps
            alone = stop.made and distributed.world_size() == 1  # else all ranks learn of it at the same step
            if self._note(log, all_=saving or alone) or alone:
                self._note(log, all_=True)
                return True
            if saving:
                self._save(log, epoch_closed=True)
                self.meter.start()
        return self._note(log, all_=True)

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns this rank's share of every figure, still on the device."""
        # Dropout is a function of the step, so a resumed run draws what an uninterrupted one would.
        seed = self.config.train.seed * 2**32 + self.step * distributed.world_size() + distributed.rank()
        torch.manual_seed(seed % 2**63)
        ramp = torch.full((), self._ramp_of(self.step), device=self.device)  # filled there: no copy to wait for
        set_lr(self.optimizer, self._rate_of(self.step))
        return self.update(batch, ramp)

    def _note(self, log: RunLog, *, all_: bool) -> bool:
        """Record the steps whose figures have come, or all there are; returns whether a rank was asked to stop."""
        stop, every = False, self.config.run.log_every
        for reading in self.meter.take(all_=all_):
            stop |= reading.stop
            if reading.step % every == 0 or reading.step == self.total_steps:
                step, seconds = self.logged
                images = (reading.step - step) * self.config.train.batch_size
                speed = {"images_per_second": images / (reading.seconds - seconds)}
                log.step(reading.step, (reading.step - 1) // self.loader.steps, reading.metrics | speed)
                self.logged = reading.step, reading.seconds
            self.guard.check(reading.step, reading.metrics)
        return stop

    def _facts(self) -> dict[str, float]:
        """What the host knows of the last step."""
        return {
            "lr": self.optimizer.param_groups[0]["initial_lr"] * self._rate_of(self.step - 1),
            "lambda": self._ramp_of(self.step - 1),
            "memory_gib": peak_memory(self.device),
        }

    def _rate_of(self, step: int) -> float:
        """The factor of the learning rate."""
        train = self.config.train
        done, total = step, self.total_steps
        if train.lr_schedule == "epoch":
            done, total = step // self.loader.steps, train.epochs
        return warm_up(step, train.warmup_steps) * poly(done, total, power=train.lr_power)

    def _ramp_of(self, step: int) -> float:
        method = self.config.method
        return ramp_up(step, method.ramp_epochs * self.loader.steps, power=method.ramp_power)

    def _end_epoch(self, epoch: int, log: RunLog) -> None:
        run, every, score = self.config.run, self.config.eval.every, None
        if every and (epoch + 1) % every == 0 and epoch + 1 < self.config.train.epochs:
            try:
                scores = summarize(self._evaluate_network(), {}, self.data.train.classes)
            except Stopped:
                self._save(log, epoch_closed=False)
                self._leave(log)
            log.evaluation(self.step, epoch, {k: v for k, v in scores.items() if isinstance(v, float)})
            score = scores["val/miou"]
        if rejected_labels(self.device):
            logger.warning("some contexts were not stored: their class is none of the bank's")
        self._save(log, epoch_closed=True, score=score)
        if distributed.rank() == 0:
            self._save_network()
            if run.previews:
                indices = range(min(run.previews, len(self.data.train)))
                items = eval_items(self.data.train, self.saliency, indices=indices)
                path = self.folder / "previews" / f"epoch-{epoch + 1:03d}.png"
                with optional(path, clear=True):
                    draw_previews(path, self.model, self.objective, items, self.data.train, device=self.device)
        distributed.barrier()

    def _save(self, log: RunLog, *, epoch_closed: bool, score: float | None = None) -> None:
        """Write a checkpoint; `epoch_closed`: nothing of the epochs before its step is left to do but previews."""
        started = time.perf_counter()
        states = distributed.gather_rows(torch.get_rng_state()[None].to(self.device)).cpu()
        if distributed.rank() == 0:
            log.sync()
            state = {
                "seconds": self.meter.seconds, "checkpoint_seconds": self.checkpoint_seconds,
                "scaler": self.scaler.state_dict(), "epoch_closed": epoch_closed, "streak": self.guard.streak,
                "score": score, "classes": list(self.data.train.classes), "world_size": distributed.world_size(),
                "ground_truth_used": self.ground_truth_used, "trained": self.model.trained,
                "steps_per_epoch": self.loader.steps, "images": _digest(self.data.train.ids),
            }  # fmt: skip
            save_checkpoint(
                self.folder / "checkpoints", step=self.step, model=self.model, optimizer=self.optimizer, state=state,
                keep=self.config.run.keep, random_states=list(states),
            )  # fmt: skip
        distributed.barrier()
        self.checkpoint_seconds += time.perf_counter() - started

    def _batch_of(self, step: int) -> Batch:
        """The batch whose update was the `step`-th."""
        return self.loader.batch(*divmod(step - 1, self.loader.steps))

    def _summarize(self, log: RunLog) -> dict[str, Any]:
        """Evaluate and put together `summary.json`."""
        log.message("Evaluating")
        network, masks, num_measured, config = self._evaluate_network(), {}, 0, self.config
        if config.eval.mask_images:
            measured = self.data.train.measured(config.eval.mask_images)
            num_measured = len(measured)
            with in_words(self.device, SMALLER_IMAGES):
                items = self._items(measured, self.saliency)
                masks = evaluate_masks(self.model, self.objective, items, device=self.device)
        summary = {
            "preset": config.preset,
            "data": config.data.name,
            "palette": self.data.train.palette.tolist(),
            **summarize(network, masks, self.data.train.classes),
            "protocol": config.eval.protocol,
            "mask_images": num_measured,
            "epochs": config.train.epochs,
            "steps": self.step,
            "seconds": round(self.meter.seconds, 1),
            "checkpoint_seconds": round(self.checkpoint_seconds, 2),
            "images_per_second": round(self.step * config.train.batch_size / max(self.meter.seconds, 1e-9), 2),
            "backend": describe_backends(config.run.backend, self.device),
            "device": str(self.device),
            "supervision": config.method.supervision,
            "ground_truth_used": self.ground_truth_used,
        }
        log.evaluation(self.step, config.train.epochs - 1, {k: v for k, v in summary.items() if "/" in k})
        return summary

    def _evaluate_network(self) -> dict:
        items = self._items(self.data.val, None)
        with in_words(self.device, SMALLER_IMAGES):
            return evaluate_network(self.model, items, protocol=self.config.eval.protocol, device=self.device)

    def _items(self, dataset: Dataset, saliency: SaliencySource | None) -> Iterator[EvalItem]:
        """This rank's images; alone, it leaves by `Stopped` between two of them where it was asked to stop."""
        workers = default_workers(self.config.data.workers, dataset)
        for item in eval_items(dataset, saliency, indices=share_of_rank(len(dataset)), workers=workers):
            if self.stop.made and distributed.world_size() == 1:
                raise Stopped
            yield item

    def _close(self, summary: dict[str, Any], log: RunLog) -> None:
        log.sync()
        if self.config.run.previews:
            with optional(self.folder / EXAMPLES, clear=True):
                train = self.data.train
                draw_examples(self.folder, self.model, self.objective, train, self.saliency, device=self.device)
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        log.table("Results", summary_rows(summary))
        if self.config.run.report:
            with optional(self.folder / "report.html"):
                log.message(f"Report: {write_report(self.folder)}")
        share = self.checkpoint_seconds / (self.meter.seconds + self.checkpoint_seconds)
        log.message(
            f"Checkpoints: {self.folder / 'checkpoints'} (network.safetensors runs at test time); writing them took "
            f"{self.checkpoint_seconds:.1f} s, {share:.1%} of the time"
        )

    def _settled(self) -> Config:
        """The configuration with what it leaves to data and machine; a run that goes on keeps what it had."""
        stored = self.start.config
        config = self.config if stored is None else fill_unset(self.config, stored)
        config = settle(config, self.data.train, self.device)
        config = apply_calibration(config, stored=None if self.resumed_from is None else stored)
        if self.resumed_from is not None and stored is not None and (changed := changes(stored, config)):
            logger.info("This run goes on with other settings: %s", ", ".join(changed))
        self.data.train.long_side = self.data.val.long_side = config.data.long_side
        return config

    def _build_loader(self) -> TrainLoader:
        train, data = self.config.train, self.config.data
        return TrainLoader(
            self.data.train, self.saliency, size=train.size, scale=train.scale, flip=train.flip,
            color_jitter=train.color_jitter, batch_size=train.batch_size, seed=train.seed,
            workers=default_workers(data.workers, self.data.train), targets=self.targets,
            rank=distributed.rank(), world_size=distributed.world_size(), accumulate=train.accumulate,
        )  # fmt: skip

    def _build_model(self) -> MCIC:
        config, num_classes = self.config, len(self.data.train.classes) + 1
        # The weights that a run began with are not asked for again: they may be gone.
        weights = config.model.weights if self.resumed_from is None else "none"
        model_config = dataclasses.replace(config.model, weights=weights)
        with in_words(self.device, f"--method.slots {config.method.slots} must be lower, or the backbone smaller"):
            model = build_model(model_config, config.method, num_classes=num_classes, backend=config.run.backend)
            model.trained = self._begun_trained(model)
            return model.to(self.device, memory_format=torch.channels_last)

    def _begun_trained(self, model: MCIC) -> tuple[str, ...]:
        """Which modules had weights of an earlier training when the run began."""
        backbone, config = ("network.backbone",), self.config
        if self.resumed_from is None:
            return tuple(dict.fromkeys(model.trained + (backbone if config.run.init_from is not None else ())))
        return tuple(read_state(self.resumed_from).get("trained", backbone if config.model.weights != "none" else ()))

    def _load_state(self) -> None:
        run, path, classes = self.config.run, self.resumed_from, self.data.train.classes
        if path is None:
            if run.init_from is not None:
                load_initial(self.model, Path(run.init_from), classes=classes)
            return
        self._check_images(path, read_state(path))
        state = load_checkpoint(path, model=self.model, optimizer=self.optimizer, classes=classes)
        self.step, self.epoch_closed, self.guard.streak = state["step"], state["epoch_closed"], state["streak"]
        self.meter.seconds = state["seconds"]
        self.checkpoint_seconds = state.get("checkpoint_seconds", 0.0)
        self.ground_truth_used |= bool(state.get("ground_truth_used"))
        if state["scaler"]:  # of fp16 only
            self.scaler.load_state_dict(state["scaler"])
        before, ranks, batch = state.get("world_size", 1), distributed.world_size(), self.config.train.batch_size
        if before != ranks:
            logger.info(
                "%s was written by %d processes, now there are %d: each computes %d images of a batch, not %d. Batches "
                "and augmentation stay as they are; sums over processes are rounded otherwise, and dropout draws other "
                "numbers", path, before, ranks, batch // ranks, batch // before,
            )  # fmt: skip
        random_state = load_random_state(path, distributed.rank())
        if random_state is not None:
            torch.set_rng_state(random_state)

    def _check_images(self, path: Path, state: dict[str, Any]) -> None:
        """Whether the run that goes on has the epochs, and the images, that it had."""
        steps = state.get("steps_per_epoch", self.loader.steps)
        if steps != self.loader.steps:
            raise ValueError(
                f"{path} is of a run with {steps} steps an epoch, now there are {self.loader.steps}: to go on, images "
                f"and --train.batch-size must be as they were; a new run can begin with its weights, --run.init-from "
                f"{path}"
            )
        images = _digest(self.data.train.ids)
        if state.get("images", images) != images:
            logger.warning(
                "the training images are not those of %s: the run goes on with those that are there now, and what its "
                "memory holds may be named after others", path,
            )  # fmt: skip

    def _check(self) -> None:
        """What only shows when data, network and ranks are known."""
        train, stride, ranks = self.config.train, self.model.network.stride, distributed.world_size()
        if (train.size - 1) % stride:
            near = round((train.size - 1) / stride) * stride + 1
            raise ValueError(
                f"--train.size must be a multiple of the output stride {stride} plus 1, so that features lie on "
                f"pixels: got {train.size}, nearest is {near}"
            )
        apart = [name for name, module in self.model.network.named_modules() if normalises_alone(module)]
        if apart and ranks > 1:
            raise ValueError(
                f"{apart[0]} of the network would normalise every process's images by themselves: take BatchNorm2d or "
                "FrozenBatchNorm2d of mcic.model.backbones.layers, or torch.nn.SyncBatchNorm"
            )
        if train.cuda_graph and (self.device.type != "cuda" or ranks > 1 or train.precision == "fp16"):
            raise ValueError(
                f"--train.cuda-graph needs one GPU and fp32 or bf16, got {ranks} processes on {self.device.type} "
                f"in {train.precision}"
            )

    def _save_network(self) -> None:
        train = self.data.train
        save_network(
            self.folder / "checkpoints", self.model.network, classes=train.classes, palette=train.palette.tolist(),
            long_side=train.long_side, ground_truth_used=self.ground_truth_used,
        )  # fmt: skip

    def _opening_line(self) -> str:
        data, config = self.data, self.config
        start = f" from step {self.step}" if self.step else ""
        return (
            f"{config.preset}: {len(data.train)} training and {len(data.val)} validation images, "
            f"{len(data.train.classes)} classes, {config.model.backbone} on {self.device}, "
            f"{self.total_steps} steps{start} → {self.folder}"
        )


def _digest(ids: Sequence[str]) -> str:
    """Of the images and their order."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]
