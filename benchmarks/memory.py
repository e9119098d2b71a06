"""What each size needs on a GPU, as python -m train.doctor predicts it; and how near that is to what is measured here.

    .venv/bin/python -m benchmarks.memory [--size 1024 768] [--archs sapiens_1b ...] [--precision bf16] [--gpus 8]
    .venv/bin/python -m benchmarks.memory --measure [--size, --archs, --precision] [--modes none head blocks] [--batches 1 2]

The first allocates nothing and needs no GPU. It prints in GB: what one image takes at most in forward and backward pass,
for three settings of `model.recompute`, and what a GPU needs in all with one image at a time and `recompute=blocks`, on one GPU
and on several, at some ZeRO stages.

The second does a forward pass, loss and backward pass for real, without keeping the gradients of parameters, and prints
beside the prediction the most that was taken: by tensors, and in all. On a GPU that is what torch allocated, on a CPU what the
process had resident: with what its kernels take by the way. One without AVX-512 takes hours for bf16: give --precision fp32.
"""

import argparse
import multiprocessing
import re
import signal
import sys
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from data.arguments import whole_number
from data.labels import load_label_set
from model import ModelError
from model.archs import ARCHS
from train import TrainError
from train.config import Config, load_config
from train.errors import is_out_of_memory
from train.loss import PixelLoss
from train.memory import PeakTracker
from train.remedies import GB, Remedies
from train.run import build_model, prepare

MODES = ("none", "head", "blocks")
ALONE = ("zero1", "zero2_offload", "zero3_offload")  # on one GPU
TOGETHER = ("zero1", "zero2", "zero3")
FACE = load_label_set("face19")


def experiment(arch: str, size: list[int], precision: str, gpus: int, mode: str | int, stage: str, batch: int = 1) -> Config:
    settings = {
        "model.arch": arch, "model.image_size": size, "model.patch_padding": "null", "model.recompute": mode,
        "precision": precision, "micro_batch_size": batch, "global_batch_size": batch * gpus,
        "deepspeed": f"ds_configs/{stage}.json",
    }  # fmt: skip
    return load_config(Path("train/configs/face_1b.yaml"), [f"{key}={value}" for key, value in settings.items()])


def print_predictions(archs: list[str], size: list[int], precision: str, gpus: int) -> None:
    alone, together = (Remedies(FACE, True, number, True, None) for number in (1, gpus))
    columns = [f"image, {mode}" for mode in MODES]
    columns += [f"1 GPU, {stage}" for stage in ALONE] + [f"{gpus} GPUs, {stage}" for stage in TOGETHER]
    print("| size | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for arch in archs:
        images = [alone.fit(experiment(arch, size, precision, 1, mode, "zero1")).memory.activations for mode in MODES]
        needed = [alone.fit(experiment(arch, size, precision, 1, "blocks", stage)).needed for stage in ALONE]
        needed += [together.fit(experiment(arch, size, precision, gpus, "blocks", stage)).needed for stage in TOGETHER]
        print(f"| `{arch}` | " + " | ".join(f"{number / GB:.1f}" for number in images + needed) + " |", flush=True)


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS, those now; VmHWM, the most since `forget_peak`."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(config: Config, result: Connection) -> None:
    """Sends the bytes that a micro batch took at most beside weights and pixels: (of tensors, in all), or None where it does not
    fit. For a process of its own: what another measurement has freed would be used again, unseen."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = build_model(config, FACE.num_classes)
    model = model.to(torch.float32 if config.precision == "fp32" else torch.bfloat16).train()
    loss = PixelLoss(torch.ones(FACE.num_classes, device=device), FACE)

    def allocate() -> None:
        model.to_empty(device=device)
        prepare(model, config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def step(batch: int, size: tuple[int, int]) -> tuple[int, int]:
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)
        labels = torch.randint(0, FACE.num_classes, (batch, *size), dtype=torch.uint8, device=device)
        on_gpu = device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
        torch.cuda.reset_peak_memory_stats() if on_gpu else forget_peak()
        with PeakTracker([*model.parameters(), *model.buffers(), images, labels]) as tracker:
            loss.share(model(images, torch.arange(batch)), labels, (float(labels.numel()), float(batch))).backward()
        return tracker.peak, (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before

    try:
        allocate()
        step(1, (64, 48))  # the kernels load their code
        result.send(step(config.micro_batch_size, config.model.image_size))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result.send(None)


def print_measured(archs: list[str], size: list[int], precision: str, modes: list[str | int], batches: list[int]) -> None:
    remedies = Remedies(FACE, True, 1, True, None)
    configs = [experiment(arch, size, precision, 1, mode, "zero1", batch) for arch, mode, batch in product(archs, modes, batches)]
    print(f"GB an image of {size[0]}x{size[1]}, {precision}")
    print("| size | recompute | batch | predicted | tensors | in all | in all / predicted |\n|---|---|---|---|---|---|---|")
    for config in configs:
        arch, mode, batch = config.model.arch, config.model.recompute, config.micro_batch_size
        predicted = remedies.fit(config).memory.activations / batch / GB
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(config, sender))
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            found = None
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):  # killed: the machine's memory is too small
            sys.exit(f"{arch}, recompute {mode}, batch {batch}: failed, see above")
        told = "does not fit here | - | -"
        if found:
            tensors, in_all = (taken / batch / GB for taken in found)
            told = f"{tensors:.2f} | {in_all:.2f} | {in_all / predicted:.2f}"
        print(f"| `{arch}` | {mode} | {batch} | {predicted:.2f} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 768], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--gpus", type=whole_number(1), default=8)
    parser.add_argument("--archs", nargs="+", default=[name for name in ARCHS if not name.startswith("tiny")])
    parser.add_argument("--measure", action="store_true", help="measure a step instead")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="of model.recompute, with --measure")
    parser.add_argument("--batches", type=whole_number(1), nargs="+", default=[1, 2], help="with --measure")
    args = parser.parse_args()
    try:
        if args.measure:
            modes = [int(mode) if mode.isdecimal() else mode for mode in args.modes]
            print_measured(args.archs, args.size, args.precision, modes, args.batches)
        else:
            print_predictions(args.archs, args.size, args.precision, args.gpus)
    except (TrainError, ModelError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
