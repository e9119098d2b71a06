"""AdamW with layer-wise learning rates, and the learning rate of every step."""

from collections.abc import Iterable
from math import cos, pi

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

from model.segmenter import Segmenter, has_weight_decay, layer_id
from train.config import OptimizerConfig, ScheduleConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def lr_scales(model: Segmenter, config: OptimizerConfig) -> dict[str, float]:
    """The factor of the learning rate of each parameter: 1 for the head, and `layer_decay` times that of the layer above."""
    depth = model.arch.depth
    return {name: config.layer_decay ** (depth + 1 - layer_id(name, depth)) for name, _ in model.named_parameters()}


def build_optimizer(model: Segmenter, config: OptimizerConfig) -> "LayerwiseAdamW":
    """Of what learns in `model`: a group with weight decay, and one without.

    Must see the model before DeepSpeed partitions it: ZeRO-3 leaves every parameter with one dimension.
    """
    groups: list[dict] = [{"params": [], "weight_decay": decay} for decay in (config.weight_decay, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[not has_weight_decay(name, parameter.ndim)]["params"].append(parameter)
    return LayerwiseAdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas, fused=True)


class LayerwiseAdamW(torch.optim.AdamW):
    """AdamW with a learning rate for each layer, whose tensors may hold many of them.

    DeepSpeed makes one flat tensor of each group. With a group for each layer, as is usual, its step takes three times as
    long (benchmarks/layer_decay.py); here two groups are enough, and only the update itself goes layer by layer.

    With `clip_norm` it clips the gradients itself, or passes over the step if they are not finite: at ZeRO stage 0 DeepSpeed
    would take it, and tells no norm. Its engine looks for the two attributes below.
    """

    clip_norm: float | None = None  # the largest norm; 0: no clipping
    _global_grad_norm: torch.Tensor | None = None  # before clipping
    overflow = False  # whether the step was passed over
    pieces: dict[torch.Tensor, list[tuple[float, int, int]]]  # (factor of the lr, first element, the one after the last)

    def assign(self, pieces: Iterable[tuple[torch.Tensor, int, int, float]]) -> None:
        """Tell the layers' places: (tensor that is stepped, first element, elements, factor of the lr)."""
        self.pieces = {}
        for tensor, start, numel, scale in pieces:
            found = self.pieces.setdefault(tensor, [])
            if found and found[-1][0] == scale and found[-1][2] == start:
                found[-1] = (scale, found[-1][1], start + numel)
            else:
                found.append((scale, start, start + numel))

    @torch.no_grad()
    def step(self) -> None:
        if self.clip_norm is not None:
            self._clip(self.clip_norm)
        if self.overflow:
            return
        for group in self.param_groups:
            layers: dict[float, list[tuple[torch.Tensor, ...]]] = {}
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._collect(tensor, layers)
            for scale, views in layers.items():
                parameters, gradients, averages, squares, steps = map(list, zip(*views, strict=True))
                adamw(
                    parameters, gradients, averages, squares, [], steps, fused=True, lr=group["lr"] * scale,
                    beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                    amsgrad=False, maximize=False,
                )  # fmt: skip

    def _clip(self, largest: float) -> None:
        learning = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in learning])
        self._global_grad_norm, self.overflow = norm, not norm.isfinite()
        if largest and not self.overflow:
            clip_grads_with_norm_(learning, largest, norm)

    def _collect(self, tensor: torch.Tensor, layers: dict[float, list[tuple[torch.Tensor, ...]]]) -> None:
        state = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), device=tensor.device)
            state |= {moment: torch.zeros_like(tensor) for moment in MOMENTS}
        whole = [tensor.view(-1), tensor.grad.reshape(-1), *(state[moment].view(-1) for moment in MOMENTS)]
        for scale, start, end in self.pieces.get(tensor, ()):  # none: of more processes than it has elements
            # A counter of its own for each: the update counts it up.
            layers.setdefault(scale, []).append((*(flat[start:end] for flat in whole), state["step"].clone()))
        state["step"] += 1


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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """A pure function of the step: nothing of the schedule has to be saved, and accumulation cannot disturb it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
