"""The training's state to checkpoints and back, on any number of processes and at any ZeRO stage.

A thread of each rank copies its pieces to memory of the CPU, while the next batch goes forward and backward, and writes them;
only the next update waits for the copies. When the ranks find that all have written, rank 0 makes the folder a checkpoint. A
piece is named by what it is, its parameter and the element that it starts at: a rank that resumes reads the elements it
keeps, whoever has written them.
"""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.weight_files import sync
from train import TrainError, checkpoint
from train.checkpoint import UNFINISHED, Entry, RunState
from train.ema import Ema
from train.engine import Job
from train.logs import log
from train.masters import Masters, State


class Saver:
    """Writes checkpoints while training goes on. Every rank must make the same calls, at the same steps.

    A checkpoint that cannot be written (a full disk) is told and passed over; the ones before it stay.
    """

    def __init__(self, folder: Path, masters: Masters, ema: Ema | None, keep: int, job: Job) -> None:
        self.folder, self.masters, self.ema, self.keep, self.job = folder, masters, ema, keep, job
        self.copies: dict[str, torch.Tensor] = {}  # kept: pinned memory is slow to get
        self.thread: threading.Thread | None = None
        self.remover: threading.Thread | None = None  # of old checkpoints, on rank 0
        self.copied = threading.Event()
        self.copied.set()
        self.failed: str | None = None  # why the last checkpoint was not written
        self.last_step = 0  # that is saved, or that the run came from
        self.times: tuple[float, float] | None = None  # rank 0's last `stall`, and the seconds that its part took to be written
        self.stall = 0.0  # seconds that training has waited for the last checkpoint
        masters.adamw.register_step_pre_hook(lambda *_: self.wait_until_copied())

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, state: RunState) -> None:
        """Begin to write folder/step_N. Nothing of the training's state may change before `wait_until_copied`."""
        started = time.monotonic()
        self.finish()
        pieces = self.masters.state() | (self.ema.state() if self.ema else {})
        self.state = replace(state, updates=self.masters.updates, loss_scale=self.masters.loss_scale)
        updated = torch.cuda.current_stream().record_event() if self.job.on_gpu else None
        self.copied.clear()
        self.thread = threading.Thread(target=self._write, args=(pieces, updated), name="checkpoint-writer")
        self.thread.start()
        self.stall = time.monotonic() - started

    def wait_until_copied(self) -> None:
        """Every update of the optimizer calls it by itself."""
        started = time.monotonic()
        self.copied.wait()
        self.stall += time.monotonic() - started

    def commit_when_written(self, ranks_writing: float) -> None:
        """To be called at every step with the number of ranks that are `writing`, as all ranks know it."""
        if self.thread and not ranks_writing:
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is written, and make it one."""
        if self.thread is None:
            return
        started = time.monotonic()
        self.thread.join()
        self.thread = None
        results: list = [None] * self.job.world_size
        dist.all_gather_object(results, self.result)
        errors = [f"rank {rank}: {result}" for rank, result in enumerate(results) if isinstance(result, str)]
        self.failed = "; ".join(errors) or None
        step = self.state.step
        if self.job.is_main and not errors:
            try:
                files = {_file(rank): entry for rank, entry in enumerate(results)}
                path = checkpoint.commit(self._unfinished, self.state, files)
                # In a thread as well: the file system takes its time for large files.
                if self.remover:
                    self.remover.join()
                prune = (self.folder, self.keep, self.state)
                self.remover = threading.Thread(target=checkpoint.prune, args=prune, name="checkpoint-remover")
                self.remover.start()
                self.stall += time.monotonic() - started
                self.times = self.stall, self.seconds
                log.info("step %d  checkpoint %s (training waited %.2f s, written in %.2f s)", step, path, *self.times)
            except OSError as error:
                self.failed = f"rank 0: {error}"
        told = [self.failed]
        dist.broadcast_object_list(told)
        self.failed = told[0]
        if not self.failed:
            self.last_step = self.state.step
        elif self.job.is_main:
            log.error("step %d  checkpoint not written, the ones before it stay: %s", step, self.failed)
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def restore(self, candidates: list[Path], now: RunState) -> tuple[Path, RunState]:
        """Put the training into the state of the first sound one of `candidates`; returns it, and `now` at its step.

        Raises TrainError: the run could not go on as it was, naming what differs; or none is sound.
        """
        for path in candidates:
            then, files = checkpoint.read(path)
            checkpoint.refuse_another_run(path, then, now)
            if damaged := self._damaged(path, files):
                log.warning("%s: damaged: %s; passed over", path, ", ".join(damaged))
                continue
            read = Pieces(path, list(files))
            self.masters.restore(read, then.updates)
            self.masters.loss_scale = then.loss_scale
            if self.ema:
                self.ema.restore(read)
            self.last_step = then.step
            return path, replace(now, step=then.step, origin=then.origin, best_step=then.best_step, best_miou=then.best_miou)
        raise TrainError(f"{candidates[0].parent}: no checkpoint there is sound; start anew in another output_dir")

    def _damaged(self, path: Path, files: dict[str, Entry]) -> list[str]:
        """The files whose checksum is another one; the ranks share the work."""
        mine = sorted(files)[self.job.rank :: self.job.world_size]
        found: list = [None] * self.job.world_size
        dist.all_gather_object(found, [file for file in mine if not files[file].is_at(path / file)])
        return sorted(sum(found, []))

    @property
    def _unfinished(self) -> Path:
        return self.folder / f"{UNFINISHED}{checkpoint.name(self.state.step)}"

    def _write(self, pieces: State, updated: torch.cuda.Event | None) -> None:
        started = time.monotonic()
        path = self._unfinished / _file(self.job.rank)
        try:
            try:
                self._copy(pieces, updated)
            finally:
                self.copied.set()
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.copies, path)
            sync(path)
            self.result: Entry | str = Entry.of(path)
        except (OSError, SafetensorError) as error:
            self.result = f"{path}: {error}"
        except BaseException as error:  # told by `finish`: a thread's own last words are easily overlooked
            self.result = f"{path}: {type(error).__name__}: {error}"
        self.seconds = time.monotonic() - started

    def _copy(self, pieces: State, updated: torch.cuda.Event | None) -> None:
        """On a GPU in a stream of its own, behind the update that the pieces come from."""
        stream = torch.cuda.Stream(self.job.device) if updated else None
        with torch.cuda.stream(stream):  # None: nothing
            if stream:
                stream.wait_event(updated)
            copies = {}
            for (kind, name, start), piece in pieces.items():
                key = f"{kind}/{name}/{start}"
                copy = self.copies.get(key)
                if copy is None:
                    copy = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=self.job.on_gpu)
                copies[key] = copy.copy_(piece, non_blocking=True)
            if stream:
                stream.synchronize()
        self.copies = copies


class Pieces:
    """Reads elements of a checkpoint's parameters, whichever files they lie in: a `train.masters.Read`."""

    def __init__(self, path: Path, files: list[str]) -> None:
        self.path = path
        self.found: dict[tuple[str, str], list] = {}
        for file in files:
            pieces = safe_open(path / file, framework="pt")
            for key in pieces.keys():
                kind, name, start = key.split("/")
                piece = pieces.get_slice(key)
                self.found.setdefault((kind, name), []).append((int(start), piece.get_shape()[0], piece))

    def __call__(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Raises TrainError if any is missing."""
        parts, at = [], start
        for first, length, piece in sorted(self.found.get((kind, name), []), key=lambda entry: entry[0]):
            if first <= at < min(first + length, start + numel):
                end = min(first + length, start + numel)
                parts.append(piece[at - first : end - first])
                at = end
        if at < start + numel:
            raise TrainError(f"{self.path}: lacks {kind} of {name} from element {at} on; resume from another checkpoint")
        return torch.cat(parts)


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
