"""Which sample goes where: a pure function of (seed, position), whatever the ranks, workers and restarts.

A position counts the samples that a run has taken since its start. Step t of a global batch of B takes the positions
[t*B, t*B + B); position p belongs to epoch p // N, so that a batch may reach over an epoch's end and no sample is
dropped or repeated. Resuming needs the step alone, and no position needs those before it.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

GOLDEN = 0.6180339887498949  # the offset whose multiples fill the unit interval most evenly


@dataclass(frozen=True, eq=False)
class Order:
    """A new shuffle of all samples in every epoch.

    Args:
        num_samples: of the training set, up to 2**32.
        seed: of the run.
        window: None for a uniform shuffle. Else shards come in a random order, and samples change places only within
            stretches of so many, so that few shards are being read at a time: for network disks and remote shards.
        shard_starts: first sample of each shard, ascending from 0; needed with `window`.
        repeats: float (num_samples,): how many times each sample comes in an epoch; between the whole numbers beside it
            in any one epoch, exactly so on average. None: once each.
    """

    num_samples: int
    seed: int
    window: int | None = None
    shard_starts: np.ndarray | None = None
    repeats: np.ndarray | None = None
    _epochs: OrderedDict = field(default_factory=OrderedDict, repr=False)

    @cached_property
    def epoch_length(self) -> int:
        """Positions in one epoch."""
        return self.num_samples if self.repeats is None else max(1, round(float(self.repeats.sum(dtype=np.float64))))

    def sample_at(self, position: int) -> int:
        """The index (0..num_samples-1) of the sample that stands at `position` (0..) of the run."""
        epoch, offset = divmod(position, self.epoch_length)
        return int(self._epoch(epoch)[offset])

    def generator(self, position: int) -> np.random.Generator:
        """The random numbers of that position's augmentation and dropout; no other source of chance may be used."""
        epoch, offset = divmod(position, self.epoch_length)
        return np.random.default_rng((self.seed, epoch, offset, 1))  # 1: else offset 0 would be the shuffle's stream

    def _epoch(self, epoch: int) -> np.ndarray:
        """uint32 (epoch_length,): the epoch's samples in their order."""
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # a batch may reach over the border of two
                self._epochs.popitem(last=False)
            self._epochs[epoch] = self._shuffled(epoch)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        samples = self._drawn(epoch)
        if self.window is None:
            rng.shuffle(samples)
            return samples
        cuts = np.searchsorted(samples, self.shard_starts[1:])
        shards = np.split(samples, cuts)
        samples = np.concatenate([shards[i] for i in rng.permutation(len(shards))])
        # The first stretch is cut short at random, so that the borders are elsewhere in every epoch.
        first = int(rng.integers(1, self.window + 1))
        for stretch in np.split(samples, range(first, len(samples), self.window)):
            rng.shuffle(stretch)
        return samples

    def _drawn(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, ascending: each once, or by systematic sampling as often as `repeats` says."""
        if self.repeats is None:
            return np.arange(self.num_samples, dtype=np.uint32)
        ends = np.cumsum(self.repeats, dtype=np.float64)
        points = (np.arange(self.epoch_length, dtype=np.float64) + (epoch * GOLDEN) % 1) * (ends[-1] / self.epoch_length)
        return np.searchsorted(ends[:-1], points, side="right").astype(np.uint32)  # a point past the last end: the last


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: a contiguous slice for each rank, and that into equal micro batches."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        assert self.global_batch_size % (self.micro_batch_size * self.world_size) == 0

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in one optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, step: int) -> list[range]:
        """This rank's positions in optimizer step `step` (0..), one range a micro batch."""
        share = self.global_batch_size // self.world_size
        first = step * self.global_batch_size + self.rank * share
        return [range(p, p + self.micro_batch_size) for p in range(first, first + share, self.micro_batch_size)]


def validation_positions(num_samples: int, rank: int, world_size: int) -> range:
    """Sample r, r + W, ... for rank r. All ranks get equally many; positions >= num_samples are padding, to be masked."""
    per_rank = -(-num_samples // world_size)
    return range(rank, rank + per_rank * world_size, world_size)
