"""Frozen layers, Dice, label smoothing, class weights and averaged weights: real runs against one plain PyTorch loop."""

from collections.abc import Iterable

import pytest
import torch

from data.mixture import Mixture
from model.segmenter import layer_id
from model.weight_files import read_weights
from tests.conftest import ROOT, Run, experiment, recorded_runs, zero
from tests.plain import Plain, configuration, differences, fresh_model, plain_loop
from train import TrainError
from train.config import load_config
from train.optim import build_optimizer, freeze

STEPS = 8
SETTINGS = [
    f"schedule.steps={STEPS}", "schedule.warmup_steps=2", "optimizer.lr=1e-3", "checkpoint.every_steps=8",
    "model.recompute=blocks", "model.dropout=0.1", "augment.scale=[0.5,2]", "augment.rotate_probability=0.5",
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


@pytest.fixture(scope="module")
def plain(shards) -> dict[str, Plain]:
    return {name: plain_loop(shards, [*SETTINGS, *settings]) for name, settings in OPTIONS.items()}


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def runs(request, shards, tmp_path_factory) -> dict[str, Run]:
    """Each of OPTIONS trained at one ZeRO stage, in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [*SETTINGS, zero(request.param, folder)]
    jobs = {name: experiment(shards, folder / name, *settings, *options) for name, options in OPTIONS.items()}
    return recorded_runs(jobs, folder, processes=2)


@pytest.mark.parametrize("option", OPTIONS)
def test_trains_as_plain_pytorch(runs, plain, option):
    gradient, loss = differences(runs[option], plain[option])
    print(f"largest difference: gradients {gradient:.1e} of the largest, losses {loss:.1e}")
    assert gradient < 1e-5 and loss < 2e-5


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
    config = configuration(shards, SETTINGS)
    data = Mixture.open(config.data.train)

    def learning(what: str | int | None) -> set[int]:
        model = fresh_model(config, data)
        freeze(model, what)
        groups = build_optimizer(model, config.optimizer).param_groups
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert grouped == {id(parameter) for parameter in named.values()}
        return layers_of(name for name in named if name.startswith("backbone."))

    assert learning(None) == {0, 1, 2, 3, 4, 5} and learning("backbone") == set()
    assert learning(0) == {1, 2, 3, 4, 5} and learning(3) == {4, 5} and learning(4) == {5}
