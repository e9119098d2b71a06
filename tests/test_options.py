"""Frozen layers, Dice, label smoothing, class weights and averaged weights: real runs against one plain PyTorch loop."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loader import TrainExamples, train_batches
from data.mixture import Mixture
from data.order import BatchPlan
from model.segmenter import Segmenter, layer_id
from model.weight_files import read_weights
from tests.conftest import ROOT, Run, train_command, train_environment, zero
from train import TrainError
from train.config import Config, load_config
from train.loss import PixelLoss, class_weights
from train.optim import build_optimizer, freeze, lr_factor, parameter_groups, set_lr
from train.run import _build_model

STEPS = 8
SETTINGS = [
    f"schedule.steps={STEPS}", "schedule.warmup_steps=2", "optimizer.lr=1e-3", "checkpoint.every_steps=8",
    "model.recompute=true", "model.dropout=0.1", "augment.scale=[0.5,2]", "augment.rotate_probability=0.5",
]  # fmt: skip
FROZEN = ["model.freeze=backbone", "loss.class_weights=none"]
FULL = [
    "model.freeze=1", "loss.class_weights=auto", "loss.dice=0.5", "loss.label_smoothing=0.1", "ema.decay=0.3",
    "model.drop_path=0.2",
]  # fmt: skip


@dataclass
class Plain:
    """What one plain PyTorch loop over whole global batches has computed."""

    initial: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    losses: list[float] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def configuration(shards: Path, settings: list[str]) -> Config:
    command = train_command(shards, Path("nowhere"), *SETTINGS, *settings)
    return load_config(ROOT / "train/configs/demo.yaml", [part for part in command if "=" in part])


def fresh_model(config: Config, data: Mixture) -> Segmenter:
    torch.manual_seed(config.seed)
    return _build_model(config, data)


def plain_loop(shards: Path, settings: list[str]) -> Plain:
    config = configuration(shards, settings)
    data = Mixture.open(config.data.train)
    model = fresh_model(config, data)
    freeze(model, config.model.freeze)
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer, on_gpu=False)
    weights = class_weights(config.loss.class_weights, data.pixel_counts, data.label_set)
    loss = PixelLoss(weights, data.label_set, config.loss.label_smoothing, config.loss.dice)
    examples = TrainExamples(data, data.order(config.seed), config.model.image_size, config.augment)
    plain = Plain({name: tensor.clone() for name, tensor in model.state_dict().items()})
    plain.average = {name: tensor.clone() for name, tensor in plain.initial.items()}
    for step, (batch,) in enumerate(train_batches(examples, BatchPlan(8, 8, 0, 1), 0, STEPS, 0)):
        set_lr(optimizer, config.optimizer.lr, lr_factor(step, STEPS, config.schedule))
        value = loss.share(model(batch.images, batch.seeds), batch.labels, loss.totals(batch.pixel_counts))
        optimizer.zero_grad()
        value.backward()
        if step == 0:
            plain.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        plain.losses.append(value.item())
        keep = min(config.ema.decay or 0, (1 + step) / (10 + step))
        for name, weight in model.state_dict().items():
            plain.average[name] = keep * plain.average[name] + (1 - keep) * weight
    plain.final = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return plain


def recorded_run(shards: Path, folder: Path, settings: list[str]) -> tuple[Run, dict[str, Tensor]]:
    """A run of two processes, and the gradients of its first step."""
    command = train_command(shards, folder, *SETTINGS, *settings, processes=2)
    command[command.index("--module") + 1] = "tests.recorded_run"
    environment = {**train_environment(), "GRADIENTS": str(folder.with_suffix(".gradients.pt"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=150, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(0, done.stdout, folder), torch.load(environment["GRADIENTS"])


def check_equal(run: Run, gradients: dict[str, Tensor], plain: Plain) -> None:
    assert gradients.keys() == plain.gradients.keys()
    largest = max(gradient.abs().max() for gradient in plain.gradients.values())
    apart = max((gradients[name] - gradient).abs().max() for name, gradient in plain.gradients.items()) / largest
    difference = np.abs(np.array(list(run.losses.values())) - plain.losses).max()
    print(f"largest difference: gradients {apart:.1e} of the largest, losses {difference:.1e}")
    assert apart < 1e-5
    assert len(run.losses) == STEPS and difference < 2e-5


@pytest.fixture(scope="module")
def plain_frozen(shards) -> Plain:
    return plain_loop(shards, FROZEN)


@pytest.fixture(scope="module")
def plain_full(shards) -> Plain:
    return plain_loop(shards, FULL)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_frozen_backbone_trains_as_plain_pytorch(shards, tmp_path, plain_frozen, stage):
    run, gradients = recorded_run(shards, tmp_path / "run", [*FROZEN, zero(stage, tmp_path)])
    assert gradients and all(name.startswith("decode_head.") for name in gradients)
    check_equal(run, gradients, plain_frozen)
    exported = read_weights(tmp_path / "run" / "model.safetensors")
    for name, before in plain_frozen.initial.items():
        if name.startswith("backbone."):
            assert torch.equal(exported[name], before), name
    assert not torch.equal(exported["decode_head.conv_seg.weight"], plain_frozen.initial["decode_head.conv_seg.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_options_train_as_plain_pytorch(shards, tmp_path, plain_full, stage):
    run, gradients = recorded_run(shards, tmp_path / "run", [*FULL, zero(stage, tmp_path)])
    assert {layer_id(name, 4) for name in gradients} == {2, 3, 4, 5}
    check_equal(run, gradients, plain_full)
    exported = read_weights(tmp_path / "run" / "model.safetensors")
    assert exported.keys() == plain_full.average.keys()
    for name, average in plain_full.average.items():
        if name == "decode_head.conv_layers.0.bias":
            continue  # an instance norm follows: its gradient is rounding noise, which AdamW makes steps of
        assert (exported[name] - average).abs().max() < 2e-6, name
        frozen = "embed" in name or "blocks.0." in name
        assert frozen or (plain_full.final[name] - average).abs().max() > 2e-5, name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.freeze=5", r"model.freeze: tiny has 4 blocks; give 0..4, or backbone"),
        ("model.freeze=-1", "model.freeze: .*model.freeze: .*greater than or equal to 0"),
        ("model.freeze=head", "model.freeze: .*'backbone'.*not 'head'"),
        ("model.freeze=true", "model.freeze: .*not True"),
        ("loss.dice=-1", "loss.dice: .*greater than or equal to 0"),
        ("loss.label_smoothing=1", "loss.label_smoothing: .*less than 1"),
        ("ema.decay=1", "ema.decay: .*less than 1"),
        ("ema.dekay=0.9", "ema.dekay: unknown key; known here: decay"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(TrainError, match=message) as caught:
        load_config(ROOT / "train/configs/demo.yaml", [override])
    assert "\n" not in str(caught.value)


def test_what_freezes(shards):
    config = configuration(shards, [])
    data = Mixture.open(config.data.train)

    def learning(what: str | int | None) -> set[int]:
        model = fresh_model(config, data)
        freeze(model, what)
        groups = parameter_groups(model, config.optimizer)
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert grouped == {id(parameter) for parameter in named.values()}
        return {layer_id(name, 4) for name in named if name.startswith("backbone.")}

    assert learning(None) == {0, 1, 2, 3, 4, 5} and learning("backbone") == set()
    assert learning(0) == {1, 2, 3, 4, 5} and learning(3) == {4, 5} and learning(4) == {5}
