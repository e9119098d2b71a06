"""AdamW with layer-wise learning rates, and the learning rate of every step."""

from math import cos, pi

import torch

from model.segmenter import Segmenter, has_weight_decay, layer_id
from train.config import OptimizerConfig, ScheduleConfig


def freeze(model: Segmenter, what: str | int | None) -> None:
    """Take "backbone", or the embeddings and the first `what` blocks, from what learns; None takes nothing.

    A frozen parameter has no master: under bf16 at ZeRO stages 1-3 it is used, and exported, rounded to bf16.
    """
    for name, parameter in model.named_parameters():
        if what == "backbone":
            frozen = name.startswith("backbone.")
        else:
            frozen = what is not None and layer_id(name, model.arch.depth) <= what
        parameter.requires_grad_(not frozen)


def parameter_groups(model: Segmenter, config: OptimizerConfig) -> list[dict]:
    """One group for each (layer, decayed or not) that learns, from the patch embedding up; `lr_scale` is its factor of
    the lr.

    Must see the model before DeepSpeed partitions it: ZeRO-3 leaves every parameter with one dimension.
    """
    depth = model.arch.depth
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
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

    Linear warm-up from `warmup_factor` to 1, which a decay follows (linear_after_warmup) or is multiplied with from the
    first step on. Zero would come only after the last step, so that none is wasted.
    """
    warmup, done = config.warmup_steps, step / total_steps
    # Sapiens v1's last step of the warm-up has the factor 1; in Sapiens2 it is the first one after it.
    full = warmup if config.decay == "linear_after_warmup" else max(1, warmup - 1)
    warm = config.warmup_factor + (1 - config.warmup_factor) * step / full if step < warmup else 1.0
    if config.decay == "linear":
        return warm * (1 - done)
    if config.decay == "cosine":
        return warm * (1 + cos(pi * done)) / 2
    return warm if step < warmup else 1 - (step - warmup) / (total_steps - warmup)


def set_lr(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """A pure function of the step: nothing of the schedule has to be saved, and accumulation cannot disturb it."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_scale"] * factor
