"""What a training reads: one shard set or several, with one label set, in one order.

Sets of other label sets come in through a label map. A set whose masks cannot show a class says nothing of it: its
images teach neither that class nor that their pixels are something else (`Member.labelled`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from data import DataError
from data.labels import LabelSet
from data.mapping import load_label_map, reached
from data.order import Order
from data.remote import FileCache
from data.shards import RawSample, ShardSet
from data.yaml_files import Settings

MAX_REPEAT = 10.0  # of a rare image; one seen hundreds of times an epoch would be learnt by heart
ROWS_AT_A_TIME = 1 << 16


class MixtureEntry(Settings):
    """One shard set of a mixture."""

    path: str = Field(description="folder or URL of a split, holds index.json")
    weight: float = Field(1.0, gt=0, le=1000, description="times that each of its samples comes in an epoch, on average")
    label_map: str | None = Field(None, description="name or YAML file: brings its classes to those of the others")

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone_will_do(cls, entry: Any) -> Any:
        return {"path": entry} if isinstance(entry, str) else entry


@dataclass(frozen=True)
class Member:
    """A shard set in a mixture. `table` uint8 (256,) brings its labels to the mixture's; None: they are the same."""

    shards: ShardSet
    weight: float
    table: np.ndarray | None
    labelled: tuple[int, ...]  # the mixture's classes that its masks can show

    def pixel_counts(self, counts: np.ndarray, num_classes: int) -> np.ndarray:
        """Counts of its own classes (..., own) as those of the mixture's (..., num_classes)."""
        if self.table is None:
            return counts
        mapped = np.zeros((*counts.shape[:-1], 256), counts.dtype)
        for i in range(counts.shape[-1]):
            mapped[..., self.table[i]] += counts[..., i]
        return mapped[..., :num_classes]


class Mixture:
    """Several shard sets as one, samples numbered through.

    Attributes:
        label_set: the one `LabelSet`.
        pixel_counts: int64 (classes,): pixels in an epoch, weights counted in.
        labelled: bool (members, classes): which classes each set's masks can show.
        fingerprint: changes whenever the data or its weights do.
    """

    def __init__(self, members: Sequence[Member], label_set: LabelSet) -> None:
        self.members, self.label_set = list(members), label_set
        self._starts = np.cumsum([0, *(len(member.shards) for member in self.members)])
        self.pixel_counts = np.zeros(label_set.num_classes, np.int64)
        self.labelled = np.zeros((len(self.members), label_set.num_classes), bool)
        for row, member in zip(self.labelled, self.members, strict=True):
            counts = member.pixel_counts(member.shards.pixel_counts, label_set.num_classes)
            self.pixel_counts += np.round(counts * member.weight).astype(np.int64)
            row[list(member.labelled)] = True
        parts = [(m.shards.fingerprint, m.weight, None if m.table is None else m.table.tolist()) for m in self.members]
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    @classmethod
    def open(cls, entries: Sequence[MixtureEntry], cache: FileCache | None = None) -> "Mixture":
        """Opens the entries of data.train. The label set is that of those without a label map, else what the first map leads to.

        Raises:
            DataError: one that cannot be opened, or whose label set is not that of the others.
        """
        try:
            opened = [(entry, ShardSet.open(entry.path, cache)) for entry in entries]
            label_set = next((shards.label_set for entry, shards in opened if not entry.label_map), None)
            if label_set is None:
                label_set = load_label_map(opened[0][0].label_map).target_set()
            return cls([_member(entry, shards, label_set) for entry, shards in opened], label_set)
        except DataError as error:
            raise DataError(f"data.train: {error}") from None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, sample: int) -> tuple[int, int]:
        """(member, index in its shard set) of a sample of the mixture."""
        member = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return member, sample - int(self._starts[member])

    def read(self, sample: int) -> tuple[RawSample, Member]:
        """Raises DataError when it cannot be read."""
        member, index = self.find(sample)
        return self.members[member].shards.read(index), self.members[member]

    def order(self, seed: int, window: int | None = None, rare_share: float | None = None) -> Order:
        """The order in which a run with this seed takes the samples; see `Order`.

        Args:
            rare_share: images with a class that fewer than this share of all images show come more often: repeat factor
                sampling, by the root of rare_share / share, at most `MAX_REPEAT` times. None: no.
        """
        starts = np.concatenate([m.shards.shard_starts + start for m, start in zip(self.members, self._starts[:-1], strict=True)])
        return Order(len(self), seed, window, starts, self._repeats(rare_share))

    def _repeats(self, rare_share: float | None) -> np.ndarray | None:
        weights = [member.weight for member in self.members]
        if rare_share is None and set(weights) == {1.0}:
            return None
        repeats = np.repeat(np.float32(weights), [len(member.shards) for member in self.members])
        if rare_share is not None:
            share = np.maximum(self.images_showing(), 1) / len(self)
            factors = np.clip(np.sqrt(rare_share / share), 1.0, MAX_REPEAT).astype(np.float32)
            for rows, present in self._presence():
                repeats[rows] *= np.where(present, factors, 1.0).max(axis=1)
        return repeats

    def images_showing(self) -> np.ndarray:
        """int64 (classes,): how many images show each class."""
        return sum((present.sum(axis=0) for _, present in self._presence()), np.zeros(self.label_set.num_classes, np.int64))

    def _presence(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields (slice of samples, bool (samples, classes): the class is in the image), some thousand at a time."""
        for member, start in zip(self.members, self._starts[:-1], strict=True):
            for first in range(0, len(member.shards), ROWS_AT_A_TIME):
                # Asked for anew each time: a large set's table, once read, would count as this process's memory.
                rows = member.shards.image_pixel_counts[first : first + ROWS_AT_A_TIME]
                counts = member.pixel_counts(rows, self.label_set.num_classes)
                yield slice(start + first, start + first + len(counts)), counts > 0


def _member(entry: MixtureEntry, shards: ShardSet, label_set: LabelSet) -> Member:
    if entry.label_map is None:
        if not shards.label_set.means_the_same(label_set):
            raise DataError(
                f"{entry.path}: label set {shards.label_set.name} with {shards.label_set.num_classes} classes, but the "
                f"others have {label_set.name} with {label_set.num_classes}, or other names, pairs or ignored values; "
                f"give it a label_map to {label_set.name}"
            )
        return Member(shards, entry.weight, None, shards.labelled)
    label_map = load_label_map(entry.label_map)
    table = label_map.table(shards.label_set, label_set)
    return Member(shards, entry.weight, table, reached(table, shards.labelled, label_set))
