import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.segmenter import build_segmenter
from train.config import OptimizerConfig, ScheduleConfig
from train.optim import build_optimizer, lr_factor, parameter_groups, set_lr


def test_every_parameter_in_one_group_with_its_rates():
    model = build_segmenter("tiny", 5, (32, 32))
    config = OptimizerConfig(lr=1e-3, layer_decay=0.5, weight_decay=0.1)
    groups = parameter_groups(model, config)
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_id) == len(list(model.parameters()))
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
        group = by_id[id(model.get_parameter(name))]
        assert group["lr_scale"] == scale and group["weight_decay"] == decay, name
    optimizer = build_optimizer(groups, config, on_gpu=False)
    set_lr(optimizer, config.lr, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3 * g["lr_scale"] * 0.25 for g in groups]


def test_warm_up_is_the_originals():
    config = ScheduleConfig(steps=10**9, warmup_steps=400, warmup_factor=1e-3)
    for step in (0, 1, 200, 399, 400, 500):
        expected = 1e-3 + (1 - 1e-3) * min(step, 399) / 399
        assert lr_factor(step, 10**9, config) == pytest.approx(expected, rel=1e-5)


@given(st.integers(1, 5000), st.integers(0, 500), st.floats(0, 1))
def test_no_step_is_spent_at_zero_and_the_decay_is_linear(total, warmup, factor):
    config = ScheduleConfig(steps=total, warmup_steps=warmup, warmup_factor=factor)
    factors = np.array([lr_factor(step, total, config) for step in range(total)])
    assert (factors[1:] > 0).all() and (factors <= 1).all()
    after = factors[warmup:]
    if len(after) > 2:
        assert np.allclose(np.diff(after), -1 / total)
