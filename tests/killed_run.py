"""python -m tests.killed_run PLAN.json: one run, killed again and again, until it has ended by itself.

PLAN.json is {"job": [config, override, ...], "worlds": [2, ...], "kills": 20, "seed": 0}. Each start has the next of `worlds`
processes, which append to the output folder's batches_RANK.jsonl, for each step, the SHA-256 of every sample they train on. Of
five starts one is killed while it begins, one in a step, one while it evaluates, two while they save; when exactly is drawn.
Prints a line of JSON for each kill.
"""

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import train.loop
from tests.conftest import PATIENCE
from tests.forks import finish, kill, start
from train.config import load_config
from train.loop import Training

MARKS = {"evaluation": "evaluating_*", "saving": "checkpoints/unfinished_*"}


def hashing(fit: Callable) -> Callable:
    def run(training: Training) -> bool:
        train_step, validate = train.loop.train_step, training._validate

        def marked_validate() -> bool:
            evaluating = training.config.output_dir / f"evaluating_{training.job.rank}"
            evaluating.touch()
            result = validate()
            evaluating.unlink()
            return result

        def step(engine, micro_batches, loss, job, *others) -> tuple:
            samples = [
                hashlib.sha256(image.numpy().tobytes() + label.numpy().tobytes() + seed.numpy().tobytes()).hexdigest()
                for batch in micro_batches
                for image, label, seed in zip(batch.images, batch.labels, batch.seeds, strict=True)
            ]
            line = {"step": training.state.step, "rank": job.rank, "world": job.world_size, "samples": samples}
            with (training.config.output_dir / f"batches_{job.rank}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            return train_step(engine, micro_batches, loss, job, *others)

        train.loop.train_step, training._validate = step, marked_validate
        return fit(training)

    return run


def steps_logged(folder: Path) -> int:
    path = folder / "log.txt"
    return path.read_text().count("  loss ") if path.exists() else 0


def marks(folder: Path, where: str) -> list[str]:
    """What tells that a run is there. A folder with a run.json is an old checkpoint that is being removed."""
    return [path.name for path in folder.glob(MARKS[where]) if not (path / "run.json").exists()]


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    config, *overrides = plan["job"]
    folder = load_config(Path(config), overrides).output_dir
    draw = random.Random(plan["seed"])
    worlds = cycle(plan["worlds"])
    Training.fit = hashing(Training.fit)
    for world, where in zip(islice(worlds, plan["kills"]), cycle(["start", "step", "evaluation", "saving", "saving"])):
        before, known = time.monotonic(), steps_logged(folder)
        for path in folder.glob("evaluating_*"):
            path.unlink()
        processes = start(plan["job"], world, sys.stderr.fileno())
        enough = known + draw.randint(1, 4) if where != "start" else 0
        try:
            while steps_logged(folder) < enough or (where in MARKS and not marks(folder, where)):
                assert time.monotonic() - before < PATIENCE, "no progress"
                time.sleep(0.003)
            until = time.monotonic() + draw.uniform(0, {"start": 3, "step": 0.4, "evaluation": 0.05, "saving": 0.01}[where])
            while time.monotonic() < until and (where != "start" or steps_logged(folder) == known):
                time.sleep(0.003)
        finally:
            kill(processes)
        found = {mark: marks(folder, mark) for mark in MARKS}
        print(json.dumps({"world": world, "where": where, "seconds": round(time.monotonic() - before, 2), **found}), flush=True)
    sys.exit(finish(start(plan["job"], next(worlds), sys.stderr.fileno()), seconds=PATIENCE))


if __name__ == "__main__":
    main()
