"""Each part of a step that is computed otherwise than one would write it, beside how one would, on tensors of a real size.

    .venv/bin/python -m benchmarks.optimisations [--size 256 192] [--rounds 5] [--dtype bfloat16] [--only head ...]

Prints of each the time of forward and backward pass (of AdamW, of a step), the bytes that are held between the two (weights
included) and at the worst moment, and the largest difference of an output and of a gradient, over the largest value. The last
rows are what was tried and not taken.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope
from torch import Tensor, nn

from data.arguments import whole_number
from data.labels import load_label_set
from model.backbone import GroupedAttention
from model.head import InstanceNorm2d, PointwiseConv2d
from model.segmenter import build_segmenter
from train.loss import PixelLoss
from train.memory import PeakTracker

FACE = load_label_set("face19")


@dataclass
class Case:
    """Two functions of the same inputs (those that require a gradient get one)."""

    usual: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    inputs: list[Tensor]
    compiled: bool = False  # what memory ours takes then is not seen: a PeakTracker has dynamo leave code as it is
    state: list[Tensor] = field(default_factory=list)  # what the functions change: it was there before, and does not count

    @cached_property
    def learning(self) -> list[Tensor]:
        return [tensor for tensor in self.inputs if tensor.requires_grad]

    @cached_property
    def weights(self) -> Tensor:
        """What the output's gradient is."""
        with torch.no_grad():
            output = self.usual(*self.inputs)
        return torch.randn_like(output) if output.ndim else torch.ones_like(output)

    def run(self, function: Callable[..., Tensor]) -> tuple[Tensor, tuple[Tensor, ...], float]:
        """(output, gradients, seconds)."""
        weights = self.weights if self.learning else None
        started = self.now()
        output = function(*self.inputs)
        gradients = torch.autograd.grad(output, self.learning, weights) if self.learning else ()
        return output.detach(), gradients, self.now() - started

    def now(self) -> float:
        if self.inputs[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def held(self, function: Callable[..., Tensor]) -> int:
        """Bytes between forward and backward pass: the output, and what is kept, of the inputs too."""
        with PeakTracker([*self.inputs, *self.state]) as tracker:
            output = function(*(tensor.clone() for tensor in self.inputs))
            now = tracker.now
        del output
        return now

    def peak(self, function: Callable[..., Tensor]) -> int:
        """Bytes at the worst moment of forward and backward pass, without the inputs."""
        weights = [self.weights] if self.learning else []
        with PeakTracker([*self.inputs, *self.state, *weights]) as tracker:
            self.run(function)
        return tracker.peak


def loss(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Logits of four images at half their size, as Sapiens v1 has them; four times as large as the rest: it has few channels."""
    classes, (height, width) = FACE.num_classes, (4 * size[0], 4 * size[1])
    logits = torch.randn(4, classes, height // 2, width // 2, device=device).to(dtype).requires_grad_()
    labels = torch.randint(0, classes, (4, height, width), dtype=torch.uint8, device=device)
    ours, totals = PixelLoss(torch.ones(classes), FACE), (float(labels.numel()), 4.0)
    return Case(
        lambda logits: ours._share(logits.float(), labels, totals, None, None),
        lambda logits: ours.share(logits, labels, totals),
        [logits],
    )


def attention(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Of Sapiens 0.3B."""
    ours = Attention(1024, num_heads=16, qkv_bias=True).to(device, dtype)
    usual = deepcopy(ours)
    ours.fused_attn, usual.fused_attn = True, False
    x = torch.randn(1, size[0] * size[1] // 256, 1024, device=device).to(dtype).requires_grad_()
    return Case(usual, ours, [x])


def grouped_queries(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """An attention of Sapiens2 1B's middle blocks."""
    with torch.device("meta"):
        backbone = build_segmenter("sapiens2_1b", 2, size).backbone
    ours: nn.Module = backbone.blocks[8].attn.to_empty(device=device).to(dtype)
    assert isinstance(ours, GroupedAttention)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.03)
    usual = deepcopy(ours)
    usual.__class__ = AttentionRope
    tokens = size[0] * size[1] // 256 + ours.num_prefix_tokens
    x = torch.randn(1, tokens, 1536, device=device).to(dtype).requires_grad_()
    angles = torch.rand(tokens - ours.num_prefix_tokens, ours.head_dim // 2, device=device).mul(6).tile(2)
    rope = torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
    return Case(lambda x: usual(x, rope=rope), lambda x: ours(x, rope=rope), [x])


def norm_and_silu(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """With a convolution behind them, which keeps its input, as the head's next one does."""
    x = torch.randn(1, 768, size[0] // 2, size[1] // 2, device=device).to(dtype).requires_grad_()
    after = PointwiseConv2d(768, 8).to(device, dtype)
    ours, usual = InstanceNorm2d(768), nn.InstanceNorm2d(768)
    return Case(lambda x: after(F.silu(usual(x))), lambda x: after(F.silu(ours(x))), [x])


def pointwise(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    ours = PointwiseConv2d(768, 768).to(device, dtype)
    x = torch.randn(1, 768, size[0] // 2, size[1] // 2, device=device).to(dtype).requires_grad_()
    return Case(lambda x, w, b: F.conv2d(x, w, b), lambda x, w, b: ours(x), [x, ours.weight, ours.bias])


def compiled_block(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """A block of Sapiens 0.3B."""
    usual = build_segmenter("sapiens_0.3b", 2, (32, 32)).backbone.blocks[0].to(device, dtype).train()
    ours = deepcopy(usual)
    ours.compile()
    x = torch.randn(1, size[0] * size[1] // 256, 1024, device=device).to(dtype).requires_grad_()
    return Case(usual, ours, [x], compiled=True)


def fused_adamw(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """A step of as many weights as a block of Sapiens 0.3B has, whatever the size; in fp32, and in one tensor, as ZeRO's are."""
    gradients = [torch.randn(12_596_224, device=device) for _ in range(3)]  # of one alone, only the sign would count
    state = gradients.copy()

    def side(**options: bool) -> Callable[[Tensor], Tensor]:
        parameter, in_turn = nn.Parameter(torch.zeros_like(gradients[0])), cycle(gradients)
        optimizer = torch.optim.AdamW([parameter], **options)

        def step(_: Tensor) -> Tensor:
            parameter.grad = next(in_turn)
            optimizer.step()
            return parameter

        state.extend([step(parameter), *optimizer.state[parameter].values()])
        return step

    return Case(side(), side(fused=True), [torch.empty(0, device=device)], state=state)


def transposed(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and weights of the head's last transposed convolution."""
    x = torch.randn(1, 768, size[0] // 4, size[1] // 4, device=device).to(dtype).requires_grad_()
    return x, (torch.randn(768, 768, 4, 4, device=device) * 0.02).to(dtype).requires_grad_()


def sub_pixels(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """The transposed convolution as one of 2x2 with four times the channels, whose outputs interleave: the same arithmetic."""

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        (inputs, outputs), (height, width) = weight.shape[:2], x.shape[2:]
        taps = [[weight[:, :, rows][..., columns] for columns in ([3, 1], [2, 0])] for rows in ([3, 1], [2, 0])]
        kernel = torch.stack([torch.stack(row) for row in taps]).transpose(2, 3).reshape(4 * outputs, inputs, 2, 2)
        parts = F.conv2d(x, kernel, padding=1).unflatten(1, (2, 2, outputs))
        rows = [torch.stack([parts[:, i, j, :, i : i + height, j : j + width] for j in (0, 1)], dim=-1) for i in (0, 1)]
        return torch.stack(rows, dim=-3).reshape(-1, outputs, 2 * height, 2 * width)

    return Case(lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), ours, [*transposed(size, dtype, device)])


def channels_last(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """The transposed convolution in the other order of memory."""

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return usual(*(tensor.to(memory_format=torch.channels_last) for tensor in (x, weight)))

    def usual(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, stride=2, padding=1)

    return Case(usual, ours, [*transposed(size, dtype, device)])


TAKEN = {
    "loss of 4 images": loss, "flash attention": attention, "grouped queries": grouped_queries, "norm and SiLU": norm_and_silu,
    "1x1 convolution": pointwise, "compile: a block": compiled_block, "fused AdamW, fp32": fused_adamw,
}  # fmt: skip
NOT_TAKEN = {"sub-pixel convolution": sub_pixels, "channels last": channels_last}


def apart(ours: Sequence[Tensor], usual: Sequence[Tensor]) -> str:
    """The largest difference of a pair, over its largest value; nan if any value is."""
    pairs = [(one.double(), other.double()) for one, other in zip(ours, usual, strict=True)]
    # torch's maximum, for Python's passes a nan over that is not the first.
    return f"{torch.stack([(one - other).abs().max() / other.abs().max() for one, other in pairs]).max():.0e}" if pairs else "-"


def row(name: str, case: Case, rounds: int) -> str:
    seconds: dict[str, list[float]] = {"usual": [], "ours": []}
    for _ in range(1 + rounds):
        output, gradients, took = case.run(case.usual)
        seconds["usual"].append(took)
        our_output, our_gradients, took = case.run(case.ours)
        seconds["ours"].append(took)
    usual, ours = (1e3 * statistics.median(seconds[side][1:]) for side in ("usual", "ours"))
    # Before memory is measured: that goes on with what the functions change.
    differences = [apart([our_output], [output]), apart(our_gradients, gradients)]
    memory = [f"{measure(function) / 1e6:.0f}" for measure in (case.held, case.peak) for function in (case.usual, case.ours)]
    if case.compiled:
        memory[1::2] = "--"
    cells = [f"{usual:.1f}", f"{ours:.1f}", f"{ours / usual:.2f}", *memory, *differences]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 192], metavar=("HEIGHT", "WIDTH"), help="of the images")
    parser.add_argument("--rounds", type=whole_number(1), default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--only", nargs="+", choices=[*TAKEN, *NOT_TAKEN], default=[*TAKEN, *NOT_TAKEN])
    args = parser.parse_args()
    if any(side < 16 or side % 16 for side in args.size):
        parser.error(f"--size: {args.size[0]} {args.size[1]} is not whole patches, choose multiples of 16")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # fp32 beside fp32
    size, dtype = tuple(args.size), getattr(torch, args.dtype)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{size[0]}x{size[1]}, {args.dtype}, {where}, torch {torch.__version__}; medians of {args.rounds}")
    columns = ["", "usual ms", "ours ms", "ratio", "held MB", "ours", "peak MB", "ours", "output apart", "gradient apart"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, make in (TAKEN | NOT_TAKEN).items():
        if name in args.only:
            torch.manual_seed(0)
            try:
                print(row(name, make(size, dtype, device), args.rounds), flush=True)
            except RuntimeError as error:  # out of memory, or no compiler: the others can do without
                reason, *_ = str(error).partition("\n")  # an error may be without a word
                print(f"| {name} | not measured: {reason} |", flush=True)


if __name__ == "__main__":
    main()
