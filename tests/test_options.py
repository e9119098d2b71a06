"""Frozen layers, Dice, label smoothing, class weights and averaged weights: real runs against one plain PyTorch loop."""

import json
import subprocess
from collections.abc import Iterable
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
from tests.conftest import ROOT, Run, experiment, launched, train_environment, zero
from train import TrainError
from train.config import Config, load_config
from train.loss import PixelLoss, class_weights
from train.optim import build_optimizer, freeze, lr_factor, parameter_groups, set_lr
from train.run import _build_model

STEPS = 8
SETTINGS = [
    f"schedule.steps={STEPS}", "schedule.warmup_steps=2", "optimizer.lr=1e-3", "checkpoint.every_steps=8",
    "model.recompute=true", "model.dropout=0.1", "augment.scale=[0.5,2]", "augment.rotate_probability=0.5",
    "loss.class_weights=none",
]  # fmt: skip
OPTIONS = {
    "frozen": ["model.freeze=backbone"],
    "averaged": ["ema.decay=0.3"],
    "dice": ["loss.dice=0.5"],
    "weighted": ["loss.class_weights=auto"],
    "all": [
        "model.freeze=1", "ema.decay=0.3", "loss.dice=0.5", "loss.class_weights=auto", "loss.label_smoothing=0.1",
        "model.drop_path=0.2",
    ],
}  # fmt: skip


@dataclass
class Plain:
    """What one plain PyTorch loop over whole global batches has computed."""

    initial: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    losses: list[float] = field(default_factory=list)
    final: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def configuration(shards: Path, settings: list[str]) -> Config:
    path, *overrides = experiment(shards, Path("nowhere"), *SETTINGS, *settings)
    return load_config(ROOT / path, overrides)


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


@pytest.fixture(scope="module")
def plain(shards) -> dict[str, Plain]:
    return {name: plain_loop(shards, settings) for name, settings in OPTIONS.items()}


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def runs(request, shards, tmp_path_factory) -> dict[str, Run]:
    """Each of OPTIONS trained at one ZeRO stage, in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [*SETTINGS, zero(request.param, folder)]
    jobs = {name: experiment(shards, folder / name, *settings, *options) for name, options in OPTIONS.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*launched("tests.recorded_run", processes=2), str(folder / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, env=train_environment(), timeout=270, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: Run(0, done.stdout, folder / name) for name in OPTIONS}


@pytest.mark.timeout(300)  # the first one waits for all of the stage's runs
@pytest.mark.parametrize("option", OPTIONS)
def test_trains_as_plain_pytorch(runs, plain, option):
    run, expected = runs[option], plain[option]
    gradients = torch.load(run.folder / "gradients.pt")
    assert gradients.keys() == expected.gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected.gradients.values())
    apart = max((gradients[name] - gradient).abs().max() for name, gradient in expected.gradients.items()) / largest
    difference = np.abs(np.array(list(run.losses.values())) - expected.losses).max()
    print(f"largest difference: gradients {apart:.1e} of the largest, losses {difference:.1e}")
    assert apart < 1e-5
    assert len(run.losses) == STEPS and difference < 2e-5


def test_what_is_frozen_keeps_its_weights(runs, plain):
    learning = {option: torch.load(runs[option].folder / "gradients.pt").keys() for option in ("frozen", "all")}
    assert all(name.startswith("decode_head.") for name in learning["frozen"])
    assert layers_of(learning["all"]) == {2, 3, 4, 5}
    for option, names in learning.items():
        before, after = plain[option].initial, read_weights(runs[option].folder / "model.safetensors")
        for name, weight in before.items():
            assert torch.equal(after[name], weight) == (name not in names), name


@pytest.mark.parametrize("option", ["averaged", "all"])
def test_the_average_is_exported(runs, plain, option):
    expected, exported = plain[option], read_weights(runs[option].folder / "model.safetensors")
    assert exported.keys() == expected.average.keys()
    for name, average in expected.average.items():
        if name == "decode_head.conv_layers.0.bias":
            continue  # an instance norm follows: its gradient is rounding noise, which AdamW makes steps of
        assert (exported[name] - average).abs().max() < 2e-6, name
        frozen = option == "all" and layer_id(name, 4) < 2
        assert frozen or (expected.final[name] - average).abs().max() > 2e-5, name


def layers_of(names: Iterable[str]) -> set[int]:
    return {layer_id(name, 4) for name in names}


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
        return layers_of(name for name in named if name.startswith("backbone."))

    assert learning(None) == {0, 1, 2, 3, 4, 5} and learning("backbone") == set()
    assert learning(0) == {1, 2, 3, 4, 5} and learning(3) == {4, 5} and learning(4) == {5}
