"""python -m tests.raising_run: as python -m train, but the last rank raises in optimizer step 5."""

import train.loop
from train.__main__ import main

train_step = train.loop.train_step


def step(engine, *arguments: object) -> float:
    if engine.global_rank == engine.world_size - 1 and engine.global_steps == 5:
        raise ValueError("broken on purpose")
    return train_step(engine, *arguments)


if __name__ == "__main__":
    train.loop.train_step = step
    main()
