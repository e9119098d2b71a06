"""What a process of a run will keep in memory, told beforehand: nothing is allocated, and no GPU is needed.

Activations are measured: the run's own model and loss go forward and backward with tensors that have a shape and no data.
Weights, gradients and the optimizer's state are counted: train.zero_memory.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
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
from train.zero_memory import FP32, Memory, Sizes, kept_by


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
    """What `Memory` is made of.

    Args:
        all_labelled: whether every image's masks can show every class.
        processes: of the whole run, one for each GPU.
    """

    def __init__(self, label_set: LabelSet, all_labelled: bool, processes: int) -> None:
        self.label_set, self.all_labelled, self.processes = label_set, all_labelled, processes
        self._models: dict[str, Segmenter] = {}
        self._measured: dict[str, Any] = {}

    def memory(self, config: Config, settings: dict[str, Any]) -> Memory:
        """Of a process of this experiment, with these resolved DeepSpeed settings."""
        dtype, autocast = _dtype(settings)
        activations = self._once(self._activations, config, dtype, autocast, config.micro_batch_size)
        validation = self._once(self._validation, config, dtype, autocast, config.evaluate.batch_size) if config.data.val else 0
        sizes = self._once(_sizes, config, dtype, autocast, 0)
        averaged = config.ema.decay is not None
        found = kept_by(settings, sizes, self.processes, activations, averaged)
        # The average changes places with the weights for that: one more copy of what AdamW keeps on the device.
        exchanged = found.optimizer // (3 + (stage(settings) > 0)) if averaged else 0
        return replace(found, validation=validation + exchanged if validation else 0)

    def _once(self, measure: Callable, config: Config, dtype: torch.dtype, autocast: bool, batch: int) -> Any:
        """What `measure` tells of the model and a batch of so many images. It takes seconds, and most stages share it."""
        which = f"{config.model.model_dump_json()} {dtype}"
        key = f"{measure.__name__} {which} {config.loss.model_dump_json()} {autocast} {batch}"
        if which not in self._models:
            self._models[which] = _fake_model(config, self.label_set.num_classes, dtype)
        if key not in self._measured:
            self._measured[key] = measure(self._models[which], config, autocast)
        return self._measured[key]

    def _activations(self, model: Segmenter, config: Config, autocast: bool) -> int:
        """The peak of a micro batch's forward pass, loss and backward pass, without the gradients of parameters."""
        size, batch, classes = config.model.image_size, config.micro_batch_size, self.label_set.num_classes
        seeds = torch.arange(batch)  # real: dropout draws from its numbers
        loss = PixelLoss(torch.ones(classes), self.label_set, config.loss.label_smoothing, config.loss.dice)
        with next(model.parameters()).fake_mode, PeakTracker([*model.parameters(), *model.buffers()]) as tracker:
            images, labels = (torch.empty(batch, *channels, *size, dtype=torch.uint8) for channels in ((3,), ()))
            labelled = None if self.all_labelled else torch.ones(batch, classes, dtype=torch.bool)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(images, seeds)
            loss.share(logits, labels, (1.0, 1.0), labelled).backward()
        return tracker.peak

    def _validation(self, model: Segmenter, config: Config, autocast: bool) -> int:
        """The peak of a batch's forward pass, and the logits of one image at the size of its mask, taken for the model's."""
        size = config.model.image_size
        with next(model.parameters()).fake_mode, PeakTracker([*model.parameters(), *model.buffers()]) as tracker, torch.no_grad():
            images = torch.empty(config.evaluate.batch_size, 3, *size, dtype=torch.uint8)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model.eval()(images)
            kept = logits.nbytes + images.nbytes
        model.train()
        return max(tracker.peak, kept + 2 * FP32 * self.label_set.num_classes * size[0] * size[1])


def _sizes(model: Segmenter, config: Config, autocast: bool) -> Sizes:
    with next(model.parameters()).fake_mode:
        groups = build_optimizer(model, config.optimizer).param_groups
    learning = [[parameter.numel() for parameter in group["params"]] for group in groups]
    parameters = list(model.parameters())
    return Sizes([parameter.numel() for parameter in parameters], learning, parameters[0].element_size())


def _dtype(settings: dict[str, Any]) -> tuple[torch.dtype, bool]:
    """The weights', and whether autocast computes in bf16."""
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    half = next((dtype for name, dtype in halves.items() if settings.get(name, {}).get("enabled")), torch.float32)
    return half, settings.get("torch_autocast", {}).get("enabled", False)


def _fake_model(config: Config, num_classes: int, dtype: torch.dtype) -> Segmenter:
    """As the engine has it, of tensors without data; it keeps no gradients."""
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
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    return model.train()


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
