"""From a checked experiment to a running one: job, model, weights, engine, checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from data.mixture import Mixture
from data.order import Order
from data.shards import ShardSet
from model.segmenter import Segmenter, build_segmenter
from model.weight_files import HUB
from model.weights import load_weights
from train import TrainError, checkpoint, deepspeed_config
from train.checkpoint import RunState
from train.config import Config, training_order
from train.ema import Ema
from train.engine import Job, build_engine, join_job
from train.loop import fit
from train.loss import PixelLoss, class_weights
from train.optim import freeze
from train.track import log, start_logging


def start(config: Config, settings: dict[str, Any], train: Mixture, val: ShardSet | None) -> None:
    """Join the job and train to the end, with the resolved DeepSpeed `settings`. Every process of the job must call it."""
    job = join_job()
    try:
        start_logging(config.output_dir, job.rank)
    except OSError as error:
        raise TrainError(f"output_dir: {config.output_dir} cannot be written: {error.strerror}; choose another") from None
    torch.manual_seed(config.seed)  # the same fresh weights on every rank
    model = _build_model(config, train)
    resume = _resume_point(config)
    origin: dict[str, Any] = {}
    if config.load_from and not resume:
        report = load_weights(model, config.load_from, train.label_set.classes, config.load_partial, config.load_classes)
        origin = {
            "weights": config.load_from if config.load_from.startswith(HUB) else report.path.name,
            "sha256": _sha256(report.path) if job.is_main else "",
            "licence": report.licence,
        }
        log.info("%s", report.summary())
    model.set_grad_checkpointing(config.model.recompute)
    freeze(model, config.model.freeze)
    if config.model.freeze is not None and not config.load_from and not resume:
        log.warning("model.freeze without load_from: what is frozen keeps its random weights")
    engine = build_engine(model, config, settings, job)
    ema = Ema(engine, config.ema.decay) if config.ema.decay is not None else None
    order = training_order(config, train)
    state = _fresh_state(model, config, settings, train, order, origin, job)
    if resume:
        state = checkpoint.load(engine, resume, state, ema)
        log.info("resumed at step %d from %s", state.step, resume)
        if config.resume_from and not resume.resolve().is_relative_to(config.resume_from.resolve()):
            log.info("resume_from is passed over: output_dir has checkpoints of its own")
        if config.load_from:
            log.info("load_from is passed over: the checkpoint has the weights")
    if job.is_main:
        (config.output_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        log.info("%s", _headline(config, train, val, settings, state, job))
    weights = class_weights(config.loss.class_weights, train.pixel_counts, train.label_set)
    loss = PixelLoss(weights, train.label_set, config.loss.label_smoothing, config.loss.dice)
    fit(engine, config, settings, train, order, val, loss, state, job, ema)
    dist.barrier()  # the others wait for rank 0's export, else the launcher takes their leaving for the end
    dist.destroy_process_group()


def _build_model(config: Config, train: Mixture) -> Segmenter:
    spec = config.model
    return build_segmenter(
        spec.arch, train.label_set.num_classes, spec.image_size, spec.patch_padding, spec.rope_precision, spec.dropout,
        spec.drop_path,
    )  # fmt: skip


def _resume_point(config: Config) -> Path | None:
    """The checkpoint to continue from, the same on all ranks: this output folder's own before `resume_from`."""
    found = [checkpoint.source(config.output_dir, config.resume_from) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def _fresh_state(
    model: Segmenter, config: Config, settings: dict, train: Mixture, order: Order, origin: dict, job: Job
) -> RunState:
    return RunState(
        step=0,
        total_steps=config.total_steps(order.epoch_length),
        origin=origin,
        world_size=job.world_size,
        zero_stage=deepspeed_config.stage(settings),
        bf16=settings.get("bf16", {}).get("enabled", False),
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        arch=model.arch.name,
        num_classes=model.num_classes,
        image_size=list(model.image_size),
        patch_padding=model.patch_padding,
        rope_precision=model.rope_precision,
        data_fingerprint=train.fingerprint,
        window=config.data.window,
        rare_share=config.data.rare_share,
        freeze=config.model.freeze,
        ema_decay=config.ema.decay,
    )


def _headline(config: Config, train: Mixture, val: ShardSet | None, settings: dict, state: RunState, job: Job) -> str:
    return (
        f"{config.model.arch} at {config.model.image_size[0]}x{config.model.image_size[1]}, "
        f"{train.label_set.num_classes} classes ({train.label_set.name}); {len(train)} training and "
        f"{len(val) if val else 0} validation images\n"
        f"{job.world_size} x {job.device.type}, ZeRO-{state.zero_stage}, batch {config.global_batch_size} = "
        f"{config.micro_batch_size} x {job.world_size} x {settings['gradient_accumulation_steps']} accumulated; "
        f"steps {state.step}..{state.total_steps}; output {config.output_dir}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
