"""Checkpoints that exist or do not: a folder step_N gets its name when all in it has been written and synced.

    checkpoints/step_00001000/run.json                what the run was, and the other files with their checksums
                              rank_00000.safetensors  pieces of the parameters, their moments and their average, by name

Nothing in it depends on how many processes wrote it, or at which ZeRO stage: train.saving.
"""

import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.mixture import Mixture
from model.archs import get_arch
from model.weight_files import sync
from train import TrainError
from train.config import Config, training_order
from train.deepspeed_config import stage
from train.logs import log

META, UNFINISHED = "run.json", "unfinished_"
MAY_DIFFER = {
    "step", "total_steps", "updates", "loss_scale", "best_step", "best_miou", "origin", "world_size", "zero_stage", "bf16"
}  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """What a run must share with the checkpoint that it continues, and the one integer of its state."""

    step: int  # optimizer steps done; the data position is step * global_batch_size
    updates: int  # those of them that AdamW has taken
    loss_scale: float  # fp16's; else 1
    best_step: int | None  # the best validation's
    best_miou: float | None
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


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint."""

    bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "Entry":
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        return cls(path.stat().st_size, crc)

    def is_at(self, path: Path) -> bool:
        """Whether the file there is this one, whole."""
        try:
            return Entry.of(path) == self
        except OSError:
            return False


def fresh_state(config: Config, settings: dict[str, Any], train: Mixture, world_size: int, origin: dict) -> RunState:
    """That of a run that has done no step. settings: DeepSpeed's, resolved. origin: of its weights; {} for fresh ones."""
    arch = get_arch(config.model.arch)
    return RunState(
        step=0,
        updates=0,
        loss_scale=1,
        best_step=None,
        best_miou=None,
        total_steps=config.total_steps(training_order(config, train).epoch_length),
        origin=origin,
        world_size=world_size,
        zero_stage=stage(settings),
        bf16=settings.get("bf16", {}).get("enabled", False),
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        arch=arch.name,
        num_classes=train.label_set.num_classes,
        image_size=list(config.model.image_size),
        patch_padding=arch.padding(config.model.patch_padding),
        rope_precision=config.model.rope_precision if arch.family == "sapiens2" else "fp32",
        data_fingerprint=train.fingerprint,
        window=config.data.window,
        rare_share=config.data.rare_share,
        freeze=config.model.freeze,
        ema_decay=config.ema.decay,
    )


def name(step: int) -> str:
    return f"step_{step:08d}"


def read(path: Path) -> tuple[RunState, dict[str, Entry]]:
    """A checkpoint's run.json. Raises FileNotFoundError, ValueError (it is no JSON), and TrainError for anything else."""
    try:
        found = json.loads((path / META).read_text())
        return RunState(**found["run"]), {file: Entry(**entry) for file, entry in found["files"].items()}
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TrainError(f"{path / META}: not readable: {error.strerror}; check its permissions, and the disk") from None
    except (TypeError, LookupError, AttributeError) as error:
        what = f"{path / META}: of another version of this code: {error}"
        raise TrainError(f"{what}; go on with that one, or start anew in another output_dir") from None


def commit(unfinished: Path, state: RunState, files: dict[str, Entry]) -> Path:
    """Make a folder whose files have been written a checkpoint. Raises OSError, also if the files are not seen from here."""
    for file, entry in files.items():
        if (unfinished / file).stat().st_size != entry.bytes:
            raise OSError(f"{unfinished / file}: has another size than was written")
    folder, final = unfinished.parent, unfinished.with_name(name(state.step))
    for path in unfinished.iterdir():
        if path.name not in files:
            path.unlink()
    meta = {"run": asdict(state), "files": {file: asdict(entry) for file, entry in files.items()}}
    (unfinished / META).write_text(json.dumps(meta, indent=1))
    sync(unfinished / META)
    sync(unfinished)
    shutil.rmtree(final, ignore_errors=True)  # one that was damaged: its steps were done again
    os.replace(unfinished, final)
    sync(folder)
    return final


def prune(folder: Path, keep: int, state: RunState) -> None:
    """Remove all checkpoints but the newest `keep` and the best one, after that of `state` has been written.

    Newer ones were passed over at the start, as damaged: they must not take the places of sound ones.
    """
    for old in [path for path in _complete(folder) if path.name <= name(state.step)][:-keep]:
        if state.best_step is None or old.name != name(state.best_step):
            doomed = old.with_name(f"{UNFINISHED}{old.name}")  # so that the next start removes it if this is killed
            try:
                os.replace(old, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                log.warning("%s: not removed: %s", old, error)


def remove_unfinished(folder: Path) -> None:
    """What a run that was killed while saving has left."""
    for path in folder.glob(f"{UNFINISHED}*"):
        log.warning("%s: incomplete, removed", path)
        shutil.rmtree(path, ignore_errors=True)


def find(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's checkpoint folder, the newest first."""
    return _complete(folder)[::-1]


def locate(path: Path) -> list[Path]:
    """The checkpoints that `resume_from` means: one itself, or a run's, the newest first. Raises TrainError for none."""
    if (path / META).is_file() and _is_complete(path):
        return [path]
    found = find(path / "checkpoints") or find(path)
    if not found:
        raise TrainError(
            f"resume_from: {path} holds no complete checkpoint; name a run's output folder or one checkpoints/step_* in it"
        )
    return found


def sources(output_dir: Path, resume_from: Path | None) -> list[Path]:
    """The checkpoints to continue from, in the order to try them: output_dir's own before those that resume_from means;
    none for a new run.

    Raises TrainError if output_dir's are all damaged, if resume_from means none, or an older one of output_dir: what came
    after it would be in the way.
    """
    own = find(output_dir / "checkpoints")
    if not own and any((output_dir / "checkpoints").glob("step_*")):
        # Not a new run: it would write over what may still be saved.
        raise TrainError(f"{output_dir / 'checkpoints'}: none of the checkpoints is complete; start anew in another output_dir")
    given = locate(resume_from) if resume_from else []
    if own and given and given[0].resolve() != own[0].resolve() and given[0].resolve().parent == own[0].resolve().parent:
        raise TrainError(
            f"resume_from: {given[0]} is not the newest of output_dir, which is {own[0].name}; to go back to it, give another "
            "output_dir, or remove what is newer"
        )
    return own or given


def refuse_another_run(path: Path, then: RunState, now: RunState) -> None:
    """Raises TrainError if the checkpoint at `path`, of `then`, is none that `now` can go on from, naming what differs."""
    was, is_now = asdict(then), asdict(now)
    differing = [f"{key} was {was[key]}, is {is_now[key]}" for key in was if key not in MAY_DIFFER and was[key] != is_now[key]]
    if differing:
        raise TrainError(
            f"{path}: cannot be resumed: {'; '.join(differing)}; restore the setting, or start anew in another output_dir"
        )
    if then.step > now.total_steps:
        raise TrainError(
            f"{path}: stands at step {then.step}, beyond the run's {now.total_steps}; raise schedule.steps (or epochs)"
        )


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if _is_complete(path))


def _is_complete(path: Path) -> bool:
    try:
        _, files = read(path)
        complete = all((path / file).stat().st_size == entry.bytes for file, entry in files.items())
    except TrainError:  # which is a ValueError as well
        raise
    except (FileNotFoundError, ValueError):
        complete = False
    if not complete:
        log.warning("%s: incomplete, passed over", path)
    return complete
