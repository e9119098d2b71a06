"""Positions to batches. The only state is the step: see data/order.py."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data import DataError
from data.augment import AugmentConfig, augment, resize_for_validation
from data.order import BatchPlan, Order, validation_positions
from data.shards import RawSample, ShardSet


@dataclass
class Batch:
    """One micro batch; `labels` is a tensor in training, a list of arrays of the masks' own sizes in validation."""

    keys: list[str]
    images: torch.Tensor  # uint8 (B, 3, H, W), RGB
    labels: torch.Tensor | list[np.ndarray]  # uint8 (B, H, W) | B x uint8 (h, w)
    seeds: torch.Tensor  # int64 (B,): dropout is drawn from these
    pixel_counts: torch.Tensor  # int64 (B, 256): pixels of each label value

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        if isinstance(self.labels, torch.Tensor):
            self.labels = self.labels.pin_memory()
        return self


def decode(sample: RawSample) -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 (h, w, 3) and class ids uint8 (h, w). Raises DataError naming the sample."""
    image = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_COLOR_RGB)
    label = cv2.imdecode(np.frombuffer(sample.mask, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or label is None or label.ndim != 2 or label.dtype != np.uint8 or image.shape[:2] != label.shape:
        raise DataError(f"sample {sample.key}: image or mask is damaged in its shard; build the shards again")
    return image, label


class TrainExamples(Dataset):
    """Position in the run -> one augmented example."""

    def __init__(self, shards: ShardSet, order: Order, size: tuple[int, int], config: AugmentConfig) -> None:
        self.shards, self.order, self.size, self.config = shards, order, size, config

    def __getitem__(self, position: int) -> tuple | DataError:
        label_set = self.shards.label_set
        rng = self.order.generator(position)
        seed = int(rng.integers(2**63))
        try:
            sample = self.shards.read(self.order.sample_at(position))
            image, label = decode(sample)
        except DataError as error:
            return error  # raised by the loader: a worker's exception would arrive as a page of traceback
        image, label = augment(
            image, label, self.size, self.config, label_set.flip_table(), label_set.ignore_index, rng
        )
        return sample.key, image, label, seed


class ValidationExamples(Dataset):
    """Sample index -> one example at the network's size with its label untouched; past the end, a wholly ignored one."""

    def __init__(self, shards: ShardSet, size: tuple[int, int]) -> None:
        self.shards, self.size = shards, size

    def __getitem__(self, index: int) -> tuple | DataError:
        try:
            sample = self.shards.read(min(index, len(self.shards) - 1))
            image, label = decode(sample)
        except DataError as error:
            return error
        if index >= len(self.shards):
            label = np.full_like(label, self.shards.label_set.ignore_index)
        return sample.key, resize_for_validation(image, self.size), label, 0


def train_batches(
    examples: TrainExamples, plan: BatchPlan, first_step: int, last_step: int, workers: int, pin_memory: bool = False
) -> Iterator[list[Batch]]:
    """For each optimizer step in [first_step, last_step): this rank's micro batches. Raises DataError."""
    positions = _MicroBatches(plan, first_step, last_step)
    batches = _load(examples, positions, workers, _collate_stacked, pin_memory)
    for _ in range(first_step, last_step):
        yield [next(batches) for _ in range(plan.accumulation)]


def validation_batches(
    examples: ValidationExamples, batch_size: int, rank: int, world_size: int, workers: int
) -> Iterator[Batch]:
    """This rank's share of the validation set, equally many batches on every rank. Raises DataError."""
    positions = validation_positions(len(examples.shards), rank, world_size)
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    return _load(examples, batches, workers, _collate, pin_memory=False)


@dataclass(frozen=True)
class _MicroBatches:
    """The positions of one micro batch after the other, made as they are asked for: a run has millions."""

    plan: BatchPlan
    first_step: int
    last_step: int

    def __iter__(self) -> Iterator[range]:
        for step in range(self.first_step, self.last_step):
            yield from self.plan.positions(step)


def _load(
    examples: Dataset, batches: Iterable[range], workers: int, collate: Callable, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        prefetch_factor=4 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _collate(items: list[tuple | DataError]) -> Batch | DataError:
    for item in items:
        if isinstance(item, DataError):
            return item
    keys, images, labels, seeds = zip(*items, strict=True)
    return Batch(
        keys=list(keys),
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        labels=list(labels),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        pixel_counts=torch.from_numpy(np.stack([np.bincount(label.ravel(), minlength=256) for label in labels])),
    )


def _collate_stacked(items: list[tuple | DataError]) -> Batch | DataError:
    batch = _collate(items)
    if isinstance(batch, Batch):
        batch.labels = torch.from_numpy(np.stack(batch.labels))
    return batch


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
