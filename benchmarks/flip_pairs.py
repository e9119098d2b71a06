"""What the left/right flip pairs are worth: the demo trained with them, and with them removed from the shards' index.

    make demo && .venv/bin/python benchmarks/flip_pairs.py [key=value ...]

Both runs are the same in all else. Without the pairs, every mirrored image teaches that a left eye is a right one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "outputs/demo/shards"
WORK = ROOT / "outputs/flip_pairs"
SIDED = ("Eye", "Brow", "Ear")


def shards(name: str, keep_pairs: bool) -> Path:
    """A copy of the demo's shards (hard links), its index with or without the flip pairs."""
    folder = WORK / name / "shards"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for path in (DEMO / split).iterdir():
            os.link(path, folder / split / path.name)
        index = json.loads((DEMO / split / "index.json").read_text())
        if not keep_pairs:
            index["label_set"]["flip_pairs"] = []
        (folder / split / "index.json").unlink()  # the link, not the demo's file
        (folder / split / "index.json").write_text(json.dumps(index))
    return folder


def scores(name: str, keep_pairs: bool, overrides: list[str]) -> dict[str, float]:
    """Train and return the last validation's values."""
    folder, output = shards(name, keep_pairs), WORK / name / "run"
    environment = {"DEVICES": "0,1", **os.environ, "CONFIG": "train/configs/demo.yaml", "OUTPUT_DIR": str(output)}
    data = [f"data.train={folder / 'train'}", f"data.val={folder / 'val'}", "wandb.mode=disabled"]
    subprocess.run(["launch/node.sh", *data, *overrides], cwd=ROOT, env=environment, check=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val/miou" in line][-1]


def main() -> None:
    if not (DEMO / "val" / "index.json").is_file():
        sys.exit(f"error: {DEMO}: no shards there; run `make demo` first")
    shutil.rmtree(WORK, ignore_errors=True)
    with_pairs = scores("with", True, sys.argv[1:])
    without = scores("without", False, sys.argv[1:])
    sided = [f"iou/{side}_{part}" for part in SIDED for side in ("Left", "Right")]
    print(f"\n{'IoU':<12} with pairs   without")
    for key in (*sided, "val/miou"):
        print(f"{key.split('/')[-1]:<12} {with_pairs[key]:10.3f} {without[key]:9.3f}")
    means = [sum(run[key] for key in sided) / len(sided) for run in (with_pairs, without)]
    ratio = means[1] / means[0] if means[0] else float("nan")  # of a few steps
    print(f"{'mean of six':<12} {means[0]:10.3f} {means[1]:9.3f}   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
