"""How much arithmetic a training image is, and how much a device could do."""

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.segmenter import build_segmenter
from train.config import Config
from train.optim import freeze

# Dense bf16 and fp16, in TFLOP/s, from the makers' data sheets; the first name that occurs in the device's.
PEAKS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989, "B200": 2250,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10": 125, "RTX 6000 Ada": 364, "RTX A6000": 155,
    "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def training_flops(config: Config, num_classes: int) -> int:
    """Floating point operations of forward and backward pass for one image: convolutions, matrices and attention of backbone
    and head. What is frozen has no gradients to compute; what is recomputed counts once."""
    spec = config.model
    with torch.device("meta"):
        model = build_segmenter(spec.arch, num_classes, spec.image_size, spec.patch_padding, spec.rope_precision)
        images = torch.empty(1, 3, *spec.image_size)
    freeze(model, spec.freeze)
    with FlopCounterMode(display=False) as counter:
        model.eval()(images).sum().backward()  # eval: dropout draws from the seeds, which meta tensors have none of
    return counter.get_total_flops()


def peak_flops(config: Config, device: torch.device) -> float | None:
    """What `device` could do in a second at most in the run's precision; None if that is not known."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda" or config.precision == "fp32":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Of a whole GPU by its name, in FLOP/s; None of one that is not in the table, or is a part of one."""
    if "MIG" in name.split() or "Laptop" in name:
        return None
    return next((peak * 1e12 for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)
