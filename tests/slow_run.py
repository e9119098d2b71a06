"""python -m tests.slow_run: as python -m train, but from optimizer step FROM on the last rank sleeps SECONDS in each PHASE
("data", "forward", "backward")."""

import os
import time

import train.loop
from train.__main__ import main
from train.clock import StepClock

enter = StepClock.enter


def slow(clock: StepClock, phase: str) -> None:
    enter(clock, phase)
    last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    if last and phase == os.environ["PHASE"] and clock.step >= int(os.environ["FROM"]):
        time.sleep(float(os.environ["SECONDS"]))


if __name__ == "__main__":
    train.loop.StepClock.enter = slow
    main()
