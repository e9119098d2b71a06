"""`python -m train`, which also leaves the first step's gradients, as they are before clipping, in the file GRADIENTS."""

import os
from collections.abc import Callable

import torch
from deepspeed.utils import safe_get_full_grad

import train.loop
from data.loader import Batch
from train.__main__ import main
from train.engine import DeepSpeedEngine, Job
from train.loss import PixelLoss


def recorded(train_step: Callable) -> Callable:
    def step(engine: DeepSpeedEngine, micro_batches: list[Batch], loss: PixelLoss, job: Job) -> float:
        update = engine.step

        def write_and_update() -> None:
            if engine.is_gradient_accumulation_boundary() and not os.path.exists(os.environ["GRADIENTS"]):
                torch.distributed.barrier()  # all have looked before rank 0 writes
                parameters = engine.module.named_parameters()
                gradients = {name: safe_get_full_grad(parameter) for name, parameter in parameters}
                if job.is_main:
                    torch.save({name: g.clone() for name, g in gradients.items() if g is not None}, os.environ["GRADIENTS"])
            update()

        engine.step = write_and_update
        value = train_step(engine, micro_batches, loss, job)
        engine.step = update
        return value

    return step


if __name__ == "__main__":
    train.loop.train_step = recorded(train.loop.train_step)
    main()
