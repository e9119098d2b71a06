"""Batches, and the memory that training batches are made in.

Worker processes write pixels into it in place: handing them over through a DataLoader's queue would cost as much as
decoding them.
"""

import logging
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from data.augment import Box, View

log = logging.getLogger("data")


@dataclass
class Batch:
    """One micro batch; `labels` is a tensor in training, a list of arrays of the masks' own sizes in validation.

    A training batch is valid until the next step's are asked for: then its memory is written anew.
    """

    keys: list[str]
    images: torch.Tensor  # uint8 (B, 3, H, W), RGB, channels last in memory
    labels: torch.Tensor | list[np.ndarray]  # uint8 (B, H, W) | B x uint8 (h, w)
    seeds: torch.Tensor  # int64 (B,): dropout is drawn from these
    pixel_counts: torch.Tensor | None  # int64 (B, 256): pixels of each label value; None: see `views`
    labelled: torch.Tensor | None = None  # bool (B, classes): which each image's masks can show; None: all
    places: list[Box] | None = None  # validation: where in `images` each whole image lies; the rest is fill
    views: list[View] | None = None  # `images` and `labels` are only patches for these: data/device_render.py makes them


@dataclass(frozen=True)
class Example:
    """What a worker tells of one example; its pixels are in the ring."""

    key: str
    sample: int  # its number in the mixture
    seed: int
    pixel_counts: np.ndarray | None  # int64 (256,)
    labelled: np.ndarray  # bool (classes,)
    problem: str | None  # why it is shown as nothing
    view: View | None = None  # that its pixels are patches for


class BatchRing:
    """The pixels of some batches, in memory that forked workers share with this process.

    Anonymous memory, not /dev/shm: containers often have 64 MB of that.

    Attributes:
        images: uint8 (slots, batch_size, H, W, 3).  labels: uint8 (slots, batch_size, H, W).
    """

    def __init__(self, slots: int, batch_size: int, size: tuple[int, int]) -> None:
        pixels = slots * batch_size * size[0] * size[1]
        self._memory = np.frombuffer(mmap.mmap(-1, 4 * pixels), np.uint8)
        self.images = self._memory[: 3 * pixels].reshape(slots, batch_size, *size, 3)
        self.labels = self._memory[3 * pixels :].reshape(slots, batch_size, *size)

    def pin(self) -> None:
        """Lets the GPU copy from it while this process goes on."""
        status = torch.cuda.cudart().cudaHostRegister(self._memory.ctypes.data, self._memory.nbytes, 0)
        if int(status) != 0:
            log.warning("the loader's memory could not be pinned (CUDA error %d): copies to the GPU will wait", status)

    def batch(self, slot: int, told: list[Example]) -> Batch:
        """The examples whose pixels lie in a slot, without a copy."""
        labelled = np.stack([example.labelled for example in told])
        views = [example.view for example in told] if told[0].view else None
        counts = None if views else torch.from_numpy(np.stack([example.pixel_counts for example in told]))
        return Batch(
            keys=[example.key for example in told],
            images=torch.from_numpy(self.images[slot]).permute(0, 3, 1, 2),
            labels=torch.from_numpy(self.labels[slot]),
            seeds=torch.tensor([example.seed for example in told], dtype=torch.int64),
            pixel_counts=counts,
            labelled=None if labelled.all() else torch.from_numpy(labelled),
            views=views,
        )
