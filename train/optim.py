"""AdamW with layer-wise learning rates, and the learning rate of every step."""

import torch

from model.segmenter import Segmenter, has_weight_decay, layer_id
from train.config import OptimizerConfig, ScheduleConfig


def parameter_groups(model: Segmenter, config: OptimizerConfig) -> list[dict]:
    """One group for each (layer, decayed or not), from the patch embedding up; `lr_scale` is its factor of the lr.

    Must see the model before DeepSpeed partitions it: ZeRO-3 leaves every parameter with one dimension.
    """
    depth = model.arch.depth
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        layer, decayed = layer_id(name, depth), has_weight_decay(name, parameter.ndim)
        scale = config.layer_decay ** (depth + 1 - layer)
        group = groups.setdefault(
            (layer, decayed),
            {
                "params": [],
                "lr": config.lr * scale,
                "lr_scale": scale,
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(groups: list[dict], config: OptimizerConfig, on_gpu: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=on_gpu)


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The factor of every learning rate in optimizer step `step` (0..total_steps-1).

    Linear warm-up from `warmup_factor` to 1 over the first `warmup_steps`, times a linear decay that reaches zero only
    after the last step, so that none is spent at a learning rate of zero.
    """
    warm = 1.0
    if step < config.warmup_steps:
        warm = config.warmup_factor + (1 - config.warmup_factor) * step / max(1, config.warmup_steps - 1)
    return warm * (1 - step / total_steps)


def set_lr(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """A pure function of the step: nothing of the schedule has to be saved, and accumulation cannot disturb it."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_scale"] * factor
