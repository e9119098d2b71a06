"""Packs a raw data set into shards: OUT/train and OUT/val.

    python -m data.build_shards --dataset facesynthetics --root dataset_100000 --out shards/face

Every example is decoded and checked first; what is wrong is listed by file name, and by default nothing is built then.
The same input gives the same bytes, with any number of workers.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from data import DataError
from data.labels import LabelSet, load_label_set
from data.parallel import map_in_order
from data.prepare import KINDS, Problem, prepare
from data.shards import write_split
from data.sources import SOURCES, RawExample
from data.tars import PackedSample

REPORT = "build_report.json"
NAMES_SHOWN = 5
NEXT = "python -m train --config train/configs/demo.yaml"


class _Refused(DataError):
    """The build ends without shards because of problems in the raw data."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 built, 2 refused (one line on stderr says why), 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        build(args)
    except BrokenProcessPool:
        print("error: a worker process died, probably for want of memory; try fewer --workers", file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was built", file=sys.stderr)
        return 130
    return 0


def build(args: argparse.Namespace) -> None:
    """Builds both splits or none, writes OUT/build_report.json, and prints what came of it.

    Raises:
        DataError: bad arguments, no examples, shards that are already there, or refused problems.
    """
    start = time.perf_counter()
    source = SOURCES[args.dataset]
    label_set = load_label_set(args.label_set or source.label_set)
    for name in ("train", "val"):
        if (args.out / name).exists():
            raise DataError(f"{args.out / name}: already built; delete {args.out} or choose another --out")
    examples = source.list_examples(args.root)[: args.limit]
    parts = split(examples, args.val_fraction)
    problems: list[Problem] = []
    splits: dict[str, dict] = {}
    try:
        splits = _write_splits(parts, label_set, args, problems)
    finally:
        if splits or problems:
            _write_report(args, len(examples), splits, problems)
            _print_problems(problems, args.out / REPORT)
    _print_summary(splits, label_set, args, time.perf_counter() - start)


def split(examples: list[RawExample], val_fraction: float) -> dict[str, list[RawExample]]:
    """Train and val examples in their given order; no "val" where its share rounds to nothing, train is never empty.

    The examples whose keys have the smallest hashes validate, so that adding examples to a set leaves nearly all of
    the others where they were.
    """
    count = min(round(len(examples) * val_fraction), len(examples) - 1)
    by_hash = sorted(examples, key=lambda example: hashlib.sha256(example.key.encode()).digest())
    val_keys = {example.key for example in by_hash[:count]}
    parts = {
        "train": [example for example in examples if example.key not in val_keys],
        "val": [example for example in examples if example.key in val_keys],
    }
    return {name: part for name, part in parts.items() if part}


def _write_splits(
    parts: dict[str, list[RawExample]], label_set: LabelSet, args: argparse.Namespace, problems: list[Problem]
) -> dict[str, dict]:
    """Writes every part and only then moves them to their places; returns their indices, fills `problems`."""
    refuse = args.on_error == "refuse"
    splits = {}
    with _staging(args.out) as stage:
        for name, part in parts.items():
            results = map_in_order(partial(prepare, label_set=label_set), part, args.workers)
            results = tqdm(results, desc=name, total=len(part), unit="image", disable=None)
            with suppress(_Refused):
                splits[name] = write_split(
                    _sound(results, problems, refuse), stage / name, label_set, args.samples_per_shard
                )
        if refuse and problems:
            total = sum(len(part) for part in parts.values())
            raise _Refused(
                f"{args.root}: {len(problems)} of {total} examples have problems, nothing was built; "
                "repair or delete them, or build without them: --on-error skip"
            )
        for name in reversed(splits):  # train last: where it is, val is
            os.replace(stage / name, args.out / name)
    return splits


def _sound(results: Iterable[PackedSample | Problem], problems: list[Problem], refuse: bool) -> Iterator[PackedSample]:
    """The samples; problems go to their list. To refuse, all results are still looked at, for the whole list."""
    for result in results:
        if isinstance(result, Problem):
            problems.append(result)
        elif not (refuse and problems):
            yield result
    if refuse and problems:
        raise _Refused


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder inside `out` that is gone afterwards, whatever happens."""
    stage = out / f".building-{os.getpid()}"
    stage.mkdir(parents=True)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _write_report(args: argparse.Namespace, examples: int, splits: dict[str, dict], problems: list[Problem]) -> None:
    report = {
        "dataset": args.dataset,
        "root": str(args.root),
        "examples": examples,
        "splits": {name: _sizes(index) for name, index in splits.items()},
        "problems": {
            kind: [{"file": problem.file, "detail": problem.detail} for problem in found]
            for kind, found in _by_kind(problems)
        },
    }
    (args.out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _by_kind(problems: list[Problem]) -> list[tuple[str, list[Problem]]]:
    ordered = sorted(problems, key=lambda problem: (list(KINDS).index(problem.kind), problem.file))
    return [(kind, list(found)) for kind, found in groupby(ordered, key=lambda problem: problem.kind)]


def _sizes(index: dict) -> dict[str, int]:
    total = sum(shard["bytes"] for shard in index["shards"])
    return {"samples": index["num_samples"], "shards": len(index["shards"]), "bytes": total}


def _print_problems(problems: list[Problem], report: Path) -> None:
    for kind, found in _by_kind(problems):
        print(f"{kind}: {len(found)} ({KINDS[kind]})")
        for problem in found[:NAMES_SHOWN]:
            print(f"  {Path(problem.file).name}: {problem.detail}")
        if len(found) > NAMES_SHOWN:
            print(f"  ... and {len(found) - NAMES_SHOWN} more, all in {report}")


def _print_summary(splits: dict[str, dict], label_set: LabelSet, args: argparse.Namespace, seconds: float) -> None:
    print(f"{'class':20}" + "".join(f"{name:>10}" for name in splits) + "   % of pixels")
    counts = {name: [*index["pixel_counts"], index["ignored_pixels"]] for name, index in splits.items()}
    for i, label in enumerate([*label_set.classes, f"(ignored, {label_set.ignore_index})"]):
        shares = (100 * column[i] / sum(column) for column in counts.values())
        print(f"{label:20}" + "".join(f"{share:10.3f}" for share in shares))
    for name, sizes in ((name, _sizes(index)) for name, index in splits.items()):
        megabytes = sizes["bytes"] / 1e6
        print(f"{args.out / name}: {sizes['samples']} samples in {sizes['shards']} shards, {megabytes:.1f} MB")
    if args.val_fraction > 0 and "val" not in splits:
        print(f"no val split: --val-fraction {args.val_fraction} of so few examples rounds to none")
    folders = {name: shlex.quote(str(args.out / name)) if name in splits else "null" for name in ("train", "val")}
    print(f"{seconds:.1f} s with {args.workers} workers; next:")
    print(f"  {NEXT} data.train={folders['train']} data.val={folders['val']} output_dir=outputs/{args.out.name}")


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _fraction(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0 and below 1")
    return number


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data.build_shards", formatter_class=formatter)
    add = parser.add_argument
    add("--dataset", choices=SOURCES, required=True, help="the layout of the raw folder")
    add("--label-set", help="a YAML file as data/label_sets/face19.yaml; default: the data set's own")
    add("--root", type=Path, required=True, help="the raw folder")
    add("--out", type=Path, required=True, help="where train/ and val/ are made")
    add("--val-fraction", type=_fraction, default=0.1, help="share of the examples that validate; 0: no val/")
    add("--workers", type=_at_least_one, default=len(os.sched_getaffinity(0)), help="processes that check images")
    add("--samples-per-shard", type=_at_least_one, default=1000, help="samples in one tar")
    add("--on-error", choices=("refuse", "skip"), default="refuse", help="what to do about bad examples")
    add("--limit", type=_at_least_one, help="take the first so many examples only")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up as Ctrl-C does
    sys.exit(main())
