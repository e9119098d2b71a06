"""Checkpoints that exist or do not: written beside, synced, then renamed."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from train import TrainError

if TYPE_CHECKING:  # importing DeepSpeed takes seconds; `locate` needs none of it
    from deepspeed import DeepSpeedEngine

    from train.ema import Ema

META = "run.json"
MAY_DIFFER = {"step", "total_steps", "origin"}


@dataclass(frozen=True)
class RunState:
    """What a run must share with the checkpoint that it continues, and the one integer of its state."""

    step: int  # optimizer steps done; the data position is step * global_batch_size
    total_steps: int
    origin: dict  # the weights that the run started from
    world_size: int
    zero_stage: int
    bf16: bool
    global_batch_size: int
    seed: int
    arch: str
    num_classes: int
    image_size: list[int]
    patch_padding: int
    rope_precision: str
    data_fingerprint: str
    window: int | None
    rare_share: float | None
    freeze: str | int | None
    ema_decay: float | None


def save(engine: "DeepSpeedEngine", folder: Path, state: RunState, keep: int, ema: "Ema | None" = None) -> Path:
    """Write folder/step_N and remove all but the newest `keep`. Every rank must call it."""
    final = folder / f"step_{state.step:08d}"
    unfinished = folder / f"unfinished_{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while saving
        unfinished.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(folder, tag=unfinished.name, save_latest=False)
    if ema:
        ema.save(unfinished)
    dist.barrier()
    if dist.get_rank() == 0:
        (unfinished / META).write_text(json.dumps(asdict(state), indent=1))
        _sync(unfinished)
        os.replace(unfinished, final)
        _write_latest(folder, final.name)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find(folder: Path) -> Path | None:
    """The newest complete checkpoint in a run's checkpoint folder, if there is one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def locate(path: Path) -> Path:
    """The checkpoint that `resume_from` means: itself, or the newest of a run's. Raises TrainError if there is none."""
    if (path / META).is_file():
        return path
    found = find(path / "checkpoints") or find(path)
    if found is None:
        raise TrainError(
            f"resume_from: {path} holds no complete checkpoint; name a run's output folder or one checkpoints/step_* in it"
        )
    return found


def source(output_dir: Path, resume_from: Path | None) -> Path | None:
    """The checkpoint to continue from: output_dir's own newest before the one that resume_from means; None for a new run.

    Raises TrainError if resume_from means none, or an older one of output_dir: what came after it would be in the way.
    """
    own = find(output_dir / "checkpoints")
    given = locate(resume_from) if resume_from else None
    if own and given and given.resolve() != own.resolve() and given.resolve().parent == own.resolve().parent:
        raise TrainError(
            f"resume_from: {given} is not the newest of output_dir, which is {own.name}; to go back to it, give another "
            "output_dir, or remove what is newer"
        )
    return own or given


def load(engine: "DeepSpeedEngine", checkpoint: Path, now: RunState, ema: "Ema | None" = None) -> RunState:
    """Put the engine and the average into the checkpoint's state; returns `now` at its step. Every rank must call it.

    Raises TrainError naming what differs, when the run could not go on as it was.
    """
    try:
        then = RunState(**json.loads((checkpoint / META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainError(f"{checkpoint / META}: not readable: {error}; resume from another checkpoint") from None
    may_differ = MAY_DIFFER | ({"world_size"} if now.zero_stage == 0 else set())
    was, is_now = asdict(then), asdict(now)
    differing = [f"{key} was {was[key]}, is {is_now[key]}" for key in was if key not in may_differ and was[key] != is_now[key]]
    if differing:
        raise TrainError(
            f"{checkpoint}: cannot be resumed: {'; '.join(differing)}; "
            "restore the setting, or start anew in another output_dir"
        )
    if then.step > now.total_steps:
        raise TrainError(f"{checkpoint}: stands at step {then.step}, beyond the schedule's {now.total_steps}; lengthen it")
    loaded, _ = engine.load_checkpoint(checkpoint.parent, tag=checkpoint.name)
    if loaded is None:  # DeepSpeed says so and nothing more: the run would start over in silence
        raise TrainError(f"{checkpoint}: DeepSpeed found nothing to load; resume from another checkpoint")
    if ema:
        ema.load(checkpoint)
    return replace(now, step=then.step, origin=then.origin)


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"step_*/{META}"))


def _write_latest(folder: Path, name: str) -> None:
    """DeepSpeed's own tools (zero_to_fp32.py) look the newest checkpoint up in `latest`; resuming does not need it."""
    beside = folder / "latest.new"
    beside.write_text(name)
    _sync_path(beside)
    os.replace(beside, folder / "latest")
    _sync_path(folder)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_path(path)
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
