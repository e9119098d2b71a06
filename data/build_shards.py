"""Packs a raw data set into shards: OUT/train and OUT/val.

    python -m data.build_shards --dataset facesynthetics --root dataset_100000 --out shards/face

Every example is decoded and checked; what is wrong is listed by file name, and by default no index is written then. A
build that was stopped goes on when the same command is given again. The same input gives the same bytes, whatever the
workers, the interruptions and the parts.
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
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from data import DataError
from data.arguments import whole_number
from data.claim import PROGRESS, SPLITS, claim, is_built
from data.labels import LabelSet, load_label_set
from data.mapping import load_label_map
from data.packing import Noted, Split, finish, pack
from data.prepare import KINDS, NOTES, Problem, Rules
from data.shards import Index
from data.sources import SOURCES, Pairs, RawExample

REPORT = "build_report.json"
NAMES_SHOWN = 5
VAL_FRACTION = 0.1
NEXT = "python -m train --config train/configs/demo.yaml"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 built, 2 refused (one line on stderr says why), 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        if args.check:
            check(args)
            print(args.out)
        else:
            build(args)
    except BrokenProcessPool:
        print("error: a worker process died, probably for want of memory; try fewer --workers", file=sys.stderr)
        return 2
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of the output: what is wrong with raw files is a Problem
        where = error.filename or args.out
        remedy = "free space, let nothing else write there, or choose another --out; then go on"
        print(f"error: {where}: {error.strerror}; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises DataError for what can be seen to be wrong without looking at an example."""
    if not args.root.exists():
        raise DataError(f"{args.root}: --root is not there")
    if args.out.is_file():
        raise DataError(f"{args.out}: is a file; name a folder with --out")
    if is_built(args.out):
        raise DataError(f"{args.out}: already built; delete it or choose another --out")
    with redirect_stdout(sys.stderr):  # warnings
        _rules(args)
    _source(args)


def build(args: argparse.Namespace) -> None:
    """Makes the shards of both splits (or of one part of them), then their indices, and prints what came of it.

    Raises:
        DataError: bad arguments, no examples, an OUT that is not ours to build into, or refused problems.
    """
    start = time.perf_counter()
    rules = _rules(args)
    examples = _source(args).examples(args.root)[: args.limit]
    parts = split_examples(examples, args.val_fraction)
    if "train" not in parts:
        raise DataError(f"{args.root}: all examples are of its val split; --val-fraction 0 makes training data of them")
    splits = [Split(name, args.out, part, rules, args.samples_per_shard) for name, part in parts.items()]
    number, parts_count = args.part
    shards = [shard for split in splits for shard in split.shards][number - 1 :: parts_count]
    report = args.out / (REPORT if parts_count == 1 else f"{PROGRESS}/part-{number}-of-{parts_count}.json")
    raw = (path for example in examples for path in (example.image, example.mask) if path)
    with claim(args.out, raw, alone=parts_count == 1):
        problems = pack(shards, args.workers, skip=args.on_error == "skip")
        refused = problems and args.on_error == "refuse"
        indices, notes = {}, {}
        try:
            if parts_count == 1 and not refused:
                indices, notes = finish(splits)
        finally:
            _write_report(report, args, len(examples), indices, problems, notes)
            _print_findings(problems, notes, report)
        if indices:
            shutil.rmtree(args.out / PROGRESS)  # from now on the build is finished
    if refused:
        raise DataError(
            f"{args.root}: {len(problems)} of {sum(len(shard.examples) for shard in shards)} examples have problems, no "
            "index was written; repair or delete them and run again, or build without them: --on-error skip"
        )
    if parts_count > 1:
        print(f"part {number}/{parts_count}: {len(shards)} shards are made; the same without --part ends the build")
        return
    _print_summary(indices, rules.target, args, time.perf_counter() - start)


def split_examples(examples: list[RawExample], val_fraction: float | None) -> dict[str, list[RawExample]]:
    """Train and val examples in their given order; a split without any is left out. Train always has some, unless the data
    set's own split leaves it none.

    Without `val_fraction` the data set's own split holds, where it has one. Else the examples whose keys have the smallest
    hashes validate, so that adding examples to a set leaves nearly all of the others where they were.
    """
    if val_fraction is None and all(example.split for example in examples):
        chosen = {name: [e for e in examples if e.split == name] for name in SPLITS}
        return {name: part for name, part in chosen.items() if part}
    count = min(round(len(examples) * (VAL_FRACTION if val_fraction is None else val_fraction)), len(examples) - 1)
    by_hash = sorted(examples, key=lambda example: hashlib.sha256(example.key.encode()).digest())
    val_keys = {example.key for example in by_hash[:count]}
    parts = {
        "train": [example for example in examples if example.key not in val_keys],
        "val": [example for example in examples if example.key in val_keys],
    }
    return {name: part for name, part in parts.items() if part}


def _source(args: argparse.Namespace):
    source = SOURCES[args.dataset]
    options = {"images": args.images, "masks": args.masks, "mask_suffix": args.mask_suffix}
    given = {name: value for name, value in options.items() if value is not None}
    if given and source is not Pairs:
        raise DataError(f"--{next(iter(given)).replace('_', '-')}: belongs to --dataset pairs, not to {args.dataset}")
    return source(**given)


def _rules(args: argparse.Namespace) -> Rules:
    name = args.label_set or SOURCES[args.dataset].label_set
    if name is None:
        raise DataError(f"--dataset {args.dataset}: has no label set of its own; name one with --label-set")
    masks = target = load_label_set(name)
    warnings, table = masks.warnings(), None
    if args.label_map:
        label_map = load_label_map(args.label_map)
        target = label_map.target_set()
        table = label_map.table(masks, target)
        warnings += label_map.warnings() + target.warnings()
    for warning in warnings:
        print(f"warning: {warning}")
    if args.mask_colors:
        masks.ids_by_color()  # raises where two classes share a colour
    return Rules(
        masks=masks, target=target, table=table, mask_colors=args.mask_colors, keep_constant=args.keep_constant,
        encode=args.encode, jpeg_quality=args.jpeg_quality, max_side=args.max_side,
    )  # fmt: skip


def _write_report(
    path: Path, args: argparse.Namespace, examples: int, indices: dict[str, Index], problems: list[Problem],
    notes: dict[str, Noted],
) -> None:  # fmt: skip
    report = {
        "dataset": args.dataset,
        "root": str(args.root),
        "encode": f"jpeg, quality {args.jpeg_quality}" if args.encode == "jpeg" else args.encode,
        "examples": examples,
        "splits": {name: _sizes(index) for name, index in indices.items()},
        "notes": {note: asdict(noted) for note, noted in sorted(notes.items())},
        "problems": {
            kind: [{"file": problem.file, "detail": problem.detail} for problem in found]
            for kind, found in _by_kind(problems)
        },
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _by_kind(problems: list[Problem]) -> list[tuple[str, list[Problem]]]:
    ordered = sorted(problems, key=lambda problem: (list(KINDS).index(problem.kind), problem.file))
    return [(kind, list(found)) for kind, found in groupby(ordered, key=lambda problem: problem.kind)]


def _sizes(index: Index) -> dict[str, int]:
    return {"samples": index.num_samples, "shards": len(index.shards), "bytes": sum(s.bytes for s in index.shards)}


def _print_findings(problems: list[Problem], notes: dict[str, Noted], report: Path) -> None:
    for kind, found in _by_kind(problems):
        print(f"{kind}: {len(found)} ({KINDS[kind]})")
        for problem in found[:NAMES_SHOWN]:
            print(f"  {Path(problem.file).name}: {problem.detail}")
        if len(found) > NAMES_SHOWN:
            print(f"  ... and {len(found) - NAMES_SHOWN} more, all in {report}")
    for note, noted in sorted(notes.items()):
        names = ", ".join(Path(image).name for image in noted.images[:NAMES_SHOWN])
        print(f"{note}: {noted.count} ({NOTES[note]})\n  {names}{' ...' if noted.count > NAMES_SHOWN else ''}")


def _print_summary(indices: dict[str, Index], label_set: LabelSet, args: argparse.Namespace, seconds: float) -> None:
    print(f"{'class':20}" + "".join(f"{name:>10}" for name in indices) + "   % of pixels")
    counts = {name: [*index.pixel_counts, index.ignored_pixels] for name, index in indices.items()}
    for i, label in enumerate([*label_set.classes, f"(ignored, {label_set.ignore_index})"]):
        shares = (100 * column[i] / sum(column) for column in counts.values())
        print(f"{label:20}" + "".join(f"{share:10.3f}" for share in shares))
    for name, sizes in ((name, _sizes(index)) for name, index in indices.items()):
        megabytes = sizes["bytes"] / 1e6
        print(f"{args.out / name}: {sizes['samples']} samples in {sizes['shards']} shards, {megabytes:.1f} MB")
    if "val" not in indices and args.val_fraction != 0:
        print("no val split: the data set has none here, or its share of so few examples is none; see --val-fraction")
    folders = {name: shlex.quote(str(args.out / name)) if name in indices else "null" for name in ("train", "val")}
    print(f"{seconds:.1f} s with {args.workers} workers; look at it:")
    print(f"  python -m data.inspect {shlex.quote(str(args.out))}")
    print("then train:")
    print(f"  {NEXT} data.train={folders['train']} data.val={folders['val']} output_dir=outputs/{args.out.name}")


def _fraction(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0 and below 1")
    return number


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} must be i/n with 1 <= i <= n, such as 2/8")
    return int(number), int(of)


def _parser() -> argparse.ArgumentParser:
    layouts = "\n".join(f"  {name:16}{source.layout}" for name, source in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="python -m data.build_shards", description=__doc__, epilog=f"layouts of --root:\n{layouts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--dataset", choices=SOURCES, required=True, help="the layout of the raw folder, see below")
    add("--root", type=Path, required=True, help="the raw folder (pairs: or a .csv or .jsonl manifest)")
    add("--out", type=Path, required=True, help="where train/ and val/ are made")
    add("--label-set", help="name, or a YAML file as data/label_sets/face19.yaml (default: the data set's own)")
    add("--label-map", help="name, or a YAML file as data/label_maps/lip20_to_goliath28.yaml: store another set's classes")
    add("--mask-colors", action="store_true", help="masks are RGB pictures in the label set's exact colours")
    add("--keep-constant", action="store_true", help="masks of one value alone are meant so")
    add("--on-error", choices=("refuse", "skip"), default="refuse", help="what to do about bad examples (default refuse)")
    add("--val-fraction", type=_fraction, help=f"share that validates; 0: none (default: own split, else {VAL_FRACTION})")
    add("--limit", type=whole_number(1), help="take the first so many examples only")
    add("--encode", choices=("keep", "lossless", "jpeg"), default="keep", help="images as they are (default), as QOI "
        "(faster to read), or as JPEG; masks are always lossless")  # fmt: skip
    add("--jpeg-quality", type=whole_number(50, 100), default=95, metavar="50..100", help="(default 95)")
    add("--max-side", type=whole_number(1), help="shrink images whose longer side has more pixels")
    add("--samples-per-shard", type=whole_number(1), default=1000, help="examples for one tar (default 1000)")
    add("--workers", type=whole_number(1), default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    add("--part", type=_part, default=(1, 1), metavar="i/n", help="make the i-th of n shares of the shards only, as the "
        "tasks of a Slurm array do; the same command without --part ends the build")  # fmt: skip
    add("--check", action="store_true", help="look at the arguments only; prints OUT")
    add("--images", help="pairs: folder of the images (default images)")
    add("--masks", help="pairs: folder of the masks (default masks)")
    add("--mask-suffix", help="pairs: what mask names have behind the image's, such as _seg")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cleans up as Ctrl-C does
    sys.exit(main())
