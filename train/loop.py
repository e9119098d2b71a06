"""The run: from an engine and shards to a trained model."""

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from data.loader import Batch, TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan, Order
from data.shards import ShardSet
from model.weight_files import save_safetensors
from train import TrainError
from train.checkpoint import RunState
from train.config import Config
from train.ema import Ema, averaged
from train.engine import DeepSpeedEngine, Job, forget_gradients, gather_weights
from train.evaluate import evaluate, report
from train.guard import Guard
from train.interrupt import Interrupt
from train.loss import PixelLoss
from train.optim import lr_factor, set_lr
from train.saving import Saver
from train.track import Tracker, log


def train_step(engine: DeepSpeedEngine, micro_batches: list[Batch], loss: PixelLoss, job: Job) -> float:
    """One optimizer step over the global batch, of which `micro_batches` is this rank's share; returns its loss.

    What the loss is divided by, as its valid pixels, belongs to the whole global batch: it is summed over all ranks
    before the first backward pass. The factor undoes DeepSpeed's own mean over ranks and micro batches.
    """
    totals = job.sum(*loss.totals(torch.cat([batch.pixel_counts for batch in micro_batches])))
    factor = job.world_size * len(micro_batches)
    total = torch.zeros((), device=job.device)
    for batch in micro_batches:
        logits = engine(batch.images.to(job.device, non_blocking=True), batch.seeds)  # (B, C, h, w)
        labelled = None if batch.labelled is None else batch.labelled.to(job.device)
        share = loss.share(logits, batch.labels.to(job.device, non_blocking=True), totals, labelled)
        engine.backward(share * factor)
        engine.step()
        total += share.detach()
    forget_gradients(engine)
    return job.sum(total.item())[0]


@dataclass
class Training:
    """A run from an engine and shards to a trained model. Every rank must make the same calls.

    With an average of the weights, it is what is evaluated and exported; they themselves go to model_raw.safetensors.
    """

    engine: DeepSpeedEngine
    config: Config
    settings: dict  # DeepSpeed's
    train: Mixture
    order: Order
    val: ShardSet | None
    loss: PixelLoss
    state: RunState
    ema: Ema | None
    saver: Saver
    interrupt: Interrupt
    job: Job

    def fit(self) -> bool:
        """Train from `state.step` to the end; evaluate, save and export on the way. False: interrupted, and saved."""
        config, total, job = self.config, self.state.total_steps, self.job
        plan = BatchPlan(config.global_batch_size, config.micro_batch_size, job.rank, job.world_size)
        examples = TrainExamples(self.train, self.order, config.model.image_size, config.augment)
        batches = train_batches(
            examples, plan, self.state.step, total, config.data.workers, config.data.max_bad_fraction, job.on_gpu
        )
        self.tracker = Tracker(config, self.state.step, total, self.settings) if job.is_main else None
        guard = Guard(config.guard)
        self.scores: str | None = None  # the last validation's, on rank 0
        due = False
        self.engine.train()
        for step, micro_batches in enumerate(batches, start=self.state.step):
            stop, writing = job.sum(self.interrupt.requested, self.saver.writing)
            self.saver.commit_when_written(writing)
            if stop:
                self._leave(guard)
                return False
            lr = config.optimizer.lr * lr_factor(step, total, config.schedule)
            set_lr(self.engine.optimizer, lr)
            value = train_step(self.engine, micro_batches, self.loss, job)
            norm = float(self.engine.get_global_grad_norm())  # before clipping
            try:
                guard.look(step, value, norm, self.engine.skipped_steps, micro_batches)
            except TrainError:  # on all ranks
                self.saver.finish()
                raise
            if self.ema:
                self.saver.wait_until_copied()  # a step that was passed over has not
                self.ema.update(step)
            self._record(step, {"loss": value, "lr": lr, "gradient_norm": norm, "skipped_steps": guard.skipped})
            self.state = replace(self.state, step=step + 1)
            better = (step + 1 == total or self._is_due(config.evaluate.every_steps)) and self._validate_for_best()
            due = due or better or self._is_due(config.checkpoint.every_steps) or step + 1 == total
            if due and guard.in_a_row == 0:  # else it may be too late already: a start from there would end as this one
                self.saver.save(self.state)
                due = False
        self._end()
        return True

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _record(self, step: int, values: dict[str, float]) -> None:
        if self.tracker:
            self.tracker.bar.update()
            if (step + 1) % self.config.log_every == 0 or step + 1 == self.state.total_steps:
                self.tracker.train(step, values)

    def _leave(self, guard: Guard) -> None:
        """Raises TrainError if that cannot be saved."""
        self.saver.finish()
        if self.saver.last_step != self.state.step and guard.in_a_row == 0:
            self.saver.save(self.state)
            self.saver.finish()
            if self.saver.failed:
                raise TrainError(f"asked to leave after step {self.state.step}, which could not be saved: {self.saver.failed}")
        if self.tracker:
            self.tracker.finish()
            reason = self.interrupt.reason or "another process was asked to"
            there = f"after step {self.state.step}: {reason}; the same command goes on from step {self.saver.last_step}"
            log.info("stops %s", there)

    def _end(self) -> None:
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
                log.info("contact sheet  %s", _sheet_path(self.config, self.state.total_steps))

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
        self.engine.eval()
        scores, rows = evaluate(
            self.engine, self.val, config.model.image_size, job.device, config.evaluate.batch_size, config.data.workers,
            config.evaluate.pictures if job.is_main else 0, config.augment.keep_aspect, job.rank, job.world_size,
        )  # fmt: skip
        self.engine.train()
        compared = config.evaluate.every_steps is not None  # else what was best would be nowhere
        better = compared and scores.miou > (-1 if self.state.best_miou is None else self.state.best_miou)
        if better:
            self.state = replace(self.state, best_step=step, best_miou=scores.miou)
        if self.tracker is None:
            self.scores = ""
            return better
        try:
            self.scores, sheet = report(scores, rows, self.val, _sheet_path(config, step))
        except OSError as error:
            log.warning("%s: contact sheet not written: %s", _sheet_path(config, step), error)
            self.scores, sheet = report(scores, [], self.val, _sheet_path(config, step))
        per_class = {f"iou/{name}": iou for name, iou in zip(self.val.label_set.classes, scores.iou.tolist(), strict=True)}
        means = {"miou": scores.miou, "macc": scores.mean_accuracy, "aacc": scores.pixel_accuracy}
        self.tracker.validation(step, means | per_class, sheet)
        log.info("step %d  validation mIoU %.4f", step, scores.miou)
        return better

    def _export(self, name: str, ema_decay: float | None) -> Path:
        """Write the weights that the model has now to `name` in the output folder. Raises TrainError if that fails."""
        path, weights = self.config.output_dir / name, gather_weights(self.engine)
        try:
            if weights:  # rank 0
                save_safetensors(path, weights, self._metadata() | {"ema_decay": ema_decay})
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{path}: cannot be written: {error}; make room, then start again to continue") from None
        return path

    def _metadata(self) -> dict:
        return {
            **self.engine.module.describe(),
            "keep_aspect": self.config.augment.keep_aspect,
            "label_set": self.train.label_set.to_dict(),
            "origin": self.state.origin,
            "step": self.state.step,
            "revision": _revision(),
        }


def _sheet_path(config: Config, step: int) -> Path:
    return config.output_dir / "pictures" / f"step_{step:08d}.png"


def _revision() -> str:
    """The commit of this code, marked when it was changed; empty outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
