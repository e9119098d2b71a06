"""Examples to shards, one shard after the other, so that a build can be stopped, continued and shared out.

A split's examples are cut into shards before anything is read. What a shard holds then depends on its own examples alone,
and a finished shard is never touched again:

    OUT/train/shard-000003.tar              under this name only when whole
    OUT/.progress/train-shard-000003.npz    what the index needs to know of it, and what it was made from

A build begins by `claim` of its folder (`data.claim`). `pack` makes the shards that are missing, in any number of processes,
on any number of machines; `finish` gathers what is known of them into the tables and, last, the indices of `data.shards`.
"""

import hashlib
import json
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

from data import DataError
from data.claim import PROGRESS, SPLITS, remove_left_overs
from data.mapping import reached
from data.parallel import map_in_order
from data.prepare import Problem, Rules, prepare
from data.shards import INDEX, PIXEL_COUNTS, SAMPLES, FileEntry, Index, ShardEntry, sha256
from data.sources import RawExample
from data.tars import SAMPLE_ROW, PackedSample, locate_members, write_tar

FORMAT = 2  # of the shards; a build is not continued with another
NAMES_KEPT = 20


@dataclass(frozen=True)
class Split:
    """One split of a build: its name, where it goes, and its examples in their order, cut into shards."""

    name: str
    out: Path
    examples: list[RawExample]
    rules: Rules
    samples_per_shard: int

    def __post_init__(self) -> None:
        # WebDataset would take neighbours with the same key for one sample.
        for key, count in Counter(example.key for example in self.examples).items():
            if count > 1:
                raise DataError(f"{self.name}: key '{key}': {count} examples have it; keys must be unique")

    @cached_property
    def shards(self) -> list["Shard"]:
        n = self.samples_per_shard
        return [Shard(self, i, self.examples[i * n : (i + 1) * n]) for i in range(-(-len(self.examples) // n))]


@dataclass(frozen=True)
class Shard:
    split: Split
    number: int
    examples: list[RawExample]

    @property
    def tar(self) -> Path:
        return self.split.out / self.split.name / f"shard-{self.number:06d}.tar"

    @property
    def record_path(self) -> Path:
        return self.split.out / PROGRESS / f"{self.split.name}-shard-{self.number:06d}.npz"

    @cached_property
    def identity(self) -> str:
        """A digest of what the shard is made from: rules, keys, and the names, sizes and times of the files."""
        rules = self.split.rules
        made_by = {
            "format": FORMAT,
            "masks": rules.masks.to_dict(),
            "target": rules.target.to_dict(),
            "table": None if rules.table is None else rules.table.tolist(),
            "options": [rules.mask_colors, rules.keep_constant, rules.encode, rules.jpeg_quality, rules.max_side],
            "examples": [(e.key, *_look(e.image), *_look(e.mask)) for e in self.examples],
        }
        return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


@dataclass
class Noted:
    """How many examples one of `data.prepare.NOTES` is true of, and the first of their images."""

    count: int = 0
    images: list[str] = field(default_factory=list)

    def add(self, count: int, images: list[str]) -> None:
        self.count += count
        self.images = (self.images + images)[:NAMES_KEPT]


@dataclass(frozen=True)
class Record:
    """What is known of a finished shard."""

    identity: str
    entry: dict | None  # of `ShardEntry`; None: none of its examples was sound, there is no tar
    rows: np.ndarray  # `SAMPLE_ROW` (samples,)
    pixel_counts: np.ndarray  # uint32 (samples, classes)
    pixels: int
    problems: list[Problem] = field(default_factory=list)
    notes: dict[str, Noted] = field(default_factory=dict)


def pack(shards: list[Shard], workers: int, skip: bool) -> list[Problem]:
    """Makes those of the shards that are not made yet, and returns the problems of all of them.

    With `skip` a shard is made of its sound examples. Without, one that has problems is not made; the others are.
    """
    problems: list[Problem] = []
    pending = []
    for shard in shards:
        record = read_record(shard)
        if record is None or (record.problems and not skip):
            pending.append(shard)
        else:
            problems += record.problems
    if not pending:
        return problems
    examples = [example for shard in pending for example in shard.examples]
    done = sum(len(shard.examples) for shard in shards) - len(examples)
    results = map_in_order(partial(prepare, rules=pending[0].split.rules), examples, workers)
    names = "+".join(dict.fromkeys(shard.split.name for shard in pending))
    with tqdm(results, desc=names, initial=done, total=done + len(examples), unit="image", disable=None) as stream:
        results = iter(stream)
        for shard in pending:
            problems += _make(shard, islice(results, len(shard.examples)), skip)
    return problems


def _make(shard: Shard, results: Iterator[PackedSample | Problem], skip: bool) -> list[Problem]:
    """Writes one shard and its record, each beside and then renamed; returns its problems."""
    problems: list[Problem] = []
    notes: defaultdict[str, Noted] = defaultdict(Noted)
    counts, pixels = [], 0

    def sound() -> Iterator[PackedSample]:
        nonlocal pixels
        for example, result in zip(shard.examples, results, strict=True):
            if isinstance(result, Problem):
                problems.append(result)
                continue
            counts.append(result.pixel_counts)
            pixels += result.height * result.width
            for note in result.notes:
                notes[note].add(1, [str(example.image)])
            yield result

    target = shard.split.rules.target
    shard.tar.parent.mkdir(parents=True, exist_ok=True)
    shard.record_path.unlink(missing_ok=True)  # of other files or rules; it must not outlive its tar
    partial_tar = _beside(shard.tar)
    try:
        write_tar(sound(), partial_tar, target)
        if problems and not skip:
            return problems
        rows, entry = np.empty(0, SAMPLE_ROW), None
        if counts:
            rows = locate_members(partial_tar)
            size = partial_tar.stat().st_size
            entry = {"file": shard.tar.name, "bytes": size, "sha256": sha256(partial_tar), "samples": len(rows)}
            os.replace(partial_tar, shard.tar)
    finally:
        partial_tar.unlink(missing_ok=True)
    table = np.array(counts, np.uint32).reshape(-1, target.num_classes)
    _write_record(shard, Record(shard.identity, entry, rows, table, pixels, problems, dict(notes)))
    return problems


def read_record(shard: Shard) -> Record | None:
    """What a former run left of this shard; None unless it was made whole from the very same files and rules."""
    try:
        with np.load(shard.record_path) as arrays:
            facts = json.loads(str(arrays["facts"]))
            facts["problems"] = [Problem(**problem) for problem in facts["problems"]]
            facts["notes"] = {note: Noted(**noted) for note, noted in facts["notes"].items()}
            record = Record(rows=arrays["rows"], pixel_counts=arrays["pixel_counts"], **facts)
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile):  # none, or damaged
        return None
    if record.identity != shard.identity:
        return None
    if record.entry and not (shard.tar.is_file() and shard.tar.stat().st_size == record.entry["bytes"]):
        return None
    return record


def _write_record(shard: Shard, record: Record) -> None:
    facts = {
        "identity": record.identity, "entry": record.entry, "pixels": record.pixels,
        "problems": [asdict(problem) for problem in record.problems],
        "notes": {note: asdict(noted) for note, noted in record.notes.items()},
    }  # fmt: skip
    beside = _beside(shard.record_path)
    with beside.open("wb") as file:
        np.savez(file, rows=record.rows, pixel_counts=record.pixel_counts, facts=np.array(json.dumps(facts)))
    os.replace(beside, shard.record_path)


def finish(splits: list[Split]) -> tuple[dict[str, Index], dict[str, Noted]]:
    """Writes the tables and, last, the indices of splits whose shards are all made; returns them, and all notes.

    Raises:
        DataError: none of a split's examples is sound, or a shard was deleted since it was made.
    """
    records = {split.name: [read_record(shard) for shard in split.shards] for split in splits}
    for name, made in records.items():
        if not all(made):
            lost = f"{made.count(None)} shards of {name} were deleted or changed meanwhile"
            raise DataError(f"{splits[0].out}: {lost}; let nothing else write there and run again")
        if not any(record.entry for record in made):
            raise DataError(
                f"{name}: no samples to write, none of its examples is sound; repair them, or change --val-fraction"
            )
    indices = {split.name: _write_tables(split, [r for r in records[split.name] if r.entry]) for split in splits}
    out = splits[0].out
    for name in SPLITS:
        remove_left_overs(out / name, indices.get(name))
    for name, index in indices.items():
        path = out / name / INDEX
        _beside(path).write_text(json.dumps(index.model_dump(), indent=1) + "\n", encoding="utf-8")
        os.replace(_beside(path), path)
    notes: defaultdict[str, Noted] = defaultdict(Noted)
    for record in chain.from_iterable(records.values()):
        for note, noted in record.notes.items():
            notes[note].add(noted.count, noted.images)
    return indices, notes


def _write_tables(split: Split, records: list[Record]) -> Index:
    folder = split.out / split.name
    rows = np.concatenate([record.rows for record in records])
    rows["shard"] = np.repeat(np.arange(len(records)), [len(record.rows) for record in records])
    counts = np.concatenate([record.pixel_counts for record in records])
    totals = counts.sum(axis=0, dtype=np.int64)
    rules = split.rules
    classes = range(rules.masks.num_classes)
    return Index(
        label_set=rules.target.to_dict(),
        labelled=list(classes if rules.table is None else reached(rules.table, classes, rules.target)),
        num_samples=len(rows),
        pixel_counts=totals.tolist(),
        ignored_pixels=sum(record.pixels for record in records) - int(totals.sum()),
        shards=[ShardEntry(**record.entry) for record in records],
        tables={"samples": _save(folder / SAMPLES, rows), "pixel_counts": _save(folder / PIXEL_COUNTS, counts)},
    )


def _save(path: Path, table: np.ndarray) -> FileEntry:
    beside = _beside(path)
    with beside.open("wb") as file:
        np.save(file, table)
    os.replace(beside, path)
    return FileEntry(file=path.name, bytes=path.stat().st_size, sha256=sha256(path))


def _beside(path: Path) -> Path:
    """A name in the same folder that no other process writes to."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")


def _look(path: Path | None) -> tuple:
    if path is None:
        return (None,)
    try:
        status = path.stat()
    except OSError:
        return (str(path),)
    return str(path), status.st_size, status.st_mtime_ns
