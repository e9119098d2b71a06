"""The parts of the head that are PyTorch's, computed otherwise."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.archs import get_arch
from model.head import DeconvHead, InstanceNorm2d, PointwiseConv2d

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest value
DTYPES = st.sampled_from(list(TOLERANCE))
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 9), st.integers(1, 9))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value, or over 1, of which what is added up is; another shape or dtype fails."""
    assert a.dtype == b.dtype and a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)).item()


def gradients(y: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return torch.autograd.grad(y, inputs, weights)


@given(SHAPES, DTYPES, st.floats(0.1, 10), st.floats(-5, 5), st.booleans(), st.integers(0, 2**31))
def test_the_norm_is_pytorchs(shape, dtype, scale, shift, channels_last, seed):
    """The output to the bit where the kernel is theirs; the gradient to rounding, of what cancels in it."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift).to(dtype)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    theirs, ours = (F.silu(norm(shape[1])(x)) for norm in (nn.InstanceNorm2d, InstanceNorm2d))
    largest = (x.double().var((2, 3), correction=0) + 1e-5).rsqrt().max()  # that a gradient of 1 can be behind the norm
    assert apart(ours, theirs) <= (TOLERANCE[dtype] * max(1, largest * (1 + abs(shift))) if channels_last else 0.0)
    (theirs,), (ours,) = gradients(theirs, x), gradients(ours, x)
    assert ours.dtype == dtype and (ours.double() - theirs.double()).abs().max() <= 4 * TOLERANCE[dtype] * largest


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradients_order", [torch.contiguous_format, torch.channels_last])
def test_the_norm_takes_any_order_of_memory(batch, order, gradients_order):
    x = torch.randn(batch, 16, 12, 10, dtype=torch.float64).to(memory_format=order).requires_grad_()
    weights = torch.randn(x.shape, dtype=torch.float64).to(memory_format=gradients_order)
    deviations, means = torch.var_mean(x, (2, 3), correction=0, keepdim=True)  # PyTorch's own norm is wrong in one of the cases
    (expected,) = torch.autograd.grad((x - means) / (deviations + 1e-5).sqrt(), x, weights)
    (ours,) = torch.autograd.grad(InstanceNorm2d(16)(x), x, weights)
    assert apart(ours, expected) < 1e-12


def test_norm_and_activation_keep_one_tensor():
    """And the norm's scales."""
    x, kept = torch.randn(2, 3, 8, 8, requires_grad=True), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for norm, expected in ((InstanceNorm2d(3), 4 * x.numel()), (nn.InstanceNorm2d(3), 2 * 4 * x.numel())):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = F.silu(norm(x * 1))
        assert expected < sum(kept.values()) <= expected + 2 * 6 * 4
        del y


@given(SHAPES, st.integers(1, 7), DTYPES, st.integers(0, 2**31))
def test_a_pointwise_convolution_is_a_convolution(shape, out, dtype, seed):
    torch.manual_seed(seed)
    module, x = PointwiseConv2d(shape[1], out).to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    expected = F.conv2d(x, module.weight, module.bias)
    ours = module(x)
    assert apart(ours, expected) <= TOLERANCE[dtype]
    inputs = (x, module.weight, module.bias)
    for one, other in zip(gradients(ours, *inputs), gradients(expected, *inputs), strict=True):
        assert apart(one, other) <= 4 * TOLERANCE[dtype]


def plain(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same computed by PyTorch's own module."""
    if isinstance(layer, PointwiseConv2d):
        return partial(F.conv2d, weight=layer.weight, bias=layer.bias)
    return nn.InstanceNorm2d(layer.num_features) if isinstance(layer, InstanceNorm2d) else layer


@pytest.mark.parametrize("name", ["tiny", "tiny2"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_head_is_that_of_pytorchs_modules(name, recomputes):
    torch.manual_seed(0)
    head = DeconvHead(get_arch(name), 5, dropout=0.3).train()
    head.recomputes = recomputes
    features, seeds = torch.randn(3, 96, 4, 3, requires_grad=True), torch.arange(3)
    ours = head(features, seeds)
    x = features
    for layer in (*head.deconv_layers, *head.conv_layers):
        x = plain(layer)(x)
    expected = plain(head.conv_seg)(head.dropout(x, seeds))
    assert apart(ours, expected) < 1e-5
    learning = [p for name, p in head.named_parameters() if name != "conv_layers.0.bias" and not name.endswith("3.bias")]
    inputs = (features, *learning)  # without the biases before a norm, whose gradients are rounding noise
    for one, other in zip(gradients(ours, *inputs), gradients(expected, *inputs), strict=True):
        assert apart(one, other) < 1e-4
