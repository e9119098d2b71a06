"""Positions to batches. The only state is the step: see data/order.py.

Training batches are written by the worker processes straight into memory that they share with this one (data/batch.py).
"""

import ctypes
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import DataError
from data.augment import AugmentConfig, Box, View, draw_view
from data.batch import Batch, BatchRing, Example
from data.codecs import decode_image, decode_mask
from data.mixture import Mixture
from data.order import BatchPlan, Order, validation_positions
from data.render import IMAGE_FILL, cut, render, resize_for_validation
from data.shards import RawSample, ShardSet

PREFETCH = 4  # batches under way for each worker
PR_SET_PDEATHSIG = 1  # of Linux' prctl
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
log = logging.getLogger("data")


class TrainExamples(Dataset):
    """Positions in the run -> augmented examples, or with `augment.on_device` patches of them, written into a batch's place
    in memory."""

    def __init__(self, mixture: Mixture, order: Order, size: tuple[int, int], config: AugmentConfig) -> None:
        self.mixture, self.order, self.size, self.config = mixture, order, size, config
        self.ring: BatchRing | None = None

    def writing_to(self, ring: BatchRing) -> "TrainExamples":
        """A copy for one pass over the data: two at a time must not share their memory."""
        examples = copy(self)
        examples.ring = ring
        return examples

    def __getitems__(self, places: list[tuple[int, int, int]]) -> list[Example]:
        """(slot, row, position) of each example of a batch -> what is not pixels."""
        return [self._make(*place) for place in places]

    def _make(self, slot: int, row: int, position: int) -> Example:
        label_set = self.mixture.label_set
        rng = self.order.generator(position)
        seed = int(rng.integers(2**63))
        image_out, label_out = self.ring.images[slot, row], self.ring.labels[slot, row]
        sample = self.order.sample_at(position)
        member, _ = self.mixture.find(sample)
        key, problem = "", None
        try:
            raw, source = self.mixture.read(sample)
            key = raw.key
            label = _mask(raw)
            if source.table is not None:
                label = cv2.LUT(label, source.table)
            view = draw_view(label, self.size, self.config, rng, label_set.ignore_index)
            image = _image(raw, label.shape, view.shrink)
            if self.config.on_device:
                cut(image, label, view, image_out, label_out)
            else:
                render(image, label, view, label_set.flip_table(), label_set.ignore_index, image_out, label_out)
        except DataError as error:
            problem = str(error)
            image_out[:], label_out[:] = IMAGE_FILL, label_set.ignore_index
            whole = Box(0, 0, self.size[1], self.size[0])
            view = View(self.size, whole, unit=1, seen=whole[2:], place=whole)
        counts, view = (None, view) if self.config.on_device else (_count(label_out), None)
        return Example(key, sample, seed, counts, self.mixture.labelled[member], problem, view)


class ValidationExamples(Dataset):
    """Sample index -> one example at the network's size with its label untouched; past the end, a wholly ignored one.

    `keep_aspect` as in training: a network should be judged by pictures of the shapes that it was taught with.
    """

    def __init__(self, shards: ShardSet, size: tuple[int, int], keep_aspect: bool) -> None:
        self.shards, self.size, self.keep_aspect = shards, size, keep_aspect

    def __getitem__(self, index: int) -> tuple | DataError:
        try:
            sample = self.shards.read(min(index, len(self.shards) - 1))
            image, label = decode(sample)
        except DataError as error:
            return error  # raised by the loader: a worker's exception would arrive as a page of traceback
        if index >= len(self.shards):
            label = np.full_like(label, self.shards.label_set.ignore_index)
        return sample.key, *resize_for_validation(image, self.size, self.keep_aspect), label


def decode(sample: RawSample) -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 (h, w, 3) and class ids uint8 (h, w). Raises DataError naming the sample."""
    label = _mask(sample)
    return _image(sample, label.shape), label


def train_batches(
    examples: TrainExamples,
    plan: BatchPlan,
    first_step: int,
    last_step: int,
    workers: int,
    max_bad_fraction: float = 0.0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """For each optimizer step in [first_step, last_step): this rank's micro batches.

    A sample that cannot be read or decoded is logged by name and shown as nothing (wholly ignored). Close it
    (`contextlib.closing`) if it may be left early: a process waits at its end for workers that were not told to go.

    Raises:
        DataError: more than `max_bad_fraction` of the samples are bad.
    """
    slots = plan.accumulation + workers * PREFETCH  # those in use, and those that the workers may be writing
    ring = BatchRing(slots, plan.micro_batch_size, examples.size)
    examples = examples.writing_to(ring)
    if pin_memory:
        ring.pin()
    loader = DataLoader(
        examples,
        batch_sampler=_Places(plan, first_step, last_step, slots),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="fork" if workers else None,  # others would not share the ring
    )
    bad = _BadSamples(len(examples.mixture), max_bad_fraction)
    micro_batches: list[Batch] = []
    # No name for what iterates: an error's traceback would keep it and its workers, for which a process waits at its end.
    for count, told in enumerate(_told_by(loader)):
        for example in told:
            if example.problem:
                bad.add(example.sample, example.problem)
        micro_batches.append(ring.batch(count % slots, told))
        if len(micro_batches) == plan.accumulation:
            yield micro_batches
            micro_batches = []


def _told_by(loader: DataLoader) -> Iterator[list[Example]]:
    """Of one micro batch after the other. Raises DataError: a worker has died."""
    try:
        yield from _start(loader)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"{error}; probably for want of memory: lower data.workers") from None


def validation_batches(
    examples: ValidationExamples, batch_size: int, rank: int, world_size: int, workers: int
) -> Iterator[Batch]:
    """This rank's share of the validation set, equally many batches on every rank. Raises DataError: a bad sample would
    make the score one of other images."""
    positions = validation_positions(len(examples.shards), rank, world_size)
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    loader = DataLoader(
        examples, batch_sampler=batches, num_workers=workers, collate_fn=_collate, worker_init_fn=_start_worker
    )
    for batch in _start(loader):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _start(loader: DataLoader) -> Iterator:
    """Fork its workers, while no thread could have them hang before they begin.

    Until Python 3.11.10, a process that is forked while a thread that is not Python's enters the interpreter may wait for ever
    for a lock that this thread had (CPython's issue 112275). gloo's threads enter it, to let go of a collective's tensors.
    """
    deadline = time.monotonic() + 5  # seconds: one that never rests, as a spinning one of CUDA's, is no reason to wait for ever
    while loader.num_workers and sys.version_info < (3, 11, 10) and time.monotonic() < deadline:
        time.sleep(0.005)  # lets go of the interpreter, so that who waits for it gets done
        if not _foreign_threads_at_work():
            break
    return iter(loader)


def _foreign_threads_at_work() -> bool:
    """Whether a thread of this process that is not Python's has something to do."""
    known = [thread.native_id for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)]
    ours = {str(number) for number in (*known, threading.get_native_id())}  # of which, after a fork, `threading` has the old one
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended
            if task.name not in ours and (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
                return True
    return False


@dataclass(frozen=True)
class _Places:
    """(slot, row, position) of one micro batch's examples after the other, made as asked for: a run has millions."""

    plan: BatchPlan
    first_step: int
    last_step: int
    slots: int

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        count = 0
        for step in range(self.first_step, self.last_step):
            for positions in self.plan.positions(step):
                yield [(count % self.slots, row, position) for row, position in enumerate(positions)]
                count += 1


class _BadSamples:
    """Names each bad sample once, and ends the run when there are too many."""

    def __init__(self, num_samples: int, max_fraction: float) -> None:
        self._allowed, self._num_samples, self._seen = max_fraction * num_samples, num_samples, set()

    def add(self, sample: int, problem: str) -> None:
        if sample in self._seen:
            return
        self._seen.add(sample)
        if len(self._seen) > self._allowed:
            limit = f" ({len(self._seen)} of {self._num_samples}, more than data.max_bad_fraction allows)"
            raise DataError(problem + (limit if self._allowed else ""))
        log.warning("bad sample %d, shown as nothing: %s", len(self._seen), problem)


def _mask(sample: RawSample) -> np.ndarray:
    try:
        return decode_mask(sample.mask)
    except ValueError as error:
        raise _damaged(sample, "mask", error) from None


def _image(sample: RawSample, shape: tuple[int, int], shrink: int = 1) -> np.ndarray:
    """Of the mask's `shape`, or up to `shrink` times smaller."""
    try:
        image = decode_image(sample.image, shrink)
    except ValueError as error:
        raise _damaged(sample, "image", error) from None
    if image.shape[:2] not in (shape, tuple(-(-side // shrink) for side in shape)):
        raise _damaged(sample, "image", f"{image.shape[:2]} pixels, its mask has {shape}")
    return image


def _damaged(sample: RawSample, what: str, reason: object) -> DataError:
    return DataError(f"{sample.where} ({sample.key}): its {what} is damaged ({reason}); build the shards again")


def _count(label: np.ndarray) -> np.ndarray:
    return cv2.calcHist([label], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def _collate(items: list[tuple | DataError]) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    keys, images, places, labels = zip(*items, strict=True)
    return Batch(
        keys=list(keys),
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        labels=list(labels),
        seeds=torch.zeros(len(keys), dtype=torch.int64),
        pixel_counts=torch.from_numpy(np.stack([_count(label) for label in labels])),
        places=list(places),
    )


def _start_worker(worker: int) -> None:
    # Signals to the whole process group: the trainer decides when to end, and may want batches until then.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # else one whose trainer was killed may wait forever to hand over its batch, with the run's lock
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # glibc gives each freed image back to the system, and the pages of the next one are cleared anew: up to 5 ms an image.
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
