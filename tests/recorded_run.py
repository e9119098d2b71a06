"""python -m tests.recorded_run JOBS.json WORLD [STEP]: trains experiments one after another, each in WORLD processes.

JOBS.json is {name: [config, override, ...]}. Each leaves in its output folder

    gradients.pt   those of the first step before clipping
    logits.pt      what the engine gives for `model_cases.images(3)` with the weights that it exports
    rates.json     the learning rate in the last step of each parameter that rank 0 keeps a part of
    timeouts.json  how many seconds each process group waits
    compiled.json  how many functions were compiled

In optimizer step STEP the last rank's first loss is infinite. Ends at the first experiment that fails. WORLD 0: the first one
in this process itself, for CUDA does not outlive a fork.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from torch._dynamo.utils import counters
from torch.distributed import distributed_c10d

import train.loop
from tests.forks import attempt
from tests.model_cases import images
from train.__main__ import run
from train.config import load_config
from train.engine import DeepSpeedEngine, gather_weights
from train.loop import Training


def recorded(fit: Callable, spoilt: int | None) -> Callable:
    def record(training: Training) -> bool:
        engine, config = training.engine, training.config
        update = engine.step
        kept: set[str] = set()

        def keep(what: object, name: str) -> None:
            """The first of each name."""
            if name not in kept and torch.distributed.get_rank() == 0:
                torch.save(what, config.output_dir / name)
            kept.add(name)

        def step() -> None:
            if engine.is_gradient_accumulation_boundary() and "gradients.pt" not in kept:
                parameters = engine.module.named_parameters()
                gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters}
                scale = getattr(engine.optimizer, "loss_scale", 1)  # fp16's
                keep({name: g / scale for name, g in gradients.items() if g is not None}, "gradients.pt")
            update()

        def rates() -> None:
            masters, found = training.saver.masters, {}
            for fragment in masters.fragments:
                tensor, start, numel = masters.place(fragment)
                (scale,) = {scale for scale, first, end in masters.adamw.pieces[tensor] if first < start + numel and start < end}
                found[fragment.name] = engine.optimizer.param_groups[0]["lr"] * scale
            if torch.distributed.get_rank() == 0:
                (config.output_dir / "rates.json").write_text(json.dumps(found))
                groups = [group._get_backend(training.job.device) for group in distributed_c10d._world.pg_map]
                seconds = [group.options._timeout.total_seconds() for group in groups]
                (config.output_dir / "timeouts.json").write_text(json.dumps(seconds))
                (config.output_dir / "compiled.json").write_text(json.dumps(counters["frames"]["ok"]))

        def weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
            rates()
            engine.eval()
            with torch.no_grad():
                keep(engine(images(3, config.model.image_size)), "logits.pt")  # averaged weights are exported first
            return gather_weights(engine)

        share = training.loss.share

        def spoil(*arguments: object) -> torch.Tensor:
            last = training.job.rank == training.job.world_size - 1
            now = training.state.step == spoilt and last and not engine.is_gradient_accumulation_boundary()
            return share(*arguments) * (math.inf if now else 1)

        engine.step, train.loop.gather_weights, training.loss.share = step, weights, spoil
        return fit(training)

    return record


if __name__ == "__main__":
    path, world, *spoilt = sys.argv[1:]
    Training.fit = recorded(Training.fit, int(spoilt[0]) if spoilt else None)
    for name, job in json.loads(Path(path).read_text()).items():
        if world == "0":
            sys.exit(run(load_config(Path(job[0]), job[1:]), check_only=False))
        code, output = attempt(job, int(world))
        if code:
            sys.exit(f"{name}: exit code {code}\n{output}")
