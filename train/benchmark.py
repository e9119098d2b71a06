"""How fast an experiment's whole step is here, and where its time goes.

    python -m train.benchmark --config train/configs/face_1b.yaml [key=value ...] [--synthetic-data] [--compare plain]

Builds the experiment's own model, engine and loader, warms up, and prints a step's milliseconds by phase, images a second, and on
a GPU TFLOP/s, MFU and memory, beside what train.doctor predicts of it. `--compare plain` measures in turns with it what one would
write without this repository: timm's backbone and the head in eager PyTorch with autocast, and fused AdamW, from the same loader.
All figures are medians of single steps.
"""

import argparse
import gc
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch
from torch import Tensor

from data import DataError
from data.arguments import whole_number
from data.batch import Batch
from data.build_shards import main as build_shards
from data.loader import TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan
from data.remote import FileCache
from data.synthetic import write_dataset
from model import ModelError
from model.segmenter import Segmenter
from train import TrainError
from train.__main__ import check
from train.clock import StepClock
from train.config import Config, load_config, training_order
from train.ema import Ema
from train.engine import Job, build_engine, join_job
from train.flops import peak_flops, training_flops
from train.host_facts import packages, revision
from train.loop import train_step
from train.loss import PixelLoss, class_weights
from train.masters import Masters
from train.memory import Estimate
from train.optim import lr_scales, set_lr
from train.peer import Plain
from train.run import build_model, prepare

ROUND = 5  # steps of one side before the other has its turn
PHASES = ("data", "forward", "backward", "optimizer")
TRACED = 2  # steps
DRAWN = {"count": 32, "seed": 0, "size": 512}
ROWS = {
    "step_ms": ("step ms", ".1f"), **{f"{phase}_ms": (f"  {phase}", ".1f") for phase in PHASES},
    "images_per_second": ("images/s", ".2f"), "tflops": ("TFLOP/s", ".2f"), "mfu": ("MFU", ".1%"),
    "peak_gb": ("peak GB", ".2f"), "reserved_gb": ("reserved GB", ".2f"),
}  # fmt: skip
Step = Callable[[list[Batch]], float]  # an optimizer step; returns its loss


def build_ours(
    model: Segmenter, config: Config, settings: dict[str, Any], weights: Tensor, data: Mixture, clock: StepClock, job: Job
) -> Step:
    """What train.loop does in a step that is neither shown nor saved."""
    prepare(model, config)
    scales = lr_scales(model, config.optimizer)
    engine = build_engine(model, config, settings)
    masters = Masters(engine, scales)
    ema = Ema(masters, config.ema.decay) if config.ema.decay is not None else None
    loss = PixelLoss(weights, data.label_set, config.loss.label_smoothing, config.loss.dice)
    engine.train()
    set_lr(engine.optimizer, config.optimizer.lr)

    def step(micro_batches: list[Batch]) -> float:
        value, _ = train_step(engine, micro_batches, loss, job, clock, per_class=False)
        engine.get_global_grad_norm()
        if ema:
            ema.update(step=0)
        return value

    return step


class Side:
    """Steps of one kind, measured in turns with another's."""

    def __init__(self, step: Step, batches: Iterator[list[Batch]], clock: StepClock, job: Job) -> None:
        self.step, self.batches, self.clock, self.job = step, batches, clock, job
        self.laps: list[dict[str, float]] = []
        self.losses: list[float] = []
        self.memory: list[tuple[int, int]] = []  # bytes that tensors took at most, and that torch kept, in each round

    def take(self, steps: int) -> None:
        if self.job.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.clock.enter("other")
        self.clock.read()
        for _ in range(steps):
            self.clock.enter("data")
            micro_batches = next(self.batches)
            self.losses.append(self.step(micro_batches))
            self.clock.enter("other")
            self.laps.append(self.clock.read())
        if self.job.on_gpu:
            self.memory.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))

    def figures(self, rounds: int, images: int, flops: int, peak: float | None, others: int) -> dict[str, Any]:
        """Of the last rounds, for each process; None: not to be had here.

        Args:
            images: of a step and process.  flops: of an image.  peak: the device's, in FLOP/s.
            others: bytes on the device that are the other side's.
        """
        laps, memory = self.laps[-rounds * ROUND :], self.memory[-rounds:]
        seconds = statistics.median(sum(lap.values()) for lap in laps)
        rate = images / seconds
        return {
            "step_ms": 1e3 * seconds,
            "quartiles_ms": statistics.quantiles([1e3 * sum(lap.values()) for lap in laps], n=4)[::2],  # the first and third
            **{f"{phase}_ms": 1e3 * statistics.median(lap.get(phase, 0.0) for lap in laps) for phase in PHASES},
            "images_per_second": rate,
            "tflops": rate * flops / 1e12,
            "mfu": rate * flops / peak if peak else None,
            "peak_gb": (max(peak for peak, _ in memory) - others) / 1e9 if self.job.on_gpu else None,
            "reserved_gb": (max(kept for _, kept in memory) - others) / 1e9 if self.job.on_gpu else None,
            "losses": self.losses,
        }


@dataclass(frozen=True)
class Opened:
    """An experiment, as a run opens it, up to its model and its first batch."""

    config: Config
    settings: dict[str, Any]  # DeepSpeed's, resolved
    job: Job
    data: Mixture
    model: Segmenter
    class_weights: Tensor
    batches: Generator[list[Batch]]  # close it

    @classmethod
    def by(cls, config: Config, steps: int) -> "Opened":
        """Every process of the job must call it. Raises TrainError, DataError, ModelError."""
        job = join_job()
        data = Mixture.open(config.data.train, FileCache(config.data.cache, round(config.data.cache_gigabytes * 1e9)))
        settings = check(config, data, None, job.world_size, job.on_gpu)
        torch.manual_seed(config.seed)
        model = build_model(config, data.label_set.num_classes)
        weights = class_weights(config.loss.class_weights, data.pixel_counts, data.label_set)
        plan = BatchPlan(config.global_batch_size, config.micro_batch_size, job.rank, job.world_size)
        examples = TrainExamples(data, training_order(config, data), config.model.image_size, config.augment)
        batches = train_batches(examples, plan, 0, steps, config.data.workers, config.data.max_bad_fraction, job.on_gpu)
        return cls(config, settings, job, data, model, weights, batches)

    def step(self, side: str, clock: StepClock) -> Step:
        """An optimizer step of "ours" or of the "plain" peer, which has to be asked for first: ours takes the weights."""
        if side == "plain":
            return Plain(self.model, self.config, self.class_weights, self.data.label_set, clock, self.job).step
        return build_ours(self.model, self.config, self.settings, self.class_weights, self.data, clock, self.job)


def measure(config: Config, compare: bool, steps: int, warm_up: int, trace: Path | None) -> dict[str, Any]:
    """What the command prints. Every process of the job must call it. Raises TrainError, DataError, ModelError."""
    rounds = math.ceil(steps / ROUND)
    found = Opened.by(config, (warm_up + rounds * ROUND) * (1 + compare) + TRACED)
    job, data, settings = found.job, found.data, found.settings
    clock, sides, own = StepClock(job.on_gpu), {}, {}
    with closing(found.batches):
        before = _allocated(job)
        for name in ("plain", "ours") if compare else ("ours",):
            sides[name] = Side(found.step(name, clock), found.batches, clock, job)
            sides[name].take(warm_up)
            own[name] = _allocated(job) - before - sum(own.values())
        for _ in range(rounds):
            for side in sides.values():
                side.take(ROUND)
        if trace:
            _trace(sides["ours"], trace)
    flops, peak = training_flops(config, data.label_set.num_classes), peak_flops(config, job.device)
    predicted = Estimate(data.label_set, bool(data.labelled.all()), job.world_size).memory(config, settings).device
    images = config.global_batch_size // job.world_size
    return {
        "arch": config.model.arch, "image_size": config.model.image_size, "recompute": config.model.recompute,
        "compile": config.compile, "on_device": config.augment.on_device,
        "deepspeed": str(config.deepspeed), "processes": job.world_size,
        "micro_batch_size": config.micro_batch_size, "accumulation": settings["gradient_accumulation_steps"],
        "device": torch.cuda.get_device_name() if job.on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "steps": rounds * ROUND, "predicted_gb": predicted / 1e9, "revision": revision(), "packages": packages(),
        "sides": {
            name: sides[name].figures(rounds, images, flops, peak, sum(own.values()) - own[name])
            for name in ("ours", "plain") if name in sides
        },
    }  # fmt: skip


def _allocated(job: Job) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if job.on_gpu else 0


def _trace(side: Side, path: Path) -> None:
    """Writes what Chrome's about:tracing and Perfetto show, and prints what took longest."""
    with torch.profiler.profile() as profiler:
        side.take(TRACED)
    if not side.job.is_main:
        return
    profiler.export_chrome_trace(str(path))
    by = "self_cuda_time_total" if side.job.on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60))


def table(found: dict[str, Any]) -> str:
    """The figures of `measure` for people."""
    sides = found["sides"]
    height, width = found["image_size"]
    lines = [
        f"{found['arch']} at {height}x{width}, recompute {found['recompute']}{', compiled' if found['compile'] else ''}"
        f"{', views on the device' if found['on_device'] else ''}, "
        f"{found['deepspeed']}",
        f"{found['processes']} x {found['device']}; {found['micro_batch_size']} images x {found['accumulation']} accumulated "
        f"on each; medians of {found['steps']} steps",
        f"{'':<16}{''.join(f'{name:>10}' for name in sides)}" + (f"{'ratio':>10}" if len(sides) > 1 else ""),
    ]
    for key, (title, form) in ROWS.items():
        values = [side[key] for side in sides.values()]
        told = "".join(f"{'-' if value is None else format(value, form):>10}" for value in values)
        ratio = f"{values[0] / values[1]:>10.2f}" if len(values) == 2 and all(values) else ""
        lines.append(f"{title:<16}{told}{ratio}")
    spreads = [f"{name} {side['quartiles_ms'][0]:.1f} to {side['quartiles_ms'][1]:.1f} ms" for name, side in sides.items()]
    lines.append(f"half of the steps took: {', '.join(spreads)}")
    return "\n".join([*lines, f"train.doctor predicts {found['predicted_gb']:.2f} GB of tensors"])


@contextmanager
def synthetic_data(wanted: bool) -> Iterator[list[str]]:
    """Overrides that put drawn faces in the place of the experiment's data; none if not `wanted`."""
    if not wanted:
        yield []
        return
    with TemporaryDirectory() as folder:
        faces, shards = Path(folder) / "faces", Path(folder) / "shards"
        write_dataset(faces, **DRAWN)
        with redirect_stdout(StringIO()):
            code = build_shards(
                ["--dataset", "facesynthetics", "--root", str(faces), "--out", str(shards), "--val-fraction", "0"]
            )
        if code:
            raise TrainError("--synthetic-data: the drawn faces could not be packed, see above")
        # Its label set has neither the weights nor the backgrounds of others.
        yield [f"data.train={shards / 'train'}", "data.rare_share=null", "loss.class_weights=none", "augment.background_class=0"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=whole_number(1), default=20, metavar="N", help=f"measured, in rounds of {ROUND}")
    parser.add_argument("--warm-up", type=whole_number(1), default=5, metavar="N", help="steps before that")
    parser.add_argument("--compare", choices=["plain"], help="measure the plain peer as well")
    parser.add_argument("--synthetic-data", action="store_true", help="drawn faces of 512x512 instead of the experiment's data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace of two more steps there, for Chrome")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example micro_batch_size=4")
    args = parser.parse_intermixed_args(argv)
    if args.compare and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("error: --compare plain: the peer is one process; start one, or leave it out")
    is_main = os.environ.get("RANK", "0") == "0"
    for path in filter(None, (args.json, args.trace) if is_main else ()):  # before minutes of measuring
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.open("a") if path.exists() else TemporaryFile(dir=path.parent)).close()
        except OSError as error:
            sys.exit(f"error: {path} cannot be written: {error.strerror}; name another file")
    try:
        with synthetic_data(args.synthetic_data) as overrides:
            config = load_config(args.config, [*args.overrides, *overrides])
            if args.compare and config.precision == "fp16":
                raise TrainError("--compare plain: the peer scales no losses, as fp16 wants it; set precision to bf16 or fp32")
            found = measure(config, args.compare is not None, args.steps, args.warm_up, args.trace)
    except (TrainError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    if is_main:
        print(table(found))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
