"""python -m tests.cluster.held_run ...: `python -m train ...` whose samples are recorded, as tests.killed_run does.

Files in the output folder steer it: `hold` has the number of an optimizer step in which every rank waits until the file is gone;
`raise` has a rank and a step, in which it raises.
"""

import time
from collections.abc import Callable
from pathlib import Path

import train.loop
from tests.killed_run import hashing
from train.__main__ import main
from train.loop import Training


def steered(fit: Callable) -> Callable:
    def run(training: Training) -> bool:
        train_step, folder = train.loop.train_step, training.config.output_dir

        def step(*arguments: object) -> tuple:
            while _numbers(folder / "hold") == [training.state.step]:
                time.sleep(0.05)
            if _numbers(folder / "raise") == [training.job.rank, training.state.step]:
                raise ValueError("broken on purpose")
            return train_step(*arguments)

        train.loop.train_step = step
        return fit(training)

    return run


def _numbers(path: Path) -> list[int]:
    try:
        return [int(word) for word in path.read_text().split()]
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    Training.fit = steered(hashing(Training.fit))
    main()
