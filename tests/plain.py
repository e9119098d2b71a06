"""The same experiment as one plain PyTorch loop over whole global batches, to compare real runs with."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.device_render import images_on, with_labels
from data.loader import TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan
from model.segmenter import Segmenter, has_weight_decay
from tests.conftest import ROOT, Run, experiment
from train.config import Config, load_config
from train.loss import PixelLoss, class_weights
from train.optim import freeze, lr_factor, lr_scales
from train.run import build_model


@dataclass
class Plain:
    """What one plain PyTorch loop over whole global batches has computed."""

    initial: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    losses: list[float] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def configuration(shards: Path, settings: list[str]) -> Config:
    path, *overrides = experiment(shards, Path("nowhere"), *settings)
    return load_config(ROOT / path, overrides)


def fresh_model(config: Config, data: Mixture) -> Segmenter:
    torch.manual_seed(config.seed)
    return build_model(config, data.label_set.num_classes)


def plain_loop(shards: Path, settings: list[str], passed_over: int | None = None) -> Plain:
    config = configuration(shards, settings)
    steps, data = config.schedule.steps, Mixture.open(config.data.train)
    model = fresh_model(config, data)
    freeze(model, config.model.freeze)
    scales, wanted = lr_scales(model, config.optimizer), config.optimizer
    groups = [  # one for each parameter, and torch's own update
        {"params": [p], "name": name, "weight_decay": wanted.weight_decay if has_weight_decay(name, p.ndim) else 0.0}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, lr=wanted.lr, betas=wanted.betas)
    weights = class_weights(config.loss.class_weights, data.pixel_counts, data.label_set)
    loss = PixelLoss(weights, data.label_set, config.loss.label_smoothing, config.loss.dice)
    examples = TrainExamples(data, data.order(config.seed), config.model.image_size, config.augment)
    plain = Plain({name: tensor.clone() for name, tensor in model.state_dict().items()})
    plain.average = {name: tensor.clone() for name, tensor in plain.initial.items()}
    for step, (batch,) in enumerate(train_batches(examples, BatchPlan(8, 8, 0, 1), 0, steps, 0)):
        for group in optimizer.param_groups:
            group["lr"] = wanted.lr * scales[group["name"]] * lr_factor(step, steps, config.schedule)
        batch = with_labels(batch, data.label_set, torch.device("cpu"))
        images = images_on(batch, torch.device("cpu"))
        value = loss.share(model(images, batch.seeds), batch.labels, loss.totals(batch.pixel_counts))
        optimizer.zero_grad()
        value.backward()
        if step == 0:
            plain.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        if step != passed_over:
            optimizer.step()
        plain.losses.append(value.item())
        keep = min(config.ema.decay or 0, (1 + step) / (10 + step))
        for name, weight in model.state_dict().items():
            plain.average[name] = keep * plain.average[name] + (1 - keep) * weight
    plain.final = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return plain


def differences(run: Run, plain: Plain) -> tuple[float, float]:
    """Between a recorded run and the loop: the largest of a gradient, over the largest one, and of a loss."""
    gradients = torch.load(run.folder / "gradients.pt")
    assert gradients.keys() == plain.gradients.keys()
    largest = max(gradient.abs().max() for gradient in plain.gradients.values())
    apart = max((gradients[name] - gradient).abs().max() for name, gradient in plain.gradients.items()) / largest
    assert len(run.losses) == len(plain.losses)
    return apart.item(), np.abs(np.array(list(run.losses.values())) - plain.losses).max()
