"""Activations that are computed again in the backward pass instead of being kept for it."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from model import ModelError

if TYPE_CHECKING:
    from model.segmenter import Segmenter

PARTS = ("none", "head", "attention", "mlp", "blocks")
_measured: list[Tensor] | None = None  # where kept_bytes collects what checkpoints keep


def keep_inputs(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """`function(*inputs)`, of which only the inputs are kept for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    if _measured is not None:
        _measured.extend(value for value in inputs if isinstance(value, Tensor))
    # Nothing that is recomputed draws from the device's running state, which would have to be read each time.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Recomputed:
    """Makes a module keep nothing but its inputs for the backward pass.

    By its class, and around all of a call: DeepSpeed ZeRO-3 gathers parameters in the hooks that a call begins with, and has
    to gather them again for the second one.
    """

    def __call__(self, *inputs: object, **named: object) -> Tensor:
        return keep_inputs(lambda *values: super(Recomputed, self).__call__(*values, **named), *inputs)


def recompute(model: "Segmenter", what: str | int) -> None:
    """Choose, once, what `model` recomputes.

    what: "none"; "head": the norms and activations of the head, which keep the most; "attention" or "mlp": these parts of
    every block too; "blocks": whole blocks, all of them, and the head; n > 1: every n-th block, and the head.

    Raises ModelError for anything else.
    """
    if what not in PARTS and not (isinstance(what, int) and what > 1):
        raise ModelError(f"recompute: {what!r} is none of {', '.join(PARTS)}, or a whole number above 1")
    model.decode_head.recomputes = what != "none"
    for i, block in enumerate(model.backbone.blocks):
        if what == "blocks" or (isinstance(what, int) and i % what == 0):
            _wrap(block)
        elif what in ("attention", "mlp"):
            part = getattr(block, "attn" if what == "attention" else "mlp", None)
            if part is None:
                raise ModelError(f"recompute: the blocks of {model.arch.name} have no {what} of their own; choose blocks")
            _wrap(part)


def _wrap(module: nn.Module) -> None:
    module.__class__ = _recomputed(type(module))


@cache  # torch.compile compiles a block anew for each class, and leaves the ninth as it is
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Recomputed, kind), {})


def kept_bytes(model: nn.Module, images: Tensor, seeds: Tensor) -> int:
    """What a forward pass keeps for the backward pass, but for parameters.

    On meta tensors it costs nothing, but tells too much: they have no flash attention.

    images, seeds: as for Segmenter.forward.
    """
    global _measured
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: list[Tensor] = []  # holding them keeps their storages' addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    _measured = kept
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(images, seeds)
    finally:
        _measured = None
    del logits
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in kept}
    return sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)
