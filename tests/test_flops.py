"""Arithmetic and peaks for MFU."""

from types import SimpleNamespace

import pytest

from train.flops import known_peak, training_flops

# Forward pass at 1024x768, in GFLOP: backbone and head, as measured on the originals.
FORWARD = {
    "sapiens_0.3b": (2788, 1938), "sapiens_0.6b": (5418, 1958), "sapiens_1b": (9284, 1977), "sapiens_2b": (16534, 2006),
    "sapiens2_0.1b": (1051, 209), "sapiens2_0.4b": (3367, 222), "sapiens2_0.8b": (6569, 235), "sapiens2_1b": (11296, 248),
    "sapiens2_5b": (36380, 293),
}  # fmt: skip


def flops(arch: str, freeze: str | None = None) -> float:
    spec = {"arch": arch, "image_size": (1024, 768), "patch_padding": None, "rope_precision": "bf16", "freeze": freeze}
    return training_flops(SimpleNamespace(model=SimpleNamespace(**spec)), 28)


@pytest.mark.parametrize("arch", FORWARD)
def test_the_backward_pass_is_two_forward_passes_of_head_and_backbone(arch):
    assert flops(arch) == pytest.approx(3e9 * sum(FORWARD[arch]), rel=2e-3)


def test_a_frozen_backbone_only_goes_forward():
    backbone, head = FORWARD["sapiens_0.3b"]
    assert flops("sapiens_0.3b", "backbone") == pytest.approx(1e9 * (backbone + 3 * head), rel=0.03)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA RTX A4000", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L40S", 362),
        ("NVIDIA RTX A1000", None), ("Something new", None),
    ],
)  # fmt: skip
def test_a_peak_is_known_of_whole_gpus(name, tflops):
    assert known_peak(name) == (tflops and tflops * 1e12)
