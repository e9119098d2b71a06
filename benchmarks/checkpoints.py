"""How long training stands still for a checkpoint: written in the background as it is, and beside it waited for.

    .venv/bin/python -m benchmarks.checkpoints [--arch sapiens2_0.1b] [--stage 1] [--folder DIR]

One process trains at 256x192 pixels and saves: in turns it waits for the file, or goes on training until it is written. Both
files are synced to the disk.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

from model.segmenter import build_segmenter
from train.checkpoint import RunState
from train.config import load_config
from train.deepspeed_config import resolve
from train.ema import Ema
from train.engine import build_engine, join_job
from train.masters import Masters
from train.optim import lr_scales
from train.saving import Saver

ROUNDS = 5
# What a run's state tells beside its step: of no account here.
NOTHING = {field.name: None for field in fields(RunState)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sapiens2_0.1b")
    parser.add_argument("--stage", type=int, default=1, choices=(0, 1, 2, 3))
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    settings = [f"deepspeed=ds_configs/zero{args.stage}.json", "global_batch_size=1", "micro_batch_size=1"]
    config = load_config(Path("train/configs/demo.yaml"), settings)
    job = join_job()
    model = build_segmenter(args.arch, 19, (256, 192)).train()
    scales = lr_scales(model, config.optimizer)
    engine = build_engine(model, config, resolve(config, 1, job.on_gpu))
    masters = Masters(engine, scales)
    photo = torch.zeros(1, 3, 256, 192, dtype=torch.uint8, device=job.device)

    def step() -> float:
        started = time.monotonic()
        engine.backward(engine(photo, torch.arange(1)).float().square().mean())
        engine.step()
        return time.monotonic() - started

    step()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    saver = Saver(folder, masters, Ema(masters, 0.9), keep=1, job=job)
    state = RunState(**NOTHING | {"step": 0})
    saver.save(state)  # takes the memory that the later ones use again
    saver.finish()
    waited, stalled, lost, alone = [], [], [], []
    try:
        for i in range(ROUNDS):
            alone.append(step())
            started = time.monotonic()
            saver.save(replace(state, step=2 * i + 1))
            saver.finish()
            waited.append(time.monotonic() - started)
            started, steps = time.monotonic(), 0
            saver.save(replace(state, step=2 * i + 2))
            while saver.writing:
                step()
                steps += 1
            saver.finish()
            stalled.append(saver.stall)
            lost.append(time.monotonic() - started - steps * alone[-1])
        saver.remover.join()
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e9
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    both, usual = (statistics.median(waited), statistics.median(stalled)), statistics.median(alone)
    print(f"{args.arch}, ZeRO-{args.stage}, {size:.2f} GB a checkpoint, {usual:.2f} s a step; medians of {ROUNDS}")
    print(f"training stands still: waiting for the file {both[0]:.2f} s, written in the background {both[1]:.3f} s")
    print(f"ratio {both[1] / both[0]:.4f}")
    print(f"and, for the processor and the disk are shared, its steps take {statistics.median(lost):.2f} s longer in all")


if __name__ == "__main__":
    main()
