"""What recomputation keeps of an image, and what it costs, measured on real tensors.

    .venv/bin/python -m benchmarks.recomputation [--arch sapiens_0.3b] [--size 512 384]

Prints for each setting of `model.recompute` the bytes that one image keeps for the backward pass in bf16, and, at half
of each side and in fp32, the time of forward and backward pass and the largest difference of a gradient to that without.
"""

import argparse
import sys
import time

import torch

from model import ModelError
from model.recompute import kept_bytes, recompute
from model.segmenter import Segmenter, build_segmenter

MODES = ("none", "head", "attention", "mlp", 4, 2, "blocks")
ROUNDS = 3


def build(arch: str, size: tuple[int, int], mode: str | int) -> Segmenter:
    torch.manual_seed(0)
    model = build_segmenter(arch, 19, size).train()
    recompute(model, mode)
    return model


def gradients(model: Segmenter, images: torch.Tensor) -> tuple[list[torch.Tensor], float]:
    started = time.perf_counter()
    model(images, torch.arange(len(images))).float().square().mean().backward()
    seconds = time.perf_counter() - started
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sapiens_0.3b")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 384), metavar=("HEIGHT", "WIDTH"))
    args = parser.parse_args()
    size, small = tuple(args.size), (args.size[0] // 2, args.size[1] // 2)
    try:
        models = {mode: build(args.arch, small, mode) for mode in MODES[:1]}
    except ModelError as error:
        sys.exit(f"error: {error}; time and gradients are measured at half of each side")
    photo, shrunk = (torch.randint(0, 256, (1, 3, *s), dtype=torch.uint8) for s in (size, small))
    for mode in MODES[1:]:  # with the same weights in memory
        models[mode] = build(args.arch, small, mode)
        models[mode].load_state_dict(models["none"].state_dict(), assign=True)
    kept = {mode: kept_bytes(build(args.arch, size, mode).bfloat16(), photo, torch.arange(1)) for mode in MODES}
    expected, _ = gradients(models["none"], shrunk)
    largest = max(gradient.abs().max() for gradient in expected)
    seconds: dict = {mode: [] for mode in MODES}
    apart = dict.fromkeys(MODES, 0.0)
    for _ in range(ROUNDS):
        for mode, model in models.items():
            found, took = gradients(model, shrunk)
            seconds[mode].append(took)
            difference = max((one - other).abs().max() for one, other in zip(found, expected, strict=True)) / largest
            apart[mode] = max(apart[mode], difference.item())
    print(f"{args.arch}, kept at {size[0]}x{size[1]} in bf16; time and gradients at {small[0]}x{small[1]} in fp32")
    print(f"{'recompute':<12}{'GB an image':>12}{'of none':>9}{'time':>8}{'gradients apart':>18}")
    for mode in MODES:
        share, slower = kept[mode] / kept["none"], min(seconds[mode]) / min(seconds["none"])
        print(f"{mode!s:<12}{kept[mode] / 1e9:>12.2f}{share:>9.2f}{slower:>7.2f}x{apart[mode]:>18.1e}")


if __name__ == "__main__":
    main()
