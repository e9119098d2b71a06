"""The run: from an engine and shards to a trained model."""

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from data.loader import Batch, TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan, Order
from data.shards import ShardSet
from model.segmenter import Segmenter
from model.weight_files import save_safetensors
from train import TrainError, checkpoint
from train.checkpoint import RunState
from train.config import Config
from train.ema import Ema, averaged
from train.engine import DeepSpeedEngine, Job, gather_weights
from train.evaluate import evaluate, report
from train.loss import PixelLoss
from train.optim import lr_factor, set_lr
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
    return job.sum(total.item())[0]


def fit(
    engine: DeepSpeedEngine,
    config: Config,
    settings: dict,
    train: Mixture,
    order: Order,
    val: ShardSet | None,
    loss: PixelLoss,
    state: RunState,
    job: Job,
    ema: Ema | None,
) -> None:
    """Train from `state.step` to the end; evaluate, save and export on the way. Every rank must call it.

    With an average of the weights, it is what is evaluated and exported; they themselves go to model_raw.safetensors.
    """
    plan = BatchPlan(config.global_batch_size, config.micro_batch_size, job.rank, job.world_size)
    examples = TrainExamples(train, order, config.model.image_size, config.augment)
    tracker = Tracker(config, state.step, state.total_steps, settings) if job.is_main else None
    batches = train_batches(
        examples, plan, state.step, state.total_steps, config.data.workers, config.data.max_bad_fraction, job.on_gpu
    )
    engine.train()
    for step, micro_batches in enumerate(batches, start=state.step):
        factor = lr_factor(step, state.total_steps, config.schedule)
        set_lr(engine.optimizer, config.optimizer.lr, factor)
        value = train_step(engine, micro_batches, loss, job)
        norm = engine.get_global_grad_norm()  # before clipping; None at stage 0
        _refuse_non_finite(step, value, norm, engine.skipped_steps, micro_batches)
        if ema:
            ema.update(step)
        done = step + 1
        if tracker:
            tracker.bar.update()
        if tracker and (done % config.log_every == 0 or done == state.total_steps):
            values = {"loss": value, "lr": config.optimizer.lr * factor}
            tracker.train(step, values if norm is None else values | {"gradient_norm": float(norm)})
        if val and config.evaluate.every_steps and done % config.evaluate.every_steps == 0 and done < state.total_steps:
            with averaged(ema):
                _validate(engine, config, val, done, tracker, job)
        if done % config.checkpoint.every_steps == 0 or done == state.total_steps:
            _save(engine, config, replace(state, step=done), job, ema)
    with averaged(ema):
        text = _validate(engine, config, val, state.total_steps, tracker, job) if val else ""
        path = _export(engine, config, train, state, "model.safetensors", config.ema.decay)
    raw_path = _export(engine, config, train, state, "model_raw.safetensors", None) if ema else None
    if job.is_main:
        tracker.finish()
        log.info("\n%s\nmodel          %s", text, path)
        if raw_path:
            log.info("not averaged   %s", raw_path)
        if val and config.evaluate.pictures:
            log.info("contact sheet  %s", _sheet_path(config, state.total_steps))


def _refuse_non_finite(step: int, loss: float, norm: float | None, skipped: int, batches: list[Batch]) -> None:
    """Raises TrainError. DeepSpeed passes over a step with such gradients in silence, and at stage 0 it takes it."""
    if math.isfinite(loss) and (norm is None or math.isfinite(norm)) and not skipped:
        return
    keys = ", ".join(key for batch in batches for key in batch.keys)
    raise TrainError(
        f"step {step}: loss {loss}, gradient norm {norm}: not finite (this rank's samples: {keys}); lower optimizer.lr, "
        "then start again to continue from the last checkpoint"
    )


def _validate(
    engine: DeepSpeedEngine, config: Config, val: ShardSet, step: int, tracker: Tracker | None, job: Job
) -> str:
    engine.eval()
    scores, rows = evaluate(
        engine, val, config.model.image_size, job.device, config.evaluate.batch_size, config.data.workers,
        config.evaluate.pictures if job.is_main else 0, config.augment.keep_aspect, job.rank, job.world_size,
    )  # fmt: skip
    engine.train()
    if tracker is None:
        return ""
    try:
        text, sheet = report(scores, rows, val, _sheet_path(config, step))
    except OSError as error:
        log.warning("%s: contact sheet not written: %s", _sheet_path(config, step), error)
        text, sheet = report(scores, [], val, _sheet_path(config, step))
    per_class = {f"iou/{name}": iou for name, iou in zip(val.label_set.classes, scores.iou.tolist(), strict=True)}
    means = {"miou": scores.miou, "macc": scores.mean_accuracy, "aacc": scores.pixel_accuracy}
    tracker.validation(step, means | per_class, sheet)
    log.info("step %d  validation mIoU %.4f", step, scores.miou)
    return text


def _sheet_path(config: Config, step: int) -> Path:
    return config.output_dir / "pictures" / f"step_{step:08d}.png"


def _save(engine: DeepSpeedEngine, config: Config, state: RunState, job: Job, ema: Ema | None) -> None:
    if state.zero_stage == 0 and not all(p.isfinite().all() for p in engine.module.parameters()):
        # Stage 0 tells no gradient norm, and a checkpoint of such weights would end every later start.
        raise TrainError(f"step {state.step}: weights are not finite; lower optimizer.lr, then start again")
    path = checkpoint.save(engine, config.output_dir / "checkpoints", state, config.checkpoint.keep, ema)
    if job.is_main:
        log.info("step %d  checkpoint %s", state.step, path)


def _export(
    engine: DeepSpeedEngine, config: Config, train: Mixture, state: RunState, name: str, ema_decay: float | None
) -> Path:
    """Write the weights that the model has now to `name` in the output folder. Every rank must call it."""
    path, weights = config.output_dir / name, gather_weights(engine)
    if weights:  # rank 0
        save_safetensors(path, weights, _metadata(engine.module, config, train, state) | {"ema_decay": ema_decay})
    return path


def _metadata(model: Segmenter, config: Config, train: Mixture, state: RunState) -> dict:
    return {
        **model.describe(),
        "keep_aspect": config.augment.keep_aspect,
        "label_set": train.label_set.to_dict(),
        "origin": state.origin,
        "step": state.total_steps,
        "revision": _revision(),
    }


def _revision() -> str:
    """The commit of this code, marked when it was changed; empty outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
