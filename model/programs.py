"""Trained models as programs that need nothing of this repository. model.export's --help tells how each is run.

Each write_* saves a model with its metadata to a path and returns what it reads back from there. The model's RoPE is a
constant afterwards.
"""

import json
import logging
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.segmenter import Segmenter

SIDECAR = "metadata.json"
Run = Callable[[Tensor], Tensor]  # images -> logits


def example(size: tuple[int, int]) -> Tensor:
    """Images, float32 (2, 3, height, width). Of one, it would not be seen whether the batch is fixed."""
    return torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()


class OneSize(nn.Module):
    """A model for images of its image_size alone: RoPE becomes a constant, which moves to a device with the weights, while
    a trace of its computation would stay on this one."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        self.model = model
        if getattr(model.backbone, "rope", None) is not None:
            model.backbone.rope = ConstantRope(model.backbone.rope.get_embed(shape=model.grid))

    def forward(self, images: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # a trace would take 96x128 for 128x96, as many patches, and get it wrong; this refuses
            images = images.expand(-1, 3, *self.model.image_size)
        return self.model(images)


class ConstantRope(nn.Module):
    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.register_buffer("embedding", embedding)

    def get_embed(self, shape: object) -> Tensor:
        return self.embedding


def write_torchscript(model: Segmenter, metadata: dict, path: Path) -> Run:
    with warnings.catch_warnings(action="ignore"):  # that it is out of fashion, and that Python's branches become fixed
        traced = torch.jit.trace(OneSize(model), example(model.image_size)[:1], check_trace=False)
        buffer = BytesIO()  # given the path, torch aborts the process when the disk is full
        torch.jit.save(traced, buffer, _extra_files={SIDECAR: json.dumps(metadata)})
        path.write_bytes(buffer.getbuffer())
        return torch.jit.load(path)


def _program(model: Segmenter) -> torch.export.ExportedProgram:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(OneSize(model), (example(model.image_size),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths are nobody's business
    return program


def write_pt2(model: Segmenter, metadata: dict, path: Path) -> Run:
    buffer = BytesIO()  # as for TorchScript
    torch.export.save(_program(model), buffer, extra_files={SIDECAR: json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())
    return torch.export.load(path).module()


class Fp32Arithmetic(TorchFunctionMode):
    """Computes in fp32 what would be computed in bf16, and rounds the result, which is the same. ONNX Runtime can't
    compute in bf16 on CPUs."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_arithmetic = getattr(func, "__name__", "") in ("mul", "add", "neg")
        if is_arithmetic and all(isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 for arg in args):
            return func(*(arg.float() for arg in args)).bfloat16()
        return func(*args, **kwargs or {})


def write_onnx(model: Segmenter, metadata: dict, path: Path) -> Run:
    import onnxruntime

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # else a line for each of the operators that it doesn't fold
    with warnings.catch_warnings(action="ignore"):
        with Fp32Arithmetic():
            program = _program(model)
        onnx = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
    onnx.model.metadata_props[SIDECAR] = json.dumps(metadata)
    onnx.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
