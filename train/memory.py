"""What a process of a run will keep in memory, told beforehand: nothing is allocated, and no GPU is needed.

Activations are measured: the run's own model and loss go forward and backward with tensors that have a shape and no data.
Weights, gradients and the optimizer's state are counted by the rules of DeepSpeed's ZeRO.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.labels import LabelSet
from model.recompute import recompute
from model.segmenter import Segmenter, build_segmenter
from train.config import Config
from train.deepspeed_config import stage
from train.loss import PixelLoss
from train.optim import build_optimizer, freeze

FP32 = 4  # bytes of an element
ALIGNMENT = 2  # elements: DeepSpeed fills its flat groups up to so many for each process
UNSHARDED_BUCKET = 500_000_000  # elements that are sent at a time at ZeRO stage 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: on its device, but for `host` and `copies` in the machine's memory, and `disk` on NVMe."""

    weights: int  # at ZeRO-3 with those that are gathered at a time
    gradients: int
    optimizer: int  # fp32 weights beside the model's, AdamW's moments, the average of `ema`
    activations: int  # at most, of one micro batch: with what forward and backward pass take for a moment
    buffers: int = 0  # in which gradients are sent during the backward pass
    update: int = 0  # what sending gradients and the optimizer's step take, when the activations are gone
    host: int = 0  # what is offloaded
    disk: int = 0
    copies: int = 0  # on the host, of a checkpoint that is written

    @property
    def device(self) -> int:
        """At the worst moment of a step."""
        return self.held + max(self.buffers + self.activations, self.update)

    @property
    def held(self) -> int:
        """From step to step, and the gradients."""
        return self.weights + self.gradients + self.optimizer


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside a `with`, be they real or fake.

    Attributes:
        now, peak: bytes that are held, and that were held at most.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """known: tensors that do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref | None] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        """Takes in one that was made before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: weakref.ref) -> None:
            self._seen.pop(key, None)
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Estimate:
    """What `Memory` is made of. The activations, which take seconds, are measured once for all ZeRO stages that have the same.

    Args:
        all_labelled: whether every image's masks can show every class.
        processes: of the whole run, one for each GPU.
    """

    def __init__(self, label_set: LabelSet, all_labelled: bool, processes: int) -> None:
        self.label_set, self.all_labelled, self.processes = label_set, all_labelled, processes
        self._measured: dict[str, tuple[int, Sizes]] = {}

    def memory(self, config: Config, settings: dict[str, Any]) -> Memory:
        """Of a process of this experiment, with these resolved DeepSpeed settings."""
        dtype, autocast = _dtype(settings)
        spec = config.model.model_dump_json(), config.loss.model_dump_json(), config.micro_batch_size, dtype, autocast
        if (key := str(spec)) not in self._measured:
            model = _fake_model(config, self.label_set.num_classes, dtype)
            self._measured[key] = self._activations(model, config, autocast), _sizes(model, config)
        activations, sizes = self._measured[key]
        rules = {0: _unsharded, 1: _stage12, 2: _stage12, 3: _stage3}[stage(settings)]
        return rules(settings, sizes, self.processes, activations, config.ema.decay is not None)

    def _activations(self, model: Segmenter, config: Config, autocast: bool) -> int:
        """The peak of a micro batch's forward pass, loss and backward pass, without the gradients of parameters."""
        size, batch, classes = config.model.image_size, config.micro_batch_size, self.label_set.num_classes
        seeds = torch.arange(batch)  # real: dropout draws from its numbers
        loss = PixelLoss(torch.ones(classes), self.label_set, config.loss.label_smoothing, config.loss.dice)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with next(model.parameters()).fake_mode, PeakTracker([*model.parameters(), *model.buffers()]) as tracker:
            images, labels = (torch.empty(batch, *channels, *size, dtype=torch.uint8) for channels in ((3,), ()))
            labelled = None if self.all_labelled else torch.ones(batch, classes, dtype=torch.bool)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(images, seeds)
            loss.share(logits, labels, (1.0, 1.0), labelled).backward()
        return tracker.peak


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's parameters, each as long as its list."""

    all: list[int]
    learning: list[list[int]]  # of the optimizer's groups
    bytes: int  # of an element

    @property
    def total(self) -> int:
        return sum(self.all)

    @property
    def learnt(self) -> int:
        return sum(map(sum, self.learning))

    @property
    def largest(self) -> int:
        return max(map(max, self.learning))


def _sizes(model: Segmenter, config: Config) -> Sizes:
    with next(model.parameters()).fake_mode:
        groups = build_optimizer(model, config.optimizer).param_groups
    learning = [[parameter.numel() for parameter in group["params"]] for group in groups]
    parameters = list(model.parameters())
    return Sizes([parameter.numel() for parameter in parameters], learning, parameters[0].element_size())


def _unsharded(settings: dict[str, Any], sizes: Sizes, n: int, activations: int, averaged: bool) -> Memory:
    state = (2 + averaged) * FP32 * sizes.learnt
    return Memory(
        weights=FP32 * sizes.total,
        gradients=FP32 * sizes.learnt,
        optimizer=state,
        activations=activations,
        update=_sent_at_once(sizes, n),
        copies=(state + FP32 * sizes.learnt) // n,
    )


def _stage12(settings: dict[str, Any], sizes: Sizes, n: int, activations: int, averaged: bool) -> Memory:
    zero = settings["zero_optimization"]
    part = sum(-(-sum(group) // (ALIGNMENT * n)) * ALIGNMENT for group in sizes.learning)  # elements of a process
    weights, state = sizes.bytes * sizes.total, (3 + averaged) * FP32 * part
    bucket = (1 + bool(zero.get("overlap_comm"))) * zero.get("reduce_bucket_size", UNSHARDED_BUCKET)  # elements
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        # On the host the gradients twice, added up and to be stepped, and the new weights on their way back. They go there
        # one by one, through a buffer on either side.
        largest = sizes.bytes * sizes.largest
        host = state + (2 * FP32 + sizes.bytes) * part + largest
        return Memory(weights, largest, 0, activations, sizes.bytes * bucket, host=host, copies=state)
    if stage(settings) == 2:
        gradients, buffers, update = FP32 * part, sizes.bytes * bucket, FP32 * part
    elif settings.get("bf16", {}).get("enabled"):  # DeepSpeed's BF16_Optimizer: whole gradients in fp32 beside those in bf16
        gradients, buffers, update = (FP32 + sizes.bytes) * sizes.learnt, 0, _sent_at_once(sizes, n)
    else:
        gradients, buffers, update = FP32 * sizes.learnt, FP32 * bucket, 2 * FP32 * part
    return Memory(weights, gradients, state, activations, buffers, update, copies=state)


def _stage3(settings: dict[str, Any], sizes: Sizes, n: int, activations: int, averaged: bool) -> Memory:
    zero = settings["zero_optimization"]
    part = sum(-(-size // n) for group in sizes.learning for size in group)
    own, gradients, state = sizes.bytes * sum(-(-size // n) for size in sizes.all), FP32 * part, (3 + averaged) * FP32 * part
    # Sent parameter by parameter if one is larger than the bucket: then in fp32, twice for a moment.
    buffers = FP32 * (zero.get("reduce_bucket_size", UNSHARDED_BUCKET) + 2 * sizes.largest * (n > 1))
    gathered = sizes.bytes * min(sizes.total, int(zero.get("stage3_max_live_parameters", 10**9)))
    update = FP32 * min(part, int(zero.get("sub_group_size", 10**9)))
    weights, host, disk = own, 0, 0
    if zero.get("offload_param", {}).get("device", "none") != "none":
        weights, host = gathered, own
    elif n > 1:  # else there is nothing to gather
        weights += gathered
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if device == "none":
        return Memory(weights, gradients, state, activations, buffers, update, host, disk, copies=state)
    host, disk = (host + 2 * gradients, state) if device == "nvme" else (host + 2 * gradients + state, 0)
    return Memory(weights, 0, 0, activations, buffers, 0, host, disk, copies=state)


def _sent_at_once(sizes: Sizes, n: int) -> int:
    """Bytes in which gradients are sent that are not sharded, when the backward pass is over."""
    return FP32 * min(sizes.learnt, UNSHARDED_BUCKET) if n > 1 else 0


def _dtype(settings: dict[str, Any]) -> tuple[torch.dtype, bool]:
    """The weights', and whether autocast computes in bf16."""
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    half = next((dtype for name, dtype in halves.items() if settings.get(name, {}).get("enabled")), torch.float32)
    return half, settings.get("torch_autocast", {}).get("enabled", False)


def _fake_model(config: Config, num_classes: int, dtype: torch.dtype) -> Segmenter:
    """As the engine has it, of tensors without data."""
    spec = config.model
    with torch.device("meta"):  # timm's constructors do not work with fake tensors
        model = build_segmenter(
            spec.arch, num_classes, spec.image_size, spec.patch_padding, spec.rope_precision, spec.dropout, spec.drop_path
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=dtype))
    recompute(model, spec.recompute)
    freeze(model, spec.freeze)
    return model.train()


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
