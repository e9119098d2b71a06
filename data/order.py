"""Which sample goes where: a pure function of (seed, position), whatever the ranks, workers and restarts.

A position counts the samples that a run has taken since its start. Step t of a global batch of B takes the positions
[t*B, t*B + B); position p belongs to epoch p // N, so that a batch may reach over an epoch's end and no sample is
dropped or repeated. Resuming needs the step alone.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # two epochs: a batch may reach over the border
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


@dataclass(frozen=True)
class Order:
    """A new uniform shuffle of all samples in every epoch."""

    num_samples: int
    seed: int

    def sample_at(self, position: int) -> int:
        """The index (0..num_samples-1) of the sample that stands at `position` (0..) of the run."""
        epoch, offset = divmod(position, self.num_samples)
        return int(_permutation(self.seed, epoch, self.num_samples)[offset])

    def generator(self, position: int) -> np.random.Generator:
        """The random numbers of that position's augmentation and dropout; no other source of chance may be used."""
        epoch, offset = divmod(position, self.num_samples)
        return np.random.default_rng((self.seed, epoch, offset))


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
