"""From a checked experiment to a running one: job, model, weights, engine, checkpoint."""

import fcntl
import hashlib
import json
import platform
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import yaml

from data.mixture import Mixture
from data.shards import ShardSet
from model.recompute import recompute
from model.segmenter import Segmenter, build_segmenter
from model.weight_files import HUB
from model.weights import load_weights
from train import TrainError, checkpoint
from train.checkpoint import RunState
from train.clock import StepClock
from train.config import Config, training_order
from train.ema import Ema
from train.engine import Job, build_engine, join_job
from train.host_facts import packages, revision
from train.interrupt import INTERRUPTED, Interrupt
from train.logs import log, start_logging
from train.loop import Training
from train.loss import PixelLoss, class_weights
from train.masters import Masters
from train.optim import freeze, lr_scales
from train.saving import Saver
from train.watchdog import Watchdog


def start(config: Config, settings: dict[str, Any], train: Mixture, val: ShardSet | None) -> None:
    """Join the job and train to the end, with the resolved DeepSpeed `settings`. Every process of the job must call it."""
    job = join_job()
    try:
        start_logging(config.output_dir, job.rank)
    except OSError as error:
        raise TrainError(f"output_dir: {config.output_dir} cannot be written: {error.strerror}; choose another") from None
    interrupt = Interrupt(config.output_dir, job.is_main)
    claimed = None
    try:
        claimed = _claim(config.output_dir) if job.is_main else None
        done = _train(config, settings, train, val, interrupt, job)
        dist.barrier()  # the others wait for rank 0's export, else the launcher takes their leaving for the end
    except RuntimeError as error:
        if interrupt.a_fellow_is_gone():
            raise TrainError("another process of the run has ended; its error stands above, or in log.txt") from error
        raise
    interrupt.leaving()
    dist.destroy_process_group()
    if claimed:
        claimed.close()
    if not done:
        sys.exit(INTERRUPTED)


def _train(
    config: Config, settings: dict[str, Any], train: Mixture, val: ShardSet | None, interrupt: Interrupt, job: Job
) -> bool:
    """Build everything, resume, and fit. False: interrupted, and saved."""
    torch.manual_seed(config.seed)  # the same fresh weights on every rank
    model = build_model(config, train.label_set.num_classes)
    resume = _resume_points(config)
    origin: dict[str, Any] = {}
    if config.load_from and not resume:
        report = load_weights(model, config.load_from, train.label_set.classes, config.load_partial, config.load_classes)
        origin = {
            "weights": config.load_from if config.load_from.startswith(HUB) else report.path.name,
            "sha256": _sha256(report.path) if job.is_main else "",
            "licence": report.licence,
        }
        log.info("%s", report.summary())
    prepare(model, config)
    if config.model.freeze is not None and not config.load_from and not resume:
        log.warning("model.freeze without load_from: what is frozen keeps its random weights; set load_from")
    scales = lr_scales(model, config.optimizer)
    engine = build_engine(model, config, settings)
    masters = Masters(engine, scales)
    ema = Ema(masters, config.ema.decay) if config.ema.decay is not None else None
    saver = Saver(config.output_dir / "checkpoints", masters, ema, config.checkpoint.keep, job)
    order = training_order(config, train)
    state = checkpoint.fresh_state(config, settings, train, job.world_size, origin)
    if resume:
        path, state = saver.restore(resume, state)
        log.info("resumed at step %d from %s", state.step, path)
        if config.resume_from and not path.resolve().is_relative_to(config.resume_from.resolve()):
            log.info("resume_from is passed over: output_dir has checkpoints of its own")
        if config.load_from:
            log.info("load_from is passed over: the checkpoint has the weights")
    about = _about(settings, job) if job.is_main else {}
    if job.is_main:
        _write(config.output_dir / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        _write(config.output_dir / "environment.json", json.dumps(about, indent=2))
        log.info("%s", _headline(config, train, val, settings, state, job))
    weights = class_weights(config.loss.class_weights, train.pixel_counts, train.label_set)
    loss = PixelLoss(weights, train.label_set, config.loss.label_smoothing, config.loss.dice)
    clock = StepClock(job.on_gpu)
    training = Training(
        engine, config, about, train, order, val, loss, min(scales.values()), state, ema, saver, interrupt, clock, job
    )
    with Watchdog(clock, config.guard.hang_minutes, config.output_dir, job):
        return training.fit()


def _claim(output_dir: Path) -> IO | None:
    """Keeps other runs out of the folder for as long as it is open. Raises TrainError if one is at work."""
    deadline = time.monotonic() + 15  # seconds: workers of a run that was killed hold its lock until they notice
    while True:
        try:
            file = (output_dir / "log.txt").open("a")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TrainError(f"output_dir: another run is at work in {output_dir}; end it, or choose another") from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return None


def build_model(config: Config, num_classes: int) -> Segmenter:
    """The experiment's, with fresh weights."""
    spec = config.model
    return build_segmenter(
        spec.arch, num_classes, spec.image_size, spec.patch_padding, spec.rope_precision, spec.dropout, spec.drop_path
    )


def prepare(model: Segmenter, config: Config) -> None:
    """Have it recompute, compile and freeze what the experiment wants, once, before it becomes an engine's."""
    recompute(model, config.model.recompute)
    if config.compile:
        for block in model.backbone.blocks:
            block.compile()
    freeze(model, config.model.freeze)


def _resume_points(config: Config) -> list[Path]:
    """The checkpoints to continue from, the same on all ranks: see checkpoint.sources."""
    found: list = [None]
    if dist.get_rank() == 0:
        checkpoint.remove_unfinished(config.output_dir / "checkpoints")
        found = [checkpoint.sources(config.output_dir, config.resume_from)]
    dist.broadcast_object_list(found)
    return found[0]


def _headline(config: Config, train: Mixture, val: ShardSet | None, settings: dict, state: RunState, job: Job) -> str:
    return (
        f"{config.model.arch} at {config.model.image_size[0]}x{config.model.image_size[1]}, "
        f"{train.label_set.num_classes} classes ({train.label_set.name}); {len(train)} training and "
        f"{len(val) if val else 0} validation images\n"
        f"{job.world_size} x {job.device.type}, ZeRO-{state.zero_stage}, batch {config.global_batch_size} = "
        f"{config.micro_batch_size} x {job.world_size} x {settings['gradient_accumulation_steps']} accumulated; "
        f"gradients added up in {settings.get('data_types', {}).get('grad_accum_dtype', 'fp32')}, "
        f"sent in {settings['communication_data_type']}; "
        f"steps {state.step}..{state.total_steps}; output {config.output_dir}"
    )


def _about(settings: dict[str, Any], job: Job) -> dict[str, Any]:
    """What is not in the configuration, for those who look at the run later."""
    return {
        "revision": revision(),
        "command": shlex.join([Path(sys.executable).name, "-m", "train", *sys.argv[1:]]),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(job.device) if job.on_gpu else f"{platform.machine()} CPU",
        "processes": job.world_size,
        "python": platform.python_version(),
        "packages": packages(),
        "deepspeed_settings": settings,
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        log.warning("%s: not written: %s", path, error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
