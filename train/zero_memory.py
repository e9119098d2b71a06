"""What ZeRO makes of a model's sizes: the bytes that each process keeps, by DeepSpeed's rules.

Measured beside real runs in tests/test_memory.py. Gradients count as added up in fp32, as they are unless the JSON says
otherwise.
"""

from dataclasses import dataclass
from typing import Any

from train.deepspeed_config import stage

FP32 = 4  # bytes of an element
ALIGNMENT = 2  # elements: DeepSpeed fills its flat groups up to so many for each process
UNSHARDED_BUCKET = 500_000_000  # elements that are sent at a time where gradients are not sharded


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
    validation: int = 0  # at most, of a batch: as activations

    @property
    def device(self) -> int:
        """At the worst moment of a run."""
        return self.held + max(self.buffers + self.activations, self.update, self.validation)

    @property
    def held(self) -> int:
        """From step to step, and the gradients."""
        return self.weights + self.gradients + self.optimizer


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


def kept_by(settings: dict[str, Any], sizes: Sizes, processes: int, activations: int, averaged: bool) -> Memory:
    """Of a process with these resolved DeepSpeed settings.

    Args:
        activations: bytes at most, of one micro batch.
        averaged: whether there is an average of the weights, `ema`.
    """
    rules = {0: _unsharded, 1: _stage12, 2: _stage12, 3: _stage3}[stage(settings)]
    return rules(settings, sizes, processes, activations, averaged)


def _unsharded(settings: dict[str, Any], sizes: Sizes, n: int, activations: int, averaged: bool) -> Memory:
    state = (2 + averaged) * FP32 * sizes.learnt
    return Memory(
        weights=FP32 * sizes.total,
        gradients=FP32 * sizes.learnt,
        optimizer=state,
        activations=activations,
        update=FP32 * min(sizes.learnt, UNSHARDED_BUCKET),  # sent when the backward pass is over
        copies=(state + FP32 * sizes.learnt) // n,
    )


def _stage12(settings: dict[str, Any], sizes: Sizes, n: int, activations: int, averaged: bool) -> Memory:
    zero = settings["zero_optimization"]
    part = sum(-(-sum(group) // (ALIGNMENT * n)) * ALIGNMENT for group in sizes.learning)  # elements of a process
    weights, state = sizes.bytes * sizes.total, (3 + averaged) * FP32 * part
    bucket = int(zero.get("reduce_bucket_size", UNSHARDED_BUCKET))  # elements
    in_turn = 1 + bool(zero.get("overlap_comm"))
    if _device(zero, "offload_optimizer") != "none":
        # On the host the gradients twice, added up and to be stepped, and the new weights on their way back. They go there
        # one by one, through a buffer on either side.
        largest = sizes.bytes * sizes.largest
        host = state + (2 * FP32 + sizes.bytes) * part + largest
        buffers, update = _sending(sizes, bucket, in_turn * sizes.bytes * bucket)
        return Memory(weights, largest, 0, activations, buffers, update, host, copies=state)
    if stage(settings) == 2:
        buffers, update = _sending(sizes, bucket, in_turn * sizes.bytes * bucket)
        return Memory(weights, FP32 * part, state, activations, buffers, max(update, FP32 * part), copies=state)
    if settings.get("bf16", {}).get("enabled"):  # DeepSpeed's BF16_Optimizer: whole gradients in fp32 beside those in bf16
        gradients, update = (FP32 + sizes.bytes) * sizes.learnt, FP32 * min(sizes.learnt, UNSHARDED_BUCKET)
        return Memory(weights, gradients, state, activations, 0, update, copies=state)
    return Memory(weights, FP32 * sizes.learnt, state, activations, in_turn * FP32 * bucket, 2 * FP32 * part, copies=state)


def _stage3(settings: dict[str, Any], sizes: Sizes, n: int, activations: int, averaged: bool) -> Memory:
    zero = settings["zero_optimization"]
    part = sum(-(-size // n) for group in sizes.learning for size in group)
    own, gradients, state = sizes.bytes * sum(-(-size // n) for size in sizes.all), FP32 * part, (3 + averaged) * FP32 * part
    bucket = int(zero.get("reduce_bucket_size", UNSHARDED_BUCKET))
    buffers, update = _sending(sizes, max(bucket, sizes.largest), FP32 * bucket)  # one that is larger is sent alone
    update += sizes.bytes * sizes.learnt * (n == 1 and update > 0)  # by itself, to itself: one copy more
    update = max(update, FP32 * (bucket + min(part, int(zero.get("sub_group_size", 10**9)))))
    gathered = sizes.bytes * min(sizes.total, int(zero.get("stage3_max_live_parameters", 10**9)))
    weights, host, disk = own, 0, 0
    if _device(zero, "offload_param") != "none":
        weights, host = gathered, own
    elif n > 1:  # else there is nothing to gather
        weights += gathered
    device = _device(zero, "offload_optimizer")
    if device == "none":
        return Memory(weights, gradients, state, activations, buffers, update, host, disk, copies=state)
    host, disk = (host + 2 * gradients, state) if device == "nvme" else (host + 2 * gradients + state, 0)
    return Memory(weights, 0, 0, activations, buffers, update, host, disk, copies=state)


def _sending(sizes: Sizes, bucket: int, buffers: int) -> tuple[int, int]:
    """Bytes that gradients take on their way, (during the backward pass, after it): the `buffers` that they are collected in,
    and for a moment themselves, and in fp32 if they are not. A bucket that is never full is sent when all else is over."""
    sent = (FP32 + sizes.bytes % FP32) * min(bucket, sizes.learnt)
    return (buffers, buffers + sent) if bucket >= sizes.learnt else (buffers + sent, 0)


def _device(zero: dict[str, Any], what: str) -> str:
    return (zero.get(what) or {}).get("device", "none")
