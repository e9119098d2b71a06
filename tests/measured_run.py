"""python -m tests.measured_run JOBS.json WORLD: trains experiments one after another, each in WORLD processes.

JOBS.json is {name: [config, override, ...]}. Rank 0 leaves memory.json in each output folder: bytes of its tensors in the third
step, `held` before the optimizer's (those of parameters, gradients and states, without the batch and what is computed of it)
and at the `peak`, and of the `batch`. Ends at the first experiment that fails.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import train.loop
import train.run
from tests.forks import attempt
from train.memory import PeakTracker

MEASURED = 3  # the call of train_step
before: list[torch.Tensor] = []
calls, output_dir = 0, Path()
build_engine, train_step = train.run.build_engine, train.loop.train_step


def tensors() -> Iterator[torch.Tensor]:
    """All that Python knows, and their gradients; DeepSpeed has some on the meta device."""
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type != "meta":
            yield one
            if one.is_leaf and one.grad is not None:
                yield one.grad


def size(found: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}
    known = {tensor.untyped_storage()._cdata for tensor in before}
    return sum(nbytes for key, nbytes in storages.items() if key not in known)


def settled(measure: Callable[[], int]) -> int:
    """The least of some readings: what was sent is let go of by another thread, some time later."""
    found = []
    for _ in range(4):
        gc.collect()
        found.append(measure())
        time.sleep(0.1)
    return min(found)


class SettledPeak(PeakTracker):
    """Waits for that thread at each new peak: what was sent would count beside what is made next, in some runs only."""

    sent = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.sent |= function.namespace == "c10d"
        return super().__torch_dispatch__(function, types, args, kwargs)

    def count(self, tensor: torch.Tensor) -> None:
        known = self.peak
        super().count(tensor)
        if self.sent and self.peak > known:
            time.sleep(0.03)
            self.peak = max(known, self.now)


def build(model, config, settings):
    global output_dir
    output_dir = config.output_dir
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    before.extend(tensor for tensor in tensors() if tensor.untyped_storage()._cdata not in own)
    return build_engine(model, config, settings)


def measured_step(engine, micro_batches, *others):
    global calls
    calls += 1
    if calls != MEASURED or os.environ["RANK"] != "0":
        return train_step(engine, micro_batches, *others)
    told = {"batch": sum(t.nbytes for b in micro_batches for t in (b.images, b.labels, b.pixel_counts, b.seeds))}
    tracker, step = SettledPeak(before), engine.step
    for tensor in list(tensors()):
        tracker.count(tensor)

    def watched_step() -> None:
        if engine.is_gradient_accumulation_boundary():
            kept = (torch.float32, torch.bfloat16)
            told["held"] = settled(lambda: size([t for t in tensors() if t.is_leaf and t.dtype in kept]))
        step()

    engine.step = watched_step
    with tracker:
        result = train_step(engine, micro_batches, *others)
    engine.step = step
    (output_dir / "memory.json").write_text(json.dumps(told | {"peak": tracker.peak}))
    return result


if __name__ == "__main__":
    path, world = sys.argv[1:]
    train.run.build_engine, train.loop.train_step = build, measured_step
    for name, job in json.loads(Path(path).read_text()).items():
        code, output = attempt(job, int(world))
        if code:
            sys.exit(f"{name}: exit code {code}\n{output}")
