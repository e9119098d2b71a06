"""A table of the JSON files that train.benchmark has written into a folder.

    python -m benchmarks.gpu_table outputs/gpu
"""

import argparse
import json
from pathlib import Path

COLUMNS = {
    "step ms": ("step_ms", ".1f"), "images/s": ("images_per_second", ".2f"), "TFLOP/s": ("tflops", ".1f"), "MFU": ("mfu", ".1%"),
    "peak GB": ("peak_gb", ".2f"),
}  # fmt: skip


def row(found: dict) -> list[str]:
    ours = found["sides"]["ours"]
    what = f"{found['arch']} {'x'.join(map(str, found['image_size']))}"
    options = " ".join(name for name in ("compile", "on_device") if found[name]) or "-"
    setting = [what, str(found["recompute"]), options, str(found["micro_batch_size"]), Path(found["deepspeed"]).stem]
    values = ["-" if ours[key] is None else format(ours[key], form) for key, form in COLUMNS.values()]
    ratio = f"{found['ratios']['images_per_second']:.2f}" if found["ratios"] else "-"
    return [*setting, *values, f"{found['predicted_gb']:.2f}", ratio]


def head(found: dict) -> str:
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "deepspeed", "timm"))
    return f"{found['device']}; {versions}; revision {found['revision'] or 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    rows, heads = [], set()
    for path in sorted(args.folder.glob("*.json")):
        try:
            found = json.loads(path.read_text())
            rows.append(row(found))
            heads.add(head(found))
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"{path}: not what train.benchmark --json of this revision writes; move it away")
    if not rows:
        parser.error(f"{args.folder}: holds no results; benchmarks/gpu.sh {args.folder} makes them")
    names = ["model", "recompute", "with", "batch", "ZeRO", *COLUMNS, "predicted", "to plain"]
    lines = [names, ["---"] * len(names), *rows]
    print("\n".join(sorted(heads)))  # one, if all was measured in one place
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
