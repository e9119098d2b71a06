"""An exponential moving average of the weights, in shards where DeepSpeed shards the optimizer's fp32 weights."""

import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train import TrainError
from train.engine import DeepSpeedEngine, Masters


class Ema:
    """The average of an engine's trained weights, in fp32; each rank keeps that of the part whose optimizer it runs.

    Takes 4 bytes for each trained parameter at ZeRO stage 0, at stages 1-3 that over the number of processes, and no
    communication but for showing it. Step t (0, 1, ...) moves it by 1 - min(decay, (1 + t) / (10 + t)) of the way to the
    weights: with `decay` from the start on, the untrained head would be in it for some 3 / (1 - decay) steps.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        """Starts at the engine's present weights."""
        self.decay = decay
        self.masters = Masters(engine)
        self.sharded = self.masters.stage > 0
        self.average = [master.clone() for master in self.masters.read()]

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0, 1, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.average, self.masters.read(), None)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has the average for its weights inside, and its own ones, bit for bit, afterwards. Every rank must
        enter and leave it: both gather the weights."""
        self._exchange()
        yield  # no `finally`: a rank that leaves by an exception would wait for the others for ever
        self._exchange()

    def save(self, folder: Path) -> None:
        """Write this rank's part into a checkpoint folder."""
        if self.sharded or dist.get_rank() == 0:
            torch.save(self.average, self._file(folder))

    def load(self, folder: Path) -> None:
        """Take this rank's part from a checkpoint folder. Raises TrainError if it is not there."""
        path = self._file(folder)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise TrainError(f"{path}: not readable: {' '.join(str(error).split())}; resume from another checkpoint") from None
        for mine, value in zip(self.average, saved, strict=True):
            mine.copy_(value)

    def _file(self, folder: Path) -> Path:
        return folder / f"ema_rank_{dist.get_rank() if self.sharded else 0:05d}.pt"

    def _exchange(self) -> None:
        weights = [master.clone() for master in self.masters.read()]
        self.masters.write(self.average)
        self.average = weights


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """`ema.in_model()`, or nothing for none."""
    return ema.in_model() if ema else nullcontext()
