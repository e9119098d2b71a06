"""The deconvolution head: features to class logits, with a dropout that depends on the sample alone."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.archs import Arch
from model.recompute import keep_inputs


class SampleDropout2d(nn.Module):
    """Channel dropout whose mask for sample i comes from seeds[i] and nothing else.

    A mask drawn from the device's running state changes with the rank, the micro batch and a restart; this one does
    not, so a run is the same on any number of GPUs.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        assert 0 <= p < 1, f"dropout of {p}"
        self.p = p

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); seeds int64 (B,) on the CPU, needed in training only. In eval mode returns x."""
        if not self.training or self.p == 0:
            return x
        assert seeds is not None, "training with dropout needs dropout_seeds, one for each sample"
        assert seeds.shape == x.shape[:1] and seeds.device.type == "cpu", f"seeds {seeds.shape} on {seeds.device}"
        generator = torch.Generator()
        draws = [torch.rand(x.shape[1], generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
        keep = (torch.stack(draws) >= self.p) / (1 - self.p)
        return x * keep[:, :, None, None].to(x, non_blocking=True)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class NormKeptByOutput(torch.autograd.Function):
    """An instance norm without parameters, which keeps its output for the backward pass instead of its input: an activation
    behind it keeps that as well, so that of both only one tensor is kept. The kernels are PyTorch's."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        """x (B, C, H, W)."""
        flat = x.reshape(1, -1, *x.shape[2:]).contiguous()  # a batch norm of one image with B * C channels
        normed, _, scales = torch.native_batch_norm(flat, None, None, None, None, True, 0.0, eps)  # one over the deviations
        ctx.save_for_backward(normed, scales)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        normed, scales = ctx.saved_tensors
        flat = gradient.reshape(normed.shape).contiguous()  # in another order of memory than `normed` the kernel reads it wrongly
        # scales * (g - mean(g) - normed * mean(g * normed)): the gradient of a norm with the weights `scales`, whose input
        # had the mean 0 and the deviation 1 already.
        zeros, ones = torch.zeros_like(scales), torch.ones_like(scales)
        inputs, *_ = torch.ops.aten.native_batch_norm_backward(
            flat, normed, scales, None, None, zeros, ones, True, 0.0, [True, False, False]
        )
        return inputs.view(gradient.shape), None


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch's, but that it keeps its output for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return NormKeptByOutput.apply(x, self.eps) if self.training else super().forward(x)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, computed as the matrix product that it is: kernels for convolutions bring its input and output into
    another order and back, which is more work than a pass over them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1).expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


class DeconvHead(nn.Module):
    """Features (B, embed_dim, h, w) -> logits (B, num_classes, s * h, s * w), s = 2 to the number of transposed convolutions:
    8 for Sapiens v1, 16 for Sapiens2.

    Every convolution but the last is followed by InstanceNorm2d and SiLU. The sub-modules' names are the original's,
    so the `decode_head.*` weights of both families load as they are.
    """

    def __init__(self, arch: Arch, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.recomputes = False  # keeps one tensor a stage for the backward pass instead of two: model.recompute
        channels = arch.embed_dim
        deconv: list[nn.Module] = []
        for width in arch.head_deconv:
            upsample = nn.ConvTranspose2d(channels, width, kernel_size=4, stride=2, padding=1, bias=False)
            deconv += [upsample, InstanceNorm2d(width), nn.SiLU()]
            channels = width
        conv: list[nn.Module] = []
        for width in arch.head_conv:
            conv += [PointwiseConv2d(channels, width), InstanceNorm2d(width), nn.SiLU()]
            channels = width
        self.deconv_layers = nn.Sequential(*deconv)
        self.conv_layers = nn.Sequential(*conv)
        self.dropout = SampleDropout2d(dropout)
        self.conv_seg = PointwiseConv2d(channels, num_classes)
        self.reset_classifier()

    def reset_classifier(self) -> None:
        """Draw conv_seg anew: small, so that every class starts out about equally likely."""
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def reset_parameters(self) -> None:
        """Draw the whole head anew."""
        for layer in (*self.deconv_layers, *self.conv_layers):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.reset_parameters()
        self.reset_classifier()

    def forward(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:
        """seeds: see SampleDropout2d."""
        layers = [*self.deconv_layers, *self.conv_layers]
        convs = [*layers[0::3], self.conv_seg]
        x = convs[0](features)
        for stage in zip(layers[1::3], layers[2::3], convs[1:], strict=True):
            x = keep_inputs(self._stage, x, *stage, seeds) if self.recomputes else self._stage(x, *stage, seeds)
        return x

    def _stage(self, x: Tensor, norm: nn.Module, act: nn.Module, next_conv: nn.Module, seeds: Tensor | None) -> Tensor:
        # Recomputed as one: were the next convolution outside, its input, the activation, would be kept for it.
        x = act(norm(x))
        return next_conv(self.dropout(x, seeds) if next_conv is self.conv_seg else x)
