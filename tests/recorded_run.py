"""python -m tests.recorded_run JOBS.json: as tests.run_recipes, also in every process of the deepspeed launcher.

Each job leaves in its output folder gradients.pt, those of the first step before clipping, and logits.pt, what the engine
gives for `model_cases.images(3)` with the weights that it exports. Ends at the first job that fails.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

import train.run
from tests.model_cases import images
from tests.run_recipes import attempt
from train.config import Config
from train.engine import DeepSpeedEngine, gather_weights


def recorded(fit: Callable) -> Callable:
    def run(engine: DeepSpeedEngine, config: Config, *others: object) -> None:
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
                keep({name: g.clone() for name, g in gradients.items() if g is not None}, "gradients.pt")
            update()

        def weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
            engine.eval()
            with torch.no_grad():
                keep(engine(images(3, config.model.image_size)), "logits.pt")  # averaged weights are exported first
            return gather_weights(engine)

        engine.step, train.loop.gather_weights = step, weights
        fit(engine, config, *others)

    return run


if __name__ == "__main__":
    train.run.fit = recorded(train.run.fit)
    for name, job in json.loads(Path(sys.argv[-1]).read_text()).items():
        code, output = attempt(*job)
        if code:
            sys.exit(f"{name}: exit code {code}\n{output}")
