from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.segmenter import build_segmenter
from train.config import OptimizerConfig, ScheduleConfig
from train.optim import LayerwiseAdamW, build_optimizer, lr_factor, lr_scales, set_lr


def test_every_parameter_has_its_rate_and_decay():
    model = build_segmenter("tiny", 5, (32, 32))
    config = OptimizerConfig(lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    groups, scales = build_optimizer(model, config).param_groups, lr_scales(model, config)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(groups) == 2 and len(decays) == len(scales) == len(list(model.parameters()))
    expected = {
        "backbone.pos_embed": (0.5**5, 0.0),
        "backbone.patch_embed.proj.weight": (0.5**5, 0.1),
        "backbone.blocks.0.attn.qkv.weight": (0.5**4, 0.1),
        "backbone.blocks.3.norm1.weight": (0.5, 0.0),
        "backbone.norm.weight": (1.0, 0.0),
        "decode_head.conv_seg.weight": (1.0, 0.1),
        "decode_head.conv_seg.bias": (1.0, 0.0),
    }
    for name, (scale, decay) in expected.items():
        assert scales[name] == scale and decays[id(model.get_parameter(name))] == decay, name


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.25, 0.5, 1.0])), min_size=1, max_size=6))
def test_layers_in_one_tensor_are_updated_as_tensors_of_their_own(layers):
    generator = torch.Generator().manual_seed(0)
    flat = torch.nn.Parameter(torch.randn(sum(numel for numel, _ in layers) + 2, generator=generator))  # two that fill it up
    starts = [sum(numel for numel, _ in layers[:i]) for i in range(len(layers))]
    own = [torch.nn.Parameter(flat[s : s + n].detach().clone()) for s, (n, _) in zip(starts, layers, strict=True)]
    ours = LayerwiseAdamW([{"params": [flat]}], lr=0.1, weight_decay=0.05, fused=True)
    ours.assign((flat, start, numel, scale) for start, (numel, scale) in zip(starts, layers, strict=True))
    theirs = torch.optim.AdamW(
        [{"params": [p], "scale": scale} for p, (_, scale) in zip(own, layers, strict=True)], lr=0.1, weight_decay=0.05
    )
    filled = flat[-2:].detach().clone()
    for step in range(4):
        flat.grad = torch.randn(flat.shape, generator=generator)
        for parameter, start in zip(own, starts, strict=True):
            parameter.grad = flat.grad[start : start + len(parameter)].clone()
        set_lr(ours, 0.1 / (step + 1))
        for group in theirs.param_groups:
            group["lr"] = 0.1 / (step + 1) * group["scale"]
        ours.step()
        theirs.step()
    torch.testing.assert_close(flat.detach()[:-2], torch.cat([p.detach() for p in own]), rtol=1e-6, atol=1e-7)
    assert torch.equal(flat[-2:].detach(), filled) and int(ours.state[flat]["step"]) == 4


def factors(total: int, **keys) -> np.ndarray:
    config = ScheduleConfig(steps=total, **keys)
    return np.array([lr_factor(step, total, config) for step in range(total)])


def golden(name: str) -> np.ndarray:
    """The original's learning rate in each step, over its base rate."""
    with np.load(Path(__file__).parent / "fixtures" / "golden_schedules.npz") as file:
        return file[name] / 5e-4


def test_warm_up_is_the_originals():
    for decay in ("linear", "cosine"):
        config = ScheduleConfig(steps=10**9, warmup_steps=400, decay=decay)
        ours = [lr_factor(step, 10**9, config) for step in range(600)]
        assert np.allclose(ours, 1e-3 + (1 - 1e-3) * np.minimum(np.arange(600), 399) / 399, rtol=1e-5)


@pytest.mark.parametrize(("steps", "epochs"), [(50, 200), (50, 20), (3, 200)])
def test_linear_decay_is_within_an_epoch_of_sapiens(steps, epochs):
    """The original lowers the rate after each epoch, and spends the whole last one at zero; ours falls in each step and
    is never zero. They are never farther apart than one of the original's falls."""
    theirs = golden(f"v1_{steps}_steps_{epochs}_epochs")
    ours = factors(steps * epochs, warmup_steps=400)[: len(theirs)]
    assert np.abs(ours - theirs).max() < 1 / (epochs - 1)
    assert ours[0] == theirs[0] and (ours > 0).all()
    if len(theirs) == steps * epochs:
        assert (theirs[-steps:] == 0).all()


@pytest.mark.parametrize(("total", "warmup"), [(400, 50), (20000, 500)])
def test_linear_after_warmup_is_sapiens2s(total, warmup):
    theirs = golden(f"v2_{total}_steps")
    ours = factors(total, warmup_steps=warmup, decay="linear_after_warmup")
    assert np.allclose(ours[: len(theirs)], theirs, rtol=0, atol=1e-12)
    assert ours[warmup] == 1 and ours.argmax() == warmup


def test_cosine_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=300)
    theirs = []
    for _ in range(300):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert np.allclose(factors(300, warmup_steps=0, decay="cosine"), theirs, rtol=0, atol=1e-12)


@given(st.integers(1, 5000), st.integers(0, 500), st.floats(0, 1), st.sampled_from(["linear", "linear_after_warmup", "cosine"]))
def test_no_step_but_the_first_is_spent_at_zero(total, warmup, factor, decay):
    ours = factors(total, warmup_steps=warmup, warmup_factor=factor, decay=decay)
    assert (ours[1:] > 0).all() and (ours <= 1).all() and (factor == 0 or ours[0] > 0)
    after = ours[warmup:]
    assert (np.diff(after) < 0).all()
    if len(after) > 2 and decay != "cosine":
        assert np.allclose(np.diff(after), -1 / (total if decay == "linear" else total - warmup))
