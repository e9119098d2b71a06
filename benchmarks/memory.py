"""What each size needs on a GPU, as python -m train.doctor predicts it. Nothing is allocated, and no GPU is needed.

    .venv/bin/python -m benchmarks.memory [--size 1024 768] [--gpus 8] [--archs sapiens_1b ...]

Prints in GB, in bf16: what one image takes at most in forward and backward pass, for three settings of `model.recompute`, and
what a GPU needs in all with one image at a time and `recompute=blocks`, on one GPU and on several, at some ZeRO stages.
"""

import argparse
from pathlib import Path

from data.labels import load_label_set
from model.archs import ARCHS
from train.config import Config, load_config
from train.remedies import GB, Remedies

MODES = ("none", "head", "blocks")
ALONE = ("zero1", "zero2_offload", "zero3_offload")  # on one GPU
TOGETHER = ("zero1", "zero2", "zero3")


def experiment(arch: str, size: list[int], gpus: int, mode: str, stage: str) -> Config:
    settings = {
        "model.arch": arch, "model.image_size": size, "model.patch_padding": "null", "model.recompute": mode,
        "micro_batch_size": 1, "global_batch_size": gpus, "deepspeed": f"ds_configs/{stage}.json",
    }  # fmt: skip
    return load_config(Path("train/configs/face_1b.yaml"), [f"{key}={value}" for key, value in settings.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 768], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--archs", nargs="+", default=[name for name in ARCHS if not name.startswith("tiny")])
    args = parser.parse_args()
    label_set = load_label_set("face19")
    alone, together = (Remedies(label_set, True, gpus, True, None) for gpus in (1, args.gpus))
    columns = [f"image, {mode}" for mode in MODES]
    columns += [f"1 GPU, {stage}" for stage in ALONE] + [f"{args.gpus} GPUs, {stage}" for stage in TOGETHER]
    print("| size | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for arch in args.archs:
        images = [alone.fit(experiment(arch, args.size, 1, mode, "zero1")).memory.activations for mode in MODES]
        needed = [alone.fit(experiment(arch, args.size, 1, "blocks", stage)).needed for stage in ALONE]
        needed += [together.fit(experiment(arch, args.size, args.gpus, "blocks", stage)).needed for stage in TOGETHER]
        print(f"| `{arch}` | " + " | ".join(f"{number / GB:.1f}" for number in images + needed) + " |", flush=True)


if __name__ == "__main__":
    main()
