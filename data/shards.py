"""A set of shards: plain WebDataset tars, and tables that find any sample in them with one lookup.

    SPLIT/shard-000000.tar   see `data.tars`
    SPLIT/samples.npy        one row (`SAMPLE_ROW`) a sample: its shard, and each member's offset and size there
    SPLIT/pixel_counts.npy   uint32 (samples, classes): how many pixels of each class an image has
    SPLIT/index.json         `Index`: the label set, sums, sizes and sha256; written last

A folder without index.json is not a shard set. `data.packing` writes these files.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ValidationError

from data import DataError
from data.labels import LabelSet, first_problem
from data.remote import FileCache, file_url, is_remote
from data.tars import SAMPLE_ROW

INDEX = "index.json"
SAMPLES = "samples.npy"
PIXEL_COUNTS = "pixel_counts.npy"
BUILD = "python -m data.build_shards --dataset NAME --root RAW_FOLDER --out FOLDER"
MAX_OPEN_SHARDS = 128  # a process may often open 1024 files only, and a large set has more shards than that
READ_TRIES = 3  # network file systems fail now and then
LOST_FOR = 600  # seconds until a remote shard is tried again


class RawSample(NamedTuple):
    """A sample as stored: encoded image and mask, and the parsed KEY.json."""

    key: str
    image: bytes
    mask: bytes
    meta: dict
    where: str  # for messages: its file and position


class FileEntry(BaseModel):
    file: str
    bytes: int
    sha256: str


class ShardEntry(FileEntry):
    samples: int


class Index(BaseModel):
    """What index.json holds."""

    format: Literal[2] = 2
    label_set: dict
    labelled: list[int]  # the classes that the raw masks can show; a label map may leave others without examples
    num_samples: int
    pixel_counts: list[int]
    ignored_pixels: int
    shards: list[ShardEntry]
    tables: dict[Literal["samples", "pixel_counts"], FileEntry]


class ShardSet:
    """A split that can be read at any position. Threads may share one; a pickled copy opens the files anew.

    Attributes:
        location: the folder, absolute, or the URL that it was opened by.
        label_set: `LabelSet` of the masks.
        labelled: ids of the classes that its masks can show.
        pixel_counts: int64 (classes,), of the whole split.
        shard_starts: int64 (shards,), each shard's first sample.
        fingerprint: sha256 of index.json, which holds the sha256 of all else.
    """

    def __init__(self, index: Index, label_set: LabelSet, fingerprint: str, files: "Files") -> None:
        self.location = files.location
        self.label_set = label_set
        self.labelled = tuple(index.labelled)
        self.pixel_counts = np.array(index.pixel_counts, dtype=np.int64)
        self.shard_starts = np.cumsum([0, *(shard.samples for shard in index.shards)])[:-1]
        self.fingerprint = fingerprint
        self._index, self._files = index, files
        self._lost: dict[int, tuple[float, str]] = {}  # shards that could not be fetched: when, why
        self._rows = files.table(index, "samples", SAMPLE_ROW, (index.num_samples,))
        self.image_pixel_counts  # noqa: B018  told now if it is damaged
        # Unbuffered file objects rather than descriptors: one that leaves the cache closes once nobody reads from it.
        # Remote ones are opened for each read: a file that its cache deleted takes up disk for as long as it is open.
        held = 0 if files.remote else MAX_OPEN_SHARDS
        self._file = lru_cache(maxsize=held)(lambda shard: FileIO(files.path(index.shards[shard])))

    @classmethod
    def open(cls, location: str | Path, cache: FileCache | None = None) -> "ShardSet":
        """Opens a split: reads the index, maps the tables, looks at the sizes of the tars (not into them).

        Args:
            location: a folder, or a URL as `data.remote` knows them, whose shards are fetched into `cache` when read.

        Raises:
            DataError: no such folder, no or a bad index, a file that is missing or has another size.
        """
        files = Files(str(location), cache or FileCache())
        index, label_set, fingerprint = _read_index(files)
        if problems := list(files.damage(index.shards)):
            others = f" (and {len(problems) - 1} more, named by: python -m data.inspect {location})" if problems[1:] else ""
            raise DataError(f"{problems[0]}{others}; copy it again or build the set again")
        return cls(index, label_set, fingerprint, files)

    @property
    def image_pixel_counts(self) -> np.ndarray:
        """uint32 (samples, classes), mapped anew: memory goes back when it is dropped. Raises DataError."""
        shape = (len(self), self.label_set.num_classes)
        return self._files.table(self._index, "pixel_counts", np.dtype("<u4"), shape)

    def __reduce__(self) -> tuple:
        return ShardSet.open, (self.location, self._files.cache)

    def __len__(self) -> int:
        return self._index.num_samples

    def read(self, i: int) -> RawSample:
        """The sample at position `i` (0 <= i < len).

        Raises:
            DataError: the shard cannot be read, is shorter than its index says, or the table points elsewhere.
            IndexError: no such position.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.location}: no sample {i}, there are {len(self)}")
        shard, *places = self._rows[i].item()
        offsets, sizes = places[0::2], places[1::2]
        entries = self._index.shards
        if shard >= len(entries) or max(map(sum, zip(offsets, sizes, strict=True))) > entries[shard].bytes:
            table = self._files.name(self._index.tables["samples"].file)
            raise DataError(f"{table}: row {i} does not belong to {INDEX}; copy the set again or build it again")
        where = f"{self._files.name(entries[shard].file)}: sample {i}"
        parts = self._read_spans(shard, list(zip(sizes, offsets, strict=True)), where)
        if [len(part) for part in parts] != sizes:
            raise DataError(f"{where} ends early, the file was cut short; build the set again")
        image, mask, meta = parts
        try:
            meta = json.loads(meta)
            return RawSample(meta["key"], image, mask, meta, where)
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{where} has a damaged json member; build the set again") from None

    def _read_spans(self, shard: int, spans: list[tuple[int, int]], where: str) -> list[bytes]:
        when, why = self._lost.get(shard, (-math.inf, ""))
        if time.monotonic() < when + LOST_FOR:
            raise DataError(why)
        for attempt in range(READ_TRIES):
            try:
                file = self._file(shard)  # held until it was read: another thread may push it out of the cache
                return [os.pread(file.fileno(), *span) for span in spans]
            except OSError as error:
                reason = error.strerror
                self._file.cache_clear()  # a descriptor of a network file system may have become stale
                time.sleep(0.2 * attempt)
            except DataError as error:
                # It was tried for a minute; not again for each of its samples.
                self._lost[shard] = time.monotonic(), str(error)
                raise
        raise DataError(f"{where} cannot be read ({reason}, {READ_TRIES} tries); check the disk")

    def shard_sizes(self) -> list[int]:
        """Bytes of each tar."""
        return [shard.bytes for shard in self._index.shards]


def verify(location: str | Path, cache: FileCache | None = None, checksums: bool = True, tars: int | None = None) -> list[str]:
    """What is missing, has another size or, where every byte is to be read, another sha256: one line a problem; [] if sound.

    Args:
        tars: read at most so many of them, evenly spaced; None: all.

    Raises:
        DataError: as `ShardSet.open`, for the index alone.
    """
    files = Files(str(location), cache or FileCache())
    problems = []
    index, _, _ = _read_index(files)
    last = len(index.shards) - 1
    read = range(last + 1) if tars is None else {round(i * last / max(1, tars - 1)) for i in range(tars)}
    chosen = {index.shards[i].file for i in read} | {table.file for table in index.tables.values()}
    for entry in [*index.tables.values(), *index.shards]:
        try:
            found = list(files.damage([entry]))
            if not found and checksums and entry.file in chosen and sha256(files.path(entry)) != entry.sha256:
                found = [f"{files.name(entry.file)}: its content changed (sha256 differs from {INDEX})"]
            problems += found
        except DataError as error:
            problems.append(str(error))
    return problems


class Files:
    """The files of one shard set, in a folder or behind a URL."""

    def __init__(self, location: str, cache: FileCache) -> None:
        if location.startswith("file:"):
            raise DataError(f"{location}: a URL of this machine; write the path alone")
        self.remote = is_remote(location)
        self.location = location if self.remote else str(Path(location).absolute())
        self.cache = cache

    def name(self, file: str) -> str:
        """How messages call it."""
        return file_url(self.location, file) if self.remote else str(Path(self.location) / file)

    def path(self, entry: FileEntry) -> Path:
        """The file on this machine's disk, fetched if need be. Raises DataError."""
        if self.remote:
            return self.cache.fetch(self.name(entry.file), entry.bytes, entry.sha256)
        return Path(self.location) / entry.file

    def read_index(self) -> bytes:
        if self.remote:
            return self.cache.fetch(self.name(INDEX)).read_bytes()
        folder = Path(self.location)
        if (folder / INDEX).is_file():
            return (folder / INDEX).read_bytes()
        if folder.is_file():
            raise DataError(f"{folder}: is a file; name the folder that holds {INDEX}")
        if splits := [str(inner.parent) for inner in sorted(folder.glob(f"*/{INDEX}"))]:
            raise DataError(f"{folder}: holds several shard sets; name one of {', '.join(splits)}")
        what = f"no {INDEX} here, so this is no finished shard set" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; build it with: {BUILD}")

    def table(self, index: Index, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A memory mapped table. Raises DataError if it is damaged or belongs to another index."""
        entry = index.tables[name]
        try:
            table = np.asarray(np.load(self.path(entry), mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name(entry.file)}: cannot be read ({error}); build the set again") from None
        if table.dtype != dtype or table.shape != shape:
            found = f"{table.dtype.name} {table.shape} there, {dtype.name} {shape} expected"
            raise DataError(f"{self.name(entry.file)}: does not belong to {INDEX}: {found}; build the set again")
        return table

    def damage(self, entries: list[FileEntry]) -> Iterator[str]:
        """What a look at names and sizes finds. Remote files are looked at when they are fetched."""
        for entry in [] if self.remote else entries:
            path = self.path(entry)
            if not path.is_file():
                yield f"{path}: missing, though {INDEX} lists it"
            elif (size := path.stat().st_size) != entry.bytes:
                yield f"{path}: {size} bytes, {INDEX} says {entry.bytes}"


def _read_index(files: Files) -> tuple[Index, LabelSet, str]:
    """The index, its label set and its sha256. Raises DataError."""
    content = files.read_index()
    try:
        index = Index.model_validate_json(content)
        label_set = LabelSet.from_dict(index.label_set)
    except (ValidationError, DataError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise DataError(f"{files.name(INDEX)}: {problem}; build the set again") from None
    return index, label_set, hashlib.sha256(content).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
