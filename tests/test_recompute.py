"""Recomputation keeps less, and changes nothing."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from model.recompute import kept_bytes, recompute
from model.segmenter import Segmenter, build_segmenter
from tests.model_cases import images, refused

MODES = ("none", "head", "attention", "mlp", 2, "blocks")
ARCHS = ("tiny", "tiny2", "timm:vit_tiny_patch16_224")


def build(arch: str, mode: str | int, drop_path: float = 0.5) -> Segmenter:
    torch.manual_seed(0)
    model = build_segmenter(arch, 5, (32, 48), drop_path=drop_path).train()
    recompute(model, mode)
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_are_the_same(arch):
    """Also the branches that stochastic depth drops, and the channels of the dropout."""
    gradients = []
    for mode in MODES:
        model = build(arch, mode)
        model(images(4, (32, 48)), torch.arange(4)).square().mean().backward()
        gradients.append(dict(model.named_parameters()))
    for name, kept in gradients[0].items():
        for mode, recomputed in zip(MODES[1:], gradients[1:], strict=True):
            assert torch.allclose(recomputed[name].grad, kept.grad, rtol=1e-4, atol=1e-7), (mode, name)


@pytest.mark.parametrize("arch", ARCHS)
def test_less_is_kept(arch):
    """And of two images twice as much as of one."""
    kept = {}
    for mode in MODES:
        model = build(arch, mode, drop_path=0)
        kept[mode], two = (kept_bytes(model, images(n, (32, 48)), torch.arange(n)) for n in (1, 2))
        assert two == pytest.approx(2 * kept[mode], rel=0.01)
    assert kept["none"] > kept["head"] > max(kept["attention"], kept["mlp"]) > kept[2] > kept["blocks"]


@pytest.mark.parametrize("mode", ["blocks", "mlp"])
def test_blocks_are_compiled_however_many_there_are(mode):
    model = build("tiny", "none", drop_path=0)
    model.backbone.blocks = nn.Sequential(*(deepcopy(model.backbone.blocks[0]) for _ in range(10)))
    recompute(model, mode)
    for block in model.backbone.blocks:
        block.compile(backend="eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        model(images(1, (32, 48)), torch.arange(1)).square().mean().backward()


def test_prediction_keeps_nothing():
    model = build("tiny", "blocks").eval()
    with torch.no_grad():
        assert not model(images(1, (32, 48))).requires_grad


def test_what_cannot_be_is_refused():
    model = build("tiny", "none")
    for what in ("some", 1, 0, -2):
        refused(recompute, model, what, match=f"recompute: {what!r} is none of none, head, attention, mlp, blocks, or")
    del model.backbone.blocks[1].attn
    refused(recompute, model, "attention", match="the blocks of tiny have no attention of their own; choose blocks")
