"""python -m tests.raising_run: as python -m train, but in optimizer step 5 the last rank raises what RAISES names."""

import os

from torch import OutOfMemoryError

import train.loop
from data import DataError
from train.__main__ import main

KINDS = {kind.__name__: kind for kind in (ValueError, DataError, OutOfMemoryError)}

train_step = train.loop.train_step


def step(engine, *arguments: object) -> tuple:
    if engine.global_rank == engine.world_size - 1 and engine.global_steps == 5:
        raise KINDS[os.environ["RAISES"]]("broken on purpose")
    return train_step(engine, *arguments)


if __name__ == "__main__":
    train.loop.train_step = step
    main()
