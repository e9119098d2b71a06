"""The run: from an engine and shards to a trained model."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from data.loader import Batch, TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan, Order
from data.shards import ShardSet
from model.weights import save_safetensors
from train import TrainError, checkpoint
from train.checkpoint import RunState
from train.config import Config
from train.engine import DeepSpeedEngine, Job, gather_weights
from train.evaluate import evaluate, report
from train.loss import PixelLoss
from train.optim import lr_factor, set_lr
from train.track import Tracker, log


def train_step(engine: DeepSpeedEngine, micro_batches: list[Batch], loss: PixelLoss, job: Job) -> float:
    """One optimizer step over the global batch, of which `micro_batches` is this rank's share; returns the mean loss.

    The loss is divided by the valid pixels of the whole global batch, so the counts are summed over all ranks before
    the first backward pass. The factor undoes DeepSpeed's own mean over ranks and micro batches.
    """
    (weight,) = job.sum(sum(loss.weight_of(batch.pixel_counts) for batch in micro_batches))
    factor = job.world_size * len(micro_batches) / (weight or 1.0)
    total = torch.zeros((), device=job.device)
    for batch in micro_batches:
        logits = engine(batch.images.to(job.device, non_blocking=True), batch.seeds)  # (B, C, h, w)
        labelled = None if batch.labelled is None else batch.labelled.to(job.device)
        loss_sum = loss.sum(logits, batch.labels.to(job.device, non_blocking=True), labelled)
        engine.backward(loss_sum * factor)
        engine.step()
        total += loss_sum.detach()
    return job.sum(total.item())[0] / (weight or 1.0)


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
) -> None:
    """Train from `state.step` to the end; evaluate, save and export on the way. Every rank must call it."""
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
        done = step + 1
        if tracker:
            tracker.bar.update()
        if tracker and (done % config.log_every == 0 or done == state.total_steps):
            values = {"loss": value, "lr": config.optimizer.lr * factor}
            tracker.train(step, values if norm is None else values | {"gradient_norm": float(norm)})
        if val and config.evaluate.every_steps and done % config.evaluate.every_steps == 0 and done < state.total_steps:
            _validate(engine, config, val, done, tracker, job)
        if done % config.checkpoint.every_steps == 0 or done == state.total_steps:
            _save(engine, config, replace(state, step=done), job)
    text = _validate(engine, config, val, state.total_steps, tracker, job) if val else ""
    weights = gather_weights(engine)
    if job.is_main:
        tracker.finish()
        path = config.output_dir / "model.safetensors"
        save_safetensors(path, weights, _metadata(config, train, state))
        log.info("\n%s\nmodel          %s", text, path)
        if val:
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


def _save(engine: DeepSpeedEngine, config: Config, state: RunState, job: Job) -> None:
    if state.zero_stage == 0 and not all(p.isfinite().all() for p in engine.module.parameters()):
        # Stage 0 tells no gradient norm, and a checkpoint of such weights would end every later start.
        raise TrainError(f"step {state.step}: weights are not finite; lower optimizer.lr, then start again")
    path = checkpoint.save(engine, config.output_dir / "checkpoints", state, config.checkpoint.keep)
    if job.is_main:
        log.info("step %d  checkpoint %s", state.step, path)


def _metadata(config: Config, train: Mixture, state: RunState) -> dict:
    return {
        "arch": config.model.arch,
        "image_size": list(config.model.image_size),
        "patch_padding": config.model.patch_padding,
        "keep_aspect": config.augment.keep_aspect,
        "num_classes": train.label_set.num_classes,
        "label_set": train.label_set.to_dict(),
        "origin": state.origin,
        "step": state.total_steps,
    }
