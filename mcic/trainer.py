"""The training loop: what happens in a step, at the end of an epoch, and at the end."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcic import distributed
from mcic.build import PRECISIONS, build_model, choose_device, peak_memory, seed_everything
from mcic.calibrate import apply_calibration, read_calibration
from mcic.checkpoint import (
    load_checkpoint,
    load_initial,
    load_random_state,
    newest_good,
    save_checkpoint,
    save_network,
    used_ground_truth,
)
from mcic.config import Config
from mcic.config_io import load_config, save_config
from mcic.data import (
    Batch,
    GroundTruth,
    SavedMasks,
    Targets,
    TrainLoader,
    build_data,
    build_saliency,
    default_workers,
    eval_items,
)
from mcic.defaults import fill_unset, settle
from mcic.durable import write_text
from mcic.evaluate import evaluate_masks, evaluate_network, share_of_rank, summarize
from mcic.guard import NonFiniteGuard
from mcic.log import RunLog, environment
from mcic.measures import summary_rows
from mcic.objective import Objective
from mcic.ops import describe_backends, rejected_labels
from mcic.optim import build_optimizer, set_lr
from mcic.panels import draw_examples, draw_previews
from mcic.report import write_report
from mcic.schedule import poly, ramp_up, warm_up
from mcic.stop import Stopped, StopRequest
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
        distributed.initialize(self.device)
        self.folder = self._choose_folder()
        self.summary = self._finished_summary()
        if self.summary is not None:
            return
        seed_everything(config)
        self.data = build_data(config.data)
        self.config = config = self._settled()
        self.targets = self._targets()
        self.ground_truth_used = self._uses_ground_truth()
        self.saliency = build_saliency(config.data.saliency, cache=config.data.cache)
        self.loader = self._build_loader()
        num_classes = len(self.data.train.classes) + 1
        backend = config.run.backend
        self.model = build_model(config.model, config.method, num_classes=num_classes, backend=backend)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.objective = Objective(config.method, backend=backend)
        train = config.train
        self.optimizer = build_optimizer(
            self.model, lr=train.lr, new_layer_lr=train.new_layer_lr, momentum=train.momentum,
            weight_decay=train.weight_decay,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.precision == "fp16")
        self.step = 0
        self.total_steps = train.epochs * self.loader.steps
        self.seconds = 0.0  # of training, over all parts of a resumed run
        self.epoch_closed = True  # False: the run stopped between an epoch's last step and what follows it
        self.guard = NonFiniteGuard(
            self.folder / "nonfinite", limit=train.max_nonfinite, dataset=self.data.train, batch_of=self._batch_of
        )
        self._check()
        self._load_state()
        if train.compile:
            self.model.network.backbone.compile()
        update = Update(
            self.model, self.objective, self.optimizer, self.scaler, dtype=PRECISIONS[train.precision],
            accumulate=train.accumulate, clip_grad=train.clip_grad,
        )  # fmt: skip
        self.update = GraphedUpdate(update) if train.cuda_graph else update

    def fit(self) -> dict[str, Any]:
        """Train, evaluate, write the summary and the report; returns the summary."""
        if self.summary is not None:
            logger.warning("%s is finished: nothing is left to do", self.folder)
            distributed.finish()
            return self.summary
        run, leads = self.config.run, distributed.rank() == 0
        if leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.folder / "config.yaml")
            write_text(self.folder / "env.json", json.dumps(environment(), indent=1))
        evaluated = min(self.step if self.epoch_closed else self.step - 1, self.total_steps - 1)
        with (
            StopRequest() as stop,
            RunLog(
                self.folder, tensorboard=run.tensorboard, total_steps=self.total_steps, start_step=self.step,
                evaluated_step=max(0, evaluated), enabled=leads,
            ) as log,
        ):  # fmt: skip
            log.message(self._opening_line())
            self._train(log, stop)
            summary = self._summarize(log)
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
                self._save(epoch_closed=self.step % steps != 0)
                log.message(f"Stopped after step {self.step}; --run.resume auto goes on from there")
                distributed.finish()
                raise Stopped
            self._end_epoch(epoch, log)

    def _train_epoch(self, epoch: int, log: RunLog, stop: StopRequest) -> bool:
        """The steps that are left of an epoch; returns whether the run is to stop."""
        self.model.train()
        run, skipped = self.config.run, {}
        started, last = time.perf_counter(), self.step
        for batch in self.loader.epoch(epoch, start=self.step % self.loader.steps):
            figures = self._train_step(batch.to(self.device))
            self.step += 1
            skipped[self.step] = figures["skipped"].clone()
            stopping = stop.made and distributed.world_size() == 1
            if self.step % run.log_every == 0 or self.step == self.total_steps or stopping:
                metrics, flags, stopping = self._read(figures, skipped, stop.made)
                elapsed = time.perf_counter() - started
                self.seconds += elapsed
                metrics["images_per_second"] = (self.step - last) * self.config.train.batch_size / elapsed
                log.step(self.step, epoch, metrics)
                self.guard.check(flags, metrics)
                skipped.clear()
                started, last = time.perf_counter(), self.step
            if stopping:
                return True
            if run.checkpoint_every and self.step % run.checkpoint_every == 0 and self.step % self.loader.steps:
                self._save(epoch_closed=True)
        self.seconds += time.perf_counter() - started
        return False

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns this rank's share of every figure, still on the device."""
        # Dropout is a function of the step, so a resumed run draws what an uninterrupted one would.
        seed = self.config.train.seed * 2**32 + self.step * distributed.world_size() + distributed.rank()
        torch.manual_seed(seed % 2**63)
        ramp, factor = self._schedules()
        set_lr(self.optimizer, factor)
        return self.update(batch, ramp)

    def _schedules(self) -> tuple[Tensor, float]:
        """λ on the device and the factor of the learning rate."""
        train = self.config.train
        done, total = self.step, self.total_steps
        if train.lr_schedule == "epoch":
            done, total = self.step // self.loader.steps, train.epochs
        factor = warm_up(self.step, train.warmup_steps) * poly(done, total, power=train.lr_power)
        ramp = torch.full((), self._ramp_of(self.step), device=self.device)  # filled there: no copy to wait for
        return ramp, factor

    def _read(
        self, figures: dict[str, Tensor], skipped: dict[int, Tensor], stop: bool
    ) -> tuple[dict[str, float], dict[int, bool], bool]:
        """Over all ranks and fetched in one transfer: a step's figures with the schedules beside them; of each step
        since the last call, whether its update was skipped; whether a rank was asked to stop."""
        ours = [*figures.values(), *skipped.values(), torch.tensor(float(stop))]
        values = distributed.sum_(torch.stack([value.detach().double().to(self.device) for value in ours])).tolist()
        metrics = dict(zip(figures, values, strict=False))
        metrics["lr"] = float(self.optimizer.param_groups[0]["lr"])
        metrics["lambda"] = self._ramp_of(self.step - 1)
        metrics["memory_gib"] = peak_memory(self.device)
        flags = dict(zip(skipped, (value > 0.5 for value in values[len(figures) : -1]), strict=True))
        return metrics, flags, values[-1] > 0

    def _ramp_of(self, step: int) -> float:
        method = self.config.method
        return ramp_up(step, method.ramp_epochs * self.loader.steps, power=method.ramp_power)

    def _end_epoch(self, epoch: int, log: RunLog) -> None:
        run, every, score = self.config.run, self.config.eval.every, None
        if every and (epoch + 1) % every == 0 and epoch + 1 < self.config.train.epochs:
            scores = summarize(self._evaluate_network(), {}, self.data.train.classes)
            log.evaluation(self.step, epoch, {k: v for k, v in scores.items() if isinstance(v, float)})
            score = scores["val/miou"]
        if rejected_labels(self.device):
            logger.warning("some contexts were not stored: their class is none of the bank's")
        self._save(epoch_closed=True, score=score)
        if distributed.rank() == 0:
            self._save_network()
            if run.previews:
                indices = range(min(run.previews, len(self.data.train)))
                items = eval_items(self.data.train, self.saliency, indices=indices)
                path = self.folder / "previews" / f"epoch-{epoch + 1:03d}.png"
                draw_previews(path, self.model, self.objective, items, self.data.train, device=self.device)
        distributed.barrier()

    def _save(self, *, epoch_closed: bool, score: float | None = None) -> None:
        """Write a checkpoint; `epoch_closed`: nothing of the epochs before its step is left to do but previews."""
        states = distributed.gather_rows(torch.get_rng_state()[None].to(self.device)).cpu()
        if distributed.rank() == 0:
            state = {
                "seconds": self.seconds, "scaler": self.scaler.state_dict(), "epoch_closed": epoch_closed,
                "streak": self.guard.streak, "score": score, "classes": list(self.data.train.classes),
                "ground_truth_used": self.ground_truth_used,
            }  # fmt: skip
            save_checkpoint(
                self.folder / "checkpoints", step=self.step, model=self.model, optimizer=self.optimizer, state=state,
                keep=self.config.run.keep, random_states=list(states),
            )  # fmt: skip
        distributed.barrier()

    def _batch_of(self, step: int) -> Batch:
        """The batch whose update was the `step`-th."""
        return self.loader.batch(*divmod(step - 1, self.loader.steps))

    def _summarize(self, log: RunLog) -> dict[str, Any]:
        """Evaluate and put together `summary.json`."""
        log.message("Evaluating")
        masks = {}
        if self.config.eval.mask_images:
            measured = copy.copy(self.data.train)  # the whole set stays: the bank's ids are places in it
            measured.subset(self.config.eval.mask_images)
            masks = evaluate_masks(self.model, self.objective, self._items(measured), device=self.device)
        config = self.config
        summary = {
            "preset": config.preset,
            "data": config.data.name,
            "palette": self.data.train.palette.tolist(),
            **summarize(self._evaluate_network(), masks, self.data.train.classes),
            "protocol": config.eval.protocol,
            "epochs": config.train.epochs,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "images_per_second": round(self.step * config.train.batch_size / max(self.seconds, 1e-9), 2),
            "backend": describe_backends(config.run.backend, self.device),
            "device": str(self.device),
            "supervision": config.method.supervision,
            "ground_truth_used": self.ground_truth_used,
        }
        log.evaluation(self.step, config.train.epochs - 1, {k: v for k, v in summary.items() if "/" in k})
        return summary

    def _evaluate_network(self) -> dict:
        items = self._items(self.data.val)
        return evaluate_network(self.model, items, protocol=self.config.eval.protocol, device=self.device)

    def _items(self, dataset: Any) -> Iterator:
        workers = default_workers(self.config.data.workers, dataset)
        return eval_items(dataset, self.saliency, indices=share_of_rank(len(dataset)), workers=workers)

    def _close(self, summary: dict[str, Any], log: RunLog) -> None:
        if self.config.run.previews:
            train = self.data.train
            draw_examples(self.folder, self.model, self.objective, train, self.saliency, device=self.device)
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1))
        log.table("Results", summary_rows(summary))
        if self.config.run.report:
            log.message(f"Report: {write_report(self.folder)}")
        log.message(f"Checkpoints: {self.folder / 'checkpoints'} (network.safetensors runs at test time)")

    def _choose_folder(self) -> Path:
        """The run folder; it is made when training starts, so that a mistake leaves nothing behind."""
        run = self.config.run
        if run.dir is None:
            run.dir = distributed.from_first(f"runs/{self.config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder = Path(run.dir)
        if run.resume == "none" and any(folder.glob("*")):
            raise ValueError(
                f"--run.dir {folder} already holds files: continue that run with --run.resume auto, "
                "or choose another folder"
            )
        distributed.barrier()  # every rank has looked before the first one writes
        return folder

    def _settled(self) -> Config:
        """The configuration with what it leaves to data and machine; a run that goes on keeps what it had."""
        config, stored = self.config, self.folder / "config.yaml"
        if config.run.resume == "auto" and stored.is_file():
            config = fill_unset(config, load_config(stored))
        config = apply_calibration(settle(config, self.data.train, self.device))
        self.data.train.long_side = self.data.val.long_side = config.data.long_side
        return config

    def _targets(self) -> Targets | None:
        """The masks that supervise, where tags do not."""
        if self.config.method.supervision == "tags":
            return None
        if self.config.method.supervision == "full":
            return GroundTruth()
        if self.config.data.masks is None:
            raise ValueError("--method.supervision masks needs --data.masks, the folder that `mcic masks` wrote")
        return SavedMasks(Path(self.config.data.masks), self.data.train)

    def _uses_ground_truth(self) -> bool:
        """Whether masks that people drew train this network, chose a threshold, or trained what it starts from."""
        calibration, start = self.config.data.calibration, self.config.run.init_from
        if calibration is not None and read_calibration(Path(calibration))["ground_truth_used"]:
            return True
        if start is not None and used_ground_truth(Path(start)):
            return True
        if isinstance(self.targets, SavedMasks):
            return bool(self.targets.manifest.get("ground_truth_used"))
        return self.targets is not None

    def _build_loader(self) -> TrainLoader:
        train, data = self.config.train, self.config.data
        return TrainLoader(
            self.data.train, self.saliency, size=train.size, scale=train.scale, flip=train.flip,
            color_jitter=train.color_jitter, batch_size=train.batch_size, seed=train.seed,
            workers=default_workers(data.workers, self.data.train), targets=self.targets,
            rank=distributed.rank(), world_size=distributed.world_size(),
        )  # fmt: skip

    def _load_state(self) -> None:
        run = self.config.run
        if run.init_from is not None:
            load_initial(self.model, Path(run.init_from))
        if run.resume == "none":
            return
        path = newest_good(self.folder / "checkpoints") if run.resume == "auto" else Path(run.resume)
        if path is None:
            return
        classes = self.data.train.classes
        state = load_checkpoint(path, model=self.model, optimizer=self.optimizer, classes=classes)
        self.step, self.seconds, self.epoch_closed = state["step"], state["seconds"], state["epoch_closed"]
        self.guard.streak = state["streak"]
        self.scaler.load_state_dict(state["scaler"])
        random_state = load_random_state(path, distributed.rank())
        if random_state is not None:
            torch.set_rng_state(random_state)

    def _finished_summary(self) -> dict[str, Any] | None:
        """The summary of the run to continue, if it has all the epochs that are asked for."""
        path = self.folder / "summary.json"
        if self.config.run.resume != "auto" or not path.is_file():
            return None
        summary = json.loads(path.read_text())
        return summary if summary.get("epochs", 0) >= self.config.train.epochs else None

    def _check(self) -> None:
        """What only shows when data, network and ranks are known."""
        train, stride, ranks = self.config.train, self.model.network.stride, distributed.world_size()
        if (train.size - 1) % stride:
            near = round((train.size - 1) / stride) * stride + 1
            raise ValueError(
                f"--train.size must be a multiple of the output stride {stride} plus 1, so that features lie on "
                f"pixels: got {train.size}, nearest is {near}"
            )
        if train.batch_size % (train.accumulate * ranks):
            raise ValueError(
                f"--train.batch-size must be a multiple of accumulation steps times processes, "
                f"{train.accumulate} × {ranks}, got {train.batch_size}"
            )
        if train.cuda_graph and (self.device.type != "cuda" or ranks > 1 or train.precision == "fp16"):
            raise ValueError(
                f"--train.cuda-graph needs one GPU and fp32 or bf16, got {ranks} processes on {self.device.type} "
                f"in {train.precision}"
            )
        full = self.config.method.supervision == "full"
        if full and all(self.data.train.mask(index) is None for index in range(len(self.data.train))):
            raise ValueError("--method.supervision full needs ground-truth masks: no training image has one")

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
