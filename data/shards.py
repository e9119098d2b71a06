"""A set of shards: plain WebDataset tars, and an index that finds any sample in them with one lookup.

    SPLIT/shard-000000.tar   see `data.tars`
    SPLIT/samples.npy        one row (`SAMPLE_ROW`) a sample: its shard, and each member's offset and size there
    SPLIT/index.json         `Index`: the label set, pixel counts, sizes and sha256; written last

A folder without index.json is not a shard set.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from data import DataError
from data.labels import LabelSet, first_problem
from data.tars import SAMPLE_ROW, PackedSample, locate_members, write_tar

INDEX = "index.json"
SAMPLES = "samples.npy"
BUILD = "python -m data.build_shards --dataset NAME --root RAW_FOLDER --out FOLDER"
MAX_OPEN_SHARDS = 128  # a process may often open 1024 files only, and a large set has more shards than that


class RawSample(NamedTuple):
    """A sample as stored: encoded image and mask, and the parsed KEY.json."""

    key: str
    image: bytes
    mask: bytes
    meta: dict


class ShardEntry(BaseModel):
    file: str
    samples: int
    bytes: int
    sha256: str


class Index(BaseModel):
    """What index.json holds."""

    format: Literal[1] = 1
    label_set: dict
    num_samples: int
    pixel_counts: list[int]
    ignored_pixels: int
    shards: list[ShardEntry]
    samples_sha256: str


def write_split(samples: Iterable[PackedSample], out: Path, label_set: LabelSet, samples_per_shard: int = 1000) -> dict:
    """Writes the samples, in their order, as a shard set into the new folder `out`; returns the content of index.json.

    Everything is written beside it and renamed at the end: `out` is whole or not there. The bytes depend on the
    arguments only. One sample is in memory at a time.

    Raises:
        DataError: `out` is already there, there are no samples, or two have the same key.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out}: already there; delete it or choose another folder")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        index = _write_files(samples, partial, label_set, samples_per_shard)
        if index.num_samples == 0:
            raise DataError(f"{out.name}: no samples to write, none of its examples is sound; repair them, or change --val-fraction")
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return index.model_dump()


def _write_files(samples: Iterable[PackedSample], folder: Path, label_set: LabelSet, samples_per_shard: int) -> Index:
    pixel_counts = np.zeros(label_set.num_classes, dtype=np.int64)
    pixels, keys = 0, set()
    rows, shards = [np.empty(0, dtype=SAMPLE_ROW)], []

    def counted() -> Iterator[PackedSample]:
        nonlocal pixels
        for sample in samples:
            # WebDataset would take neighbours with the same key for one sample.
            if sample.key in keys:
                raise DataError(f"key '{sample.key}': two samples have it; keys must be unique")
            keys.add(sample.key)
            np.add(pixel_counts, sample.pixel_counts, out=pixel_counts)
            pixels += sample.height * sample.width
            yield sample

    stream = counted()
    while (first := next(stream, None)) is not None:
        path = folder / f"shard-{len(shards):06d}.tar"
        write_tar(chain([first], islice(stream, samples_per_shard - 1)), path, label_set)
        rows.append(locate_members(path, len(shards)))
        size = path.stat().st_size
        shards.append(ShardEntry(file=path.name, samples=len(rows[-1]), bytes=size, sha256=_sha256(path)))
    np.save(folder / SAMPLES, np.concatenate(rows))
    index = Index(
        label_set=label_set.to_dict(),
        num_samples=len(keys),
        pixel_counts=pixel_counts.tolist(),
        ignored_pixels=pixels - int(pixel_counts.sum()),
        shards=shards,
        samples_sha256=_sha256(folder / SAMPLES),
    )
    (folder / INDEX).write_text(json.dumps(index.model_dump(), indent=1) + "\n", encoding="utf-8")
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardSet:
    """A split on disk, read sample by sample at any position.

    It can be pickled (the copy opens the folder again) and used in forked processes and in threads: reading is
    `os.pread`, which moves no shared file position.
    """

    def __init__(self, folder: Path, index: Index, label_set: LabelSet, rows: np.ndarray, fingerprint: str) -> None:
        self.folder = folder  # absolute
        self.label_set = label_set
        self.pixel_counts = np.array(index.pixel_counts, dtype=np.int64)  # (num_classes,), of the whole split
        self.fingerprint = fingerprint  # sha256 of index.json, which holds the sha256 of all else
        self._index = index
        self._rows = rows
        # Unbuffered file objects rather than descriptors: one that leaves the cache closes once nobody reads from it.
        self._file = lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda shard: FileIO(folder / index.shards[shard].file))

    @classmethod
    def open(cls, folder: str | Path) -> "ShardSet":
        """Opens a split: reads the index, maps the sample table, looks at the sizes of the tars (not into them).

        Raises:
            DataError: no such folder, no or a bad index, a file that is missing or has another size.
        """
        folder = Path(folder).absolute()
        path = folder / INDEX
        if not path.is_file():
            what = f"no {INDEX} here, so this is no finished shard set" if folder.is_dir() else "no such folder"
            raise DataError(f"{folder}: {what}; build it with: {BUILD}")
        content = path.read_bytes()
        try:
            index = Index.model_validate_json(content)
            label_set = LabelSet.from_dict(index.label_set)
            rows = np.asarray(np.load(folder / SAMPLES, mmap_mode="r"))
        except (ValidationError, DataError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise DataError(f"{path}: {problem}; build the set again") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / SAMPLES}: cannot be read ({error}); build the set again") from None
        for problem in _damage(folder, index, rows):
            raise DataError(f"{problem}; copy the file again or build the set again")
        return cls(folder, index, label_set, rows, hashlib.sha256(content).hexdigest())

    def __reduce__(self) -> tuple:
        return ShardSet.open, (self.folder,)

    def __len__(self) -> int:
        return self._index.num_samples

    def read(self, i: int) -> RawSample:
        """The sample at position `i` (0 <= i < len).

        Raises:
            DataError: the shard cannot be read or is shorter than its index says.
            IndexError: no such position.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.folder}: no sample {i}, there are {len(self)}")
        shard, *places = self._rows[i].item()
        offsets, sizes = places[0::2], places[1::2]
        where = f"{self.folder / self._index.shards[shard].file}: sample {i}"
        try:
            file = self._file(shard)  # held until it was read: another thread may push it out of the cache
            parts = [os.pread(file.fileno(), *span) for span in zip(sizes, offsets, strict=True)]
        except OSError as error:
            raise DataError(f"{where} cannot be read ({error.strerror}); check the disk") from None
        if [len(part) for part in parts] != sizes:
            raise DataError(f"{where} ends early, the file was cut short; build the set again")
        image, mask, meta = parts
        try:
            meta = json.loads(meta)
            return RawSample(meta["key"], image, mask, meta)
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where} has a damaged json member; build the set again") from None

    def verify(self) -> list[str]:
        """Reads every byte: what is missing, has another size or another sha256, one line a problem; [] if sound."""
        problems = list(_damage(self.folder, self._index, self._rows))
        damaged = {problem.split(": ")[0] for problem in problems}
        expected = {SAMPLES: self._index.samples_sha256} | {shard.file: shard.sha256 for shard in self._index.shards}
        for name, sha256 in expected.items():
            path = self.folder / name
            if str(path) not in damaged and (not path.is_file() or _sha256(path) != sha256):
                problems.append(f"{path}: its content changed (sha256 differs from {INDEX})")
        return problems


def _damage(folder: Path, index: Index, rows: np.ndarray) -> Iterator[str]:
    """What a look at names and sizes finds."""
    if rows.dtype != SAMPLE_ROW or len(rows) != index.num_samples:
        yield f"{folder / SAMPLES}: does not belong to {INDEX}: {len(rows)} samples there, {index.num_samples} here"
    for shard in index.shards:
        path = folder / shard.file
        if not path.is_file():
            yield f"{path}: missing, though {INDEX} lists it"
        elif (size := path.stat().st_size) != shard.bytes:
            yield f"{path}: {size} bytes, {INDEX} says {shard.bytes}"
