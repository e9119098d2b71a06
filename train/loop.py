"""The run: from an engine and shards to a trained model."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.device_render import images_on, with_labels
from data.loader import Batch, TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan, Order
from data.shards import ShardSet
from model.weight_files import save_safetensors
from train import TrainError
from train.checkpoint import RunState
from train.clock import StepClock
from train.config import Config
from train.ema import Ema, averaged
from train.engine import DeepSpeedEngine, Job, forget_gradients, gather_weights
from train.evaluate import evaluate, summary
from train.guard import Guard
from train.interrupt import Interrupt
from train.logs import log
from train.loss import PixelLoss
from train.optim import lr_factor, set_lr
from train.pace import Pace
from train.saving import Saver
from train.track import Tracker


def train_step(
    engine: DeepSpeedEngine, micro_batches: list[Batch], loss: PixelLoss, job: Job, clock: StepClock, per_class: bool
) -> tuple[float, list[float]]:
    """One optimizer step over the global batch, of which `micro_batches` is this rank's share.

    What the loss is divided by, as its valid pixels, belongs to the whole global batch: it is summed over all ranks
    before the first backward pass. The factor undoes DeepSpeed's own mean over ranks and micro batches.

    Returns:
        Its loss and, if `per_class`, the mean cross-entropy of each class's pixels, NaN of a class without any.
    """
    clock.enter("forward")
    micro_batches = [with_labels(batch, loss.label_set, job.device) for batch in micro_batches]
    counts = torch.cat([batch.pixel_counts for batch in micro_batches]).cpu()
    own = loss.totals(counts)
    clock.enter("wait")
    totals = job.sum(*own)
    factor = job.world_size * len(micro_batches)
    total = torch.zeros((), device=job.device)
    sums = torch.zeros(loss.label_set.num_classes, dtype=torch.float64, device=job.device) if per_class else None
    for batch in micro_batches:
        clock.enter("forward")
        logits = engine(images_on(batch, job.device), batch.seeds)  # (B, C, h, w)
        labelled = None if batch.labelled is None else batch.labelled.to(job.device, non_blocking=True)
        share = loss.share(logits, batch.labels.to(job.device, non_blocking=True), totals, labelled, sums)
        clock.enter("backward")
        engine.backward(share * factor)
        clock.enter("optimizer")
        engine.step()
        total += share.detach()
    forget_gradients(engine)
    if sums is None:
        return job.sum(total.item())[0], []
    value, *summed = job.sum(total.item(), *sums.tolist(), *counts.sum(0)[: len(sums)].tolist())
    pairs = zip(summed[: len(sums)], summed[len(sums) :], strict=True)
    return value, [entropy / pixels if pixels else math.nan for entropy, pixels in pairs]


@dataclass
class Training:
    """A run from an engine and shards to a trained model. Every rank must make the same calls.

    With an average of the weights, it is what is evaluated and exported; they themselves go to model_raw.safetensors.
    """

    engine: DeepSpeedEngine
    config: Config
    about: dict[str, Any]  # the run, for dashboards: see train.run
    train: Mixture
    order: Order
    val: ShardSet | None
    loss: PixelLoss
    lowest_scale: float  # of the learning rates
    state: RunState
    ema: Ema | None
    saver: Saver
    interrupt: Interrupt
    clock: StepClock
    job: Job

    def fit(self) -> bool:
        """Train from `state.step` to the end; evaluate, save and export on the way. False: interrupted, and saved."""
        config, total, job = self.config, self.state.total_steps, self.job
        plan = BatchPlan(config.global_batch_size, config.micro_batch_size, job.rank, job.world_size)
        examples = TrainExamples(self.train, self.order, config.model.image_size, config.augment)
        batches = train_batches(
            examples, plan, self.state.step, total, config.data.workers, config.data.max_bad_fraction, job.on_gpu
        )
        self.tracker = Tracker(config, self.state.step, total, self.about) if job.is_main else None
        guard = Guard(config.guard)
        clock = self.clock
        self.pace = Pace(config, self.train.label_set.num_classes, self.state.zero_stage, clock, job)
        logged = self.state.step  # up to which step the metrics are recorded
        self.scores: str | None = None  # the last validation's
        due = False
        self.engine.train()
        clock.step = self.state.step
        clock.enter("data")
        for step, micro_batches in enumerate(batches, start=self.state.step):
            clock.enter("wait")
            stop, writing = job.sum(self.interrupt.requested, self.saver.writing)
            clock.enter("checkpoint")
            self.saver.commit_when_written(writing)
            if stop:
                self._leave(guard)
                return False
            clock.enter("wait")
            lr = config.optimizer.lr * lr_factor(step, total, config.schedule)
            set_lr(self.engine.optimizer, lr)
            shown = (step + 1) % config.log_every == 0 or step + 1 == total
            value, per_class = train_step(self.engine, micro_batches, self.loss, job, clock, shown)
            clock.enter("other")
            norm = float(self.engine.get_global_grad_norm())  # before clipping
            try:
                guard.look(step, value, norm, self.engine.skipped_steps, micro_batches)
            except TrainError:  # on all ranks
                self.saver.finish()
                raise
            if self.ema:
                self.saver.wait_until_copied()  # a step that was passed over has not
                self.ema.update(step)
            if shown:
                numbers = {
                    "train/loss": value, "train/gradient_norm": norm, "train/skipped_steps": guard.skipped,
                    "train/loss_spikes": guard.spikes, "lr/highest": lr, "lr/lowest": lr * self.lowest_scale,
                }  # fmt: skip
                self._record(step, numbers, per_class, step + 1 - logged)
                logged = step + 1
            if self.tracker:
                self.tracker.bar.update()
            self.state = replace(self.state, step=step + 1)
            better = (step + 1 == total or self._is_due(config.evaluate.every_steps)) and self._validate_for_best()
            due = due or better or self._is_due(config.checkpoint.every_steps) or step + 1 == total
            if due and guard.in_a_row == 0:  # else it may be too late already: a start from there would end as this one
                clock.enter("checkpoint")
                self.saver.save(self.state)
                due = False
            clock.step = step + 1
            clock.enter("data")
        self._end()
        return True

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _record(self, step: int, numbers: dict[str, float], per_class: list[float], steps: int) -> None:
        """Tell what optimizer step `step` has given, and the `steps` up to it have taken. Every rank must call it."""
        measured = self.pace.read(steps)
        if self.tracker:
            numbers["train/epoch"] = (step + 1) * self.config.global_batch_size / self.order.epoch_length
            shown = zip(self.train.label_set.classes, per_class, strict=True)
            losses = {f"loss_per_class/{name}": loss for name, loss in shown if math.isfinite(loss)}
            if self.saver.times:
                names = "checkpoint/stall_seconds", "checkpoint/write_seconds"
                numbers |= dict(zip(names, self.saver.times, strict=True))
            self.tracker.train(step, numbers | measured | losses)

    def _leave(self, guard: Guard) -> None:
        """Raises TrainError if that cannot be saved."""
        self.saver.finish()
        if self.saver.last_step != self.state.step and guard.in_a_row == 0:
            self.saver.save(self.state)
            self.saver.finish()
            if self.saver.failed:
                raise TrainError(f"asked to leave after step {self.state.step}, which could not be saved: {self.saver.failed}")
        if self.tracker:
            reason = self.interrupt.reason or "another process was asked to"
            there = f"after step {self.state.step}: {reason}; the same command goes on from step {self.saver.last_step}"
            log.info("stops %s", there)
            self.tracker.finish(hurry=True)

    def _end(self) -> None:
        self.clock.enter("checkpoint")
        self.saver.finish()
        with averaged(self.ema):
            if self.val and self.scores is None:  # nothing was left to train
                self._validate()
            path = self._export("model.safetensors", self.config.ema.decay)
        raw_path = self._export("model_raw.safetensors", None) if self.ema else None
        if self.tracker:
            self.tracker.finish()
            log.info("\n%s\nmodel          %s", self.scores or "", path)
            if raw_path:
                log.info("not averaged   %s", raw_path)
            if self.state.best_step:
                log.info("best so far    step %d, mIoU %.4f", self.state.best_step, self.state.best_miou)
            if self.val and self.config.evaluate.pictures:
                log.info("pictures       %s/examples.png, worst.png, best.png", self.pictures)
            log.info("all of it      python -m train.report %s", self.config.output_dir)

    def _validate_for_best(self) -> bool:
        """Validate; whether the model is the best so far, which is exported then."""
        if not self.val:
            return False
        with averaged(self.ema):
            better = self._validate()
            if better:
                try:
                    self._export("model_best.safetensors", self.config.ema.decay)
                except TrainError as error:  # of rank 0 alone; the run matters more
                    log.error("%s", error)
        return better

    def _validate(self) -> bool:
        """Whether the mIoU is the best so far of a run that is validated on its way."""
        config, job, step = self.config, self.job, self.state.step

        def forward(images: torch.Tensor) -> torch.Tensor:
            self.clock.enter("validation")  # the watchdog gives each batch its time
            return self.engine(images)

        self.clock.enter("validation")
        self.engine.eval()
        scores, groups = evaluate(
            forward, self.val, config.model.image_size, job.device, config.evaluate.batch_size, config.data.workers,
            config.evaluate.pictures, config.augment.keep_aspect, job.rank, job.world_size,
        )  # fmt: skip
        self.clock.enter("export")
        self.engine.train()
        compared = config.evaluate.every_steps is not None  # else what was best would be nowhere
        better = compared and scores.miou > (-1 if self.state.best_miou is None else self.state.best_miou)
        if better:
            self.state = replace(self.state, best_step=step, best_miou=scores.miou)
        self.scores = summary(scores, self.val)
        if self.tracker:
            best = {"best_miou": self.state.best_miou, "best_step": self.state.best_step} if self.state.best_step else {}
            self.pictures = self.tracker.validation(step, scores, groups, self.val, best)
        job.sum(0)  # as in _export
        return better

    def _export(self, name: str, ema_decay: float | None) -> Path:
        """Write the weights that the model has now to `name` in the output folder. Raises TrainError if that fails."""
        self.clock.enter("export")
        path, weights = self.config.output_dir / name, gather_weights(self.engine)
        try:
            if weights:  # rank 0
                save_safetensors(path, weights, self._metadata() | {"ema_decay": ema_decay})
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{path}: cannot be written: {error}; make room, then start again to continue") from None
        finally:
            self.job.sum(0)  # all wait for rank 0 here, where nobody takes that for a hang
        return path

    def _metadata(self) -> dict:
        return {
            **self.engine.module.describe(),
            "keep_aspect": self.config.augment.keep_aspect,
            "label_set": self.train.label_set.to_dict(),
            "origin": self.state.origin,
            "step": self.state.step,
            "revision": self.about["revision"],
        }
