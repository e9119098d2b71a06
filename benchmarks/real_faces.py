"""Can the tiny model learn real faces? Over-fit on all of a FaceSynthetics folder, then train on 80 % and validate.

    .venv/bin/python -m benchmarks.real_faces /path/to/dataset_100 [key=value ...]

Prints each mIoU at the network's 128x96, which is what it was taught, and at the masks' own size, where a 128x96 output
cannot follow every outline.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import torch

from data.shards import ShardSet
from model.trained import load_segmenter
from train.evaluate import evaluate

ROOT = Path(__file__).parent.parent
WORK = ROOT / "outputs/real_faces"
HEIGHT, WIDTH = 128, 96
# No augmentation: the question is whether the model can hold these very images.
OVERFIT = [
    "augment.scale=[1,1]", "augment.max_class_share=1", "augment.rotate_probability=0", "augment.flip_probability=0",
    "augment.photometric=false", "model.dropout=0",
]  # fmt: skip


def shrink(root: Path, out: Path) -> None:
    """The same folder at the network's size, as the validation resize shows it."""
    out.mkdir(parents=True)
    for mask in sorted(root.glob("*_seg.png")):
        image = mask.with_name(mask.name.replace("_seg", ""))
        small = cv2.resize(cv2.imread(str(image)), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        labels = cv2.resize(cv2.imread(str(mask), 0), (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST_EXACT)
        cv2.imwrite(str(out / image.name), small)
        cv2.imwrite(str(out / mask.name), labels)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def pack(root: Path, out: Path, val_fraction: float) -> None:
    run(sys.executable, "-m", "data.build_shards", "--dataset", "facesynthetics", "--root", root, "--out", out,
        "--val-fraction", val_fraction)  # fmt: skip


def train(name: str, train_set: Path, val_set: Path, overrides: list[str]) -> tuple[Path, float]:
    """The trained weights, and the seconds from start to end."""
    output, start = WORK / name, time.monotonic()
    launch = ["env", "DEVICES=0,1", "CONFIG=train/configs/demo.yaml", f"OUTPUT_DIR={output}", "launch/node.sh"]
    run(*launch, f"data.train={train_set}", f"data.val={val_set}", "wandb.mode=disabled", *overrides)
    return output / "model.safetensors", time.monotonic() - start


def miou(weights: Path, shards: Path) -> float:
    model, _ = load_segmenter(weights)
    return evaluate(model, ShardSet.open(shards), model.image_size, torch.device("cpu"), batch_size=16)[0].miou


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    shrink(args.root, WORK / "small_faces")
    for size, root in (("full", args.root.resolve()), ("small", WORK / "small_faces")):
        pack(root, WORK / f"all_{size}", 0)
        pack(root, WORK / f"split_{size}", 0.2)
    rows = []
    weights, seconds = train(
        "overfit", WORK / "all_full/train", WORK / "all_full/train", [*OVERFIT, *args.overrides]
    )
    rows.append(("over-fit, its own images", seconds, weights, "all_{}/train"))
    weights, seconds = train("split", WORK / "split_full/train", WORK / "split_full/val", args.overrides)
    rows.append(("80 %, its own images", seconds, weights, "split_{}/train"))
    rows.append(("80 %, the other 20 %", seconds, weights, "split_{}/val"))
    print(f"\n{'mIoU':<26} {'128x96':>7} {'full size':>10} {'training':>10}")
    for title, seconds, weights, shards in rows:
        small, full = (miou(weights, WORK / shards.format(size)) for size in ("small", "full"))
        print(f"{title:<26} {small:7.3f} {full:10.3f} {seconds:8.0f} s")


if __name__ == "__main__":
    main()
