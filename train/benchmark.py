"""How fast an experiment's whole step is here, and where its time goes.

    python -m train.benchmark --config train/configs/face_1b.yaml [key=value ...] [--synthetic-data] [--compare plain]

Builds the experiment's own model, engine and loader, warms up, and prints a step's milliseconds by phase, images a second, and on
a GPU TFLOP/s, MFU and memory, beside what train.doctor predicts of it. `--compare plain` measures in turns with it what one would
write without this repository: timm's backbone and the head in eager PyTorch with autocast, and fused AdamW, from the same loader.
Figures are medians of single steps, but of the wait for data the mean: workers deliver many batches at once, and then none.
Ratios are medians over the turns of five steps, for what else the machine does changes meanwhile: one turn tells little. Whether
the workers keep up shows without --compare: in one side's turn they make what the other reads.
"""

import argparse
import gc
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch

from data.arguments import whole_number
from data.batch import Batch
from data.build_shards import main as build_shards
from data.loader import PREFETCH
from data.synthetic import write_dataset
from train import TrainError
from train.clock import StepClock
from train.config import Config, load_config
from train.engine import Job
from train.errors import errors_in_a_line
from train.flops import peak_flops, training_flops
from train.host_facts import packages, revision
from train.memory import Estimate
from train.opened import Opened, Step
from train.pace import PHASES

ROUND = 5  # steps of one side before the other has its turn
TRACED = 2  # steps
DRAWN = {"count": 32, "seed": 0, "size": 512}
ROWS = {
    "step_ms": ("step ms", ".1f"), **{f"{phase}_ms": (f"  {phase}", ".1f") for phase in PHASES},
    "images_per_second": ("images/s", ".2f"), "tflops": ("TFLOP/s", ".2f"), "mfu": ("MFU", ".1%"),
    "peak_gb": ("peak GB", ".2f"), "reserved_gb": ("reserved GB", ".2f"),
}  # fmt: skip


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
        """Of the last rounds; None: not to be had here.

        Args:
            images: of a step, in all processes.  flops: of an image.  peak: the device's, in FLOP/s.
            others: bytes on the device that are the other side's.
        """
        laps, memory = self.laps[-rounds * ROUND :], self.memory[-rounds:]
        times = _times(laps)
        steps = 1e3 / times["step_ms"]  # a second
        speed = images / self.job.world_size * flops * steps  # of a device, in FLOP/s
        return {
            **times,
            "quartiles_ms": statistics.quantiles([1e3 * sum(lap.values()) for lap in laps], n=4)[::2],  # the first and third
            "rounds": [_times(laps[i : i + ROUND]) for i in range(0, len(laps), ROUND)],
            "images_per_second": images * steps,
            "tflops": speed / 1e12,
            "mfu": speed / peak if peak else None,
            "peak_gb": (max(peak for peak, _ in memory) - others) / 1e9 if self.job.on_gpu else None,
            "reserved_gb": (max(kept for _, kept in memory) - others) / 1e9 if self.job.on_gpu else None,
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses],  # JSON has no NaN
        }


def _times(laps: list[dict[str, float]]) -> dict[str, float]:
    """Of a step, in ms."""
    data = statistics.fmean(lap["data"] for lap in laps)
    step = data + statistics.median(sum(lap.values()) - lap["data"] for lap in laps)
    phases = {f"{phase}_ms": 1e3 * statistics.median(lap.get(phase, 0.0) for lap in laps) for phase in PHASES}
    return {"step_ms": 1e3 * step, **phases, "data_ms": 1e3 * data}


def ratios(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Of the two sides' figures, those that both have. Not of the waits: that for data is the loader's, which both share, and
    only of several processes one waits for the others."""
    turns, waits = list(zip(ours["rounds"], plain["rounds"], strict=True)), ("data_ms", "wait_ms")
    found = {key: statistics.median(a[key] / b[key] for a, b in turns) for key in ours["rounds"][0] if key not in waits}
    speeds = {key: 1 / found["step_ms"] for key in ("images_per_second", "tflops", "mfu") if ours[key]}
    return found | speeds | {key: ours[key] / plain[key] for key in ("peak_gb", "reserved_gb") if ours[key]}


def measure(config: Config, compare: bool, steps: int, warm_up: int, trace: Path | None) -> dict[str, Any]:
    """What the command prints. Every process of the job must call it. Raises TrainError, DataError, ModelError."""
    rounds = math.ceil(steps / ROUND)
    ahead = PREFETCH * config.data.workers  # micro batches that workers may have made while models were built and compiled
    found = Opened.by(config, (1 + warm_up + rounds * ROUND) * (1 + compare) + ahead + TRACED)
    job, data, settings = found.job, found.data, found.settings
    label_set, images = data.label_set, config.global_batch_size
    flops, peak = training_flops(config, label_set.num_classes), peak_flops(config, job.device)
    clock, sides = StepClock(job.on_gpu), {}
    resident: dict[str, int] = {}  # bytes of each side between its steps: on the device during those of the other as well
    with closing(found.batches):
        before = _allocated(job)
        for name in ("plain", "ours") if compare else ("ours",):
            sides[name] = Side(found.step(name, clock), found.batches, clock, job)
            sides[name].take(1)  # compiles
            resident[name] = _allocated(job) - before - sum(resident.values())
        for _ in range(math.ceil(ahead / settings["gradient_accumulation_steps"])):  # else they hide how slow the workers are
            next(found.batches)
        for side in sides.values():  # the first waits until the workers deliver again
            side.take(warm_up)
        for _ in range(rounds):
            for side in sides.values():
                side.take(ROUND)
        others = {name: sum(resident.values()) - resident[name] for name in sides}
        figures = {name: sides[name].figures(rounds, images, flops, peak, others[name]) for name in reversed(sides)}
        if trace:
            _trace(sides["ours"], trace)
    predicted = Estimate(label_set, bool(data.labelled.all()), job.world_size).memory(config, settings).device
    return {
        "arch": config.model.arch, "image_size": config.model.image_size, "recompute": config.model.recompute,
        "compile": config.compile, "on_device": config.augment.on_device,
        "deepspeed": str(config.deepspeed), "processes": job.world_size,
        "micro_batch_size": config.micro_batch_size, "accumulation": settings["gradient_accumulation_steps"],
        "device": torch.cuda.get_device_name() if job.on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "steps": rounds * ROUND, "predicted_gb": predicted / 1e9, "revision": revision(), "packages": packages(),
        "sides": figures, "ratios": ratios(**figures) if compare else {},
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
        f"on each; medians of {found['steps']} steps, of data the mean",
        f"{'':<16}{''.join(f'{name:>10}' for name in sides)}" + (f"{'ratio':>10}" if len(sides) > 1 else ""),
    ]
    for key, (title, form) in ROWS.items():
        if key == "wait_ms" and found["processes"] == 1:  # for the others
            continue
        values = [side[key] for side in sides.values()]
        told = "".join(f"{'-' if value is None else format(value, form):>10}" for value in values)
        ratio = f"{found['ratios'][key]:>10.2f}" if key in found["ratios"] else ""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the folder would stay
    with TemporaryDirectory() as folder:
        faces, shards = Path(folder) / "faces", Path(folder) / "shards"
        write_dataset(faces, **DRAWN)
        with redirect_stdout(StringIO()):
            code = build_shards(
                ["--dataset", "facesynthetics", "--root", str(faces), "--out", str(shards), "--val-fraction", "0"]
            )
        if code:
            raise TrainError("--synthetic-data: the drawn faces could not be packed, see above")
        # Its label set has neither the weights nor the backgrounds of others; epochs of so few images may end in a warm-up.
        yield [
            f"data.train={shards / 'train'}", "data.rare_share=null", "loss.class_weights=none", "augment.background_class=0",
            "schedule.warmup_steps=0",
        ]  # fmt: skip


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
    if args.json and args.trace and args.json.resolve() == args.trace.resolve():
        sys.exit(f"error: {args.json}: both --json and --trace would be written there; name two files")
    is_main = os.environ.get("RANK", "0") == "0"
    for path in filter(None, (args.json, args.trace) if is_main else ()):  # before minutes of measuring
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.open("a") if path.exists() else TemporaryFile(dir=path.parent)).close()
        except OSError as error:
            sys.exit(f"error: {path} cannot be written: {error.strerror}; name another file")
    with errors_in_a_line(), synthetic_data(args.synthetic_data) as overrides:
        config = load_config(args.config, [*args.overrides, *overrides])
        if args.compare and config.precision == "fp16":
            raise TrainError("--compare plain: the peer scales no losses, as fp16 wants it; set precision to bf16 or fp32")
        found = measure(config, args.compare is not None, args.steps, args.warm_up, args.trace)
        torch.distributed.destroy_process_group()
    if is_main:
        print(table(found))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
