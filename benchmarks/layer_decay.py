"""What DeepSpeed's optimizer step costs with a learning rate for each layer: by a group for each, as is usual, and by ours.

    .venv/bin/python -m benchmarks.layer_decay [--depth 40] [--width 32]

The parameters are few, so that what is left is the work that each group makes: it is the same for large ones.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import train.engine
from model.archs import Arch
from model.segmenter import Segmenter
from train.config import OptimizerConfig, load_config
from train.deepspeed_config import resolve
from train.engine import build_engine, join_job
from train.masters import Masters
from train.optim import build_optimizer, lr_scales

ROUNDS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=40)
    parser.add_argument("--width", type=int, default=32)
    args = parser.parse_args()
    job = join_job()
    arch = Arch("deep", "sapiens", args.width, args.depth, 4, 16, (8,), (8,))
    photo = torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=job.device)
    seeds = torch.arange(1)

    def groups(model: Segmenter, config: OptimizerConfig) -> torch.optim.Optimizer:
        scales, found = lr_scales(model, config), {}
        for name, p in model.named_parameters():
            group = found.setdefault((scales[name], p.ndim > 1), {"params": [], "lr": config.lr * scales[name]})
            group["params"].append(p)
        return torch.optim.AdamW(found.values(), fused=True)

    def engine(stage: int, decay: float, usual: bool = False):
        train.engine.build_optimizer = groups if usual else build_optimizer
        batch = ["global_batch_size=1", "micro_batch_size=1"]
        settings = [*batch, f"deepspeed=ds_configs/zero{stage}.json", f"optimizer.layer_decay={decay}"]
        config = load_config(Path("train/configs/demo.yaml"), settings)
        model = Segmenter(arch, 19, (32, 32)).train()
        scales = lr_scales(model, config.optimizer)
        found = build_engine(model, config, resolve(config, 1, job.on_gpu))
        if not usual:
            Masters(found, scales)
        return found

    for stage in (0, 1, 2, 3):
        engines = {"one rate": engine(stage, 1.0), "ours": engine(stage, 0.9), "groups": engine(stage, 0.9, usual=True)}
        times: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, found in engines.items():
                found.backward(found(photo, seeds).square().mean())
                started = time.perf_counter()
                found.step()
                times[name].append(1e3 * (time.perf_counter() - started))
        told = "   ".join(f"{name} {statistics.median(values):.1f} ms" for name, values in times.items())
        print(f"ZeRO-{stage}   {told}   ({len(engines['groups'].optimizer.param_groups)} of them)")


if __name__ == "__main__":
    main()
