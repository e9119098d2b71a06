"""Do the losses of a run stay those of plain PyTorch, whatever is computed otherwise?

    .venv/bin/python -m benchmarks.losses --data shards/face/train [--config FILE] [--steps 200] [key=value ...]

Trains the same weights on the same examples in the same order: by the plain peer of train.benchmark (PyTorch's own modules, no
DeepSpeed), and by ours, with each of the settings that compute something otherwise. Prints how far their losses are apart, over
the mean loss: the mean and the largest of single steps, and of the mean of the last tenth. Beside them, as a measure of what
training makes of a rounding: the plain peer with weights of which each is a millionth larger or smaller, or as it was; and of
views that are made another way: those of augment.faithful.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from data import DataError
from data.arguments import whole_number
from data.mixture import Mixture, MixtureEntry
from model import ModelError
from train import TrainError
from train.check import check
from train.clock import StepClock
from train.config import load_config
from train.opened import Opened

# One micro batch a step, for the peer's loss is a mean over each; no dropout, which the peer draws from the running state; and
# nothing that it does not do.
EQUAL = [
    "precision=fp32", "micro_batch_size=8", "global_batch_size=8", "model.dropout=0", "optimizer.lr=2e-3",
    "optimizer.layer_decay=1", "loss.dice=0", "loss.label_smoothing=0", "schedule.warmup_steps=0", "data.rare_share=null",
]  # fmt: skip
VIEWS = ["augment.scale=[0.5,2]", "augment.rotate_probability=0.5", "augment.photometric=true", "augment.max_class_share=0.9"]
RUNS = {
    "plain": [],
    "plain, nudged": [],
    "ours": [],
    "recompute": ["model.recompute=blocks"],
    "on_device": ["augment.on_device=true"],
    "faithful": ["augment.faithful=true"],
    "compile": ["compile=true"],
    "zero3": ["deepspeed=ds_configs/zero3.json"],
    "plain, bf16": ["precision=bf16"],
    "ours, bf16": ["precision=bf16"],
}


def train(path: Path, overrides: list[str], name: str, steps: int) -> list[float]:
    """The losses of all steps; in a process of its own, for a job has one engine."""
    found = Opened.by(load_config(path, overrides), steps)
    if "nudged" in name:
        for parameter in found.model.parameters():
            parameter.data *= 1 + 1e-6 * torch.randint(-1, 2, parameter.shape)
    with redirect_stdout(sys.stderr):  # DeepSpeed tells each part of its start
        step = found.step("plain" if "plain" in name else "ours", StepClock(found.job.on_gpu))
    with closing(found.batches):
        return [step(micro_batches) for micro_batches in found.batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a training split")
    parser.add_argument("--config", type=Path, default=Path("train/configs/demo.yaml"))
    parser.add_argument("--steps", type=whole_number(1), default=200)
    parser.add_argument("--only", action="append", choices=list(RUNS), metavar="RUN", help="beside plain; more than once")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    fixed = {setting.split("=")[0] for setting in EQUAL}
    for override in args.overrides:
        if override.split("=")[0] in fixed:
            sys.exit(f"error: {override}: fixed here, so that both sides compute the same; leave it out")
    runs = {
        name: [f"data.train={args.data}", *EQUAL, *VIEWS, *args.overrides, *own]
        for name, own in RUNS.items()
        if name == "plain" or name in (args.only or RUNS)
    }
    try:
        data = Mixture.open([MixtureEntry(path=args.data)])
    except DataError as error:
        sys.exit(f"error: {error}")
    if not data.labelled.all():
        sys.exit(f"error: {args.data}: some masks cannot show every class, which the plain loss does not heed; give other shards")
    for name, settings in runs.items():  # before the first trains
        try:
            check(load_config(args.config, settings), data, None, 1, torch.cuda.is_available())
        except (TrainError, DataError, ModelError) as error:
            sys.exit(f"error: {name}: {error}")
    losses: dict[str, np.ndarray] = {}
    tail = max(1, args.steps // 10)
    print(f"| {args.steps} steps | first loss | last tenth | apart: mean | largest | last tenth |\n|---|---|---|---|---|---|")
    for name, settings in runs.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                losses[name] = np.array(process.submit(train, args.config, settings, name, args.steps).result())
            except (TrainError, DataError, ModelError) as error:
                sys.exit(f"error: {name}: {error}")
        apart = np.abs(losses[name] - losses["plain"]) / losses["plain"].mean()
        ends = [losses[run][-tail:].mean() for run in (name, "plain")]
        last = abs(ends[0] - ends[1]) / losses["plain"].mean()
        told = f"{apart.mean():.1e} | {apart.max():.1e} | {last:.1e}" if name != "plain" else "- | - | -"
        print(f"| {name} | {losses[name][0]:.4f} | {ends[0]:.4f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
