"""Every ZeRO stage, precision and accumulation: gradients, losses and learning rates of one plain PyTorch loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.mixture import Mixture
from model.trained import load_segmenter
from tests.conftest import ROOT, Run, experiment, recorded_runs, zero
from tests.plain import Plain, configuration, differences, fresh_model, plain_loop
from train.optim import lr_factor, lr_scales

SETTINGS = [
    "schedule.steps=20", "schedule.warmup_steps=5", "optimizer.lr=2e-3", "optimizer.layer_decay=0.8",
    "checkpoint.every_steps=20", "model.dropout=0.1", "augment.scale=[0.5,2]", "augment.rotate_probability=0.5",
    "augment.photometric=true", "evaluate.pictures=0", "timeout_minutes=7",
]  # fmt: skip
STAGES = ("0", "1", "2", "2_offload", "3", "3_offload")
# stage, precision, processes, samples at a time: accumulation is 8 / (processes x samples); and what is recomputed
CASES = [
    *[(stage, "fp32", 2, micro, what) for stage in STAGES for micro, what in ((4, "none"), (1, "blocks"))],
    *[(stage, "bf16", 2, micro, "none") for stage in STAGES for micro in (4, 1)],
    *[(stage, "fp32", 1, 2, what) for stage, what in (("0", "head"), ("1", "attention"), ("2", "mlp"), ("3", "2"))],
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(shards) -> Plain:
    return plain_loop(shards, SETTINGS)


@pytest.fixture(scope="module")
def runs(shards, once) -> dict[tuple, Run]:
    names = {case: "-".join(map(str, case)) for case in CASES}

    def make(folder: Path) -> None:
        for alike in {case[1:3] for case in CASES}:
            jobs = {
                names[case]: experiment(
                    shards, folder / names[case], *SETTINGS, zero(stage, folder), f"precision={precision}",
                    f"micro_batch_size={micro}", f"model.recompute={what}",
                )
                for case in CASES if case[1:3] == alike
                for stage, precision, _, micro, what in [case]
            }  # fmt: skip
            recorded_runs(jobs, folder, alike[1])

    folder = once("stages", make)
    return {case: Run(0, "", folder / name) for case, name in names.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_equals_plain_pytorch(shards, runs, plain, case):
    stage, precision, processes, micro, what = case
    run = runs[case]
    gradient, loss = differences(run, plain)
    print(f"ZeRO-{stage:<10}{precision} accumulation {8 // (processes * micro)}  gradient {gradient:.1e}  loss {loss:.1e}")
    if precision == "fp32":
        assert gradient < 1e-5 and loss < 1e-5
    else:
        assert 1e-5 < gradient < 5e-3 and 0 < loss < 1e-3
    (first, *_) = (json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines())
    norm = torch.stack([gradient.norm() for gradient in plain.gradients.values()]).norm().item()
    assert first["train/gradient_norm"] == pytest.approx(norm, rel=1e-5 if precision == "fp32" else 0.01)
    config = configuration(shards, SETTINGS)
    scales = lr_scales(fresh_model(config, Mixture.open(config.data.train)), config.optimizer)
    factor = lr_factor(19, 20, config.schedule)
    rates = json.loads((run.folder / "rates.json").read_text())
    assert rates == {name: pytest.approx(2e-3 * scales[name] * factor) for name in rates} and len(set(rates.values())) > 2
    timeouts = json.loads((run.folder / "timeouts.json").read_text())
    assert set(timeouts) == {7 * 60} and len(timeouts) > (stage != "0")  # ZeRO has groups of its own
    model, metadata = load_segmenter(run.folder / "model.safetensors")
    assert metadata["arch"] == "tiny" and metadata["label_set"]["flip_pairs"] == [[3, 4], [5, 6], [7, 8]]
    assert metadata["step"] == 20 and model.num_classes == 19 and len(metadata["revision"]) >= 40
    assert metadata["normalization"]["mean"] == [123.675, 116.28, 103.53] and metadata["patch_padding"] == 0
    assert all(weight.isfinite().all() for weight in load_file(run.folder / "model.safetensors").values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equals_plain_pytorch_on_a_gpu(shards, tmp_path, plain):
    cases = [(stage, precision) for precision in ("fp32", "bf16", "fp16") for stage in STAGES[precision == "fp16" :]]
    apart = {}
    for stage, precision in cases:
        settings = json.loads((ROOT / zero(stage, tmp_path).partition("=")[2]).read_text())
        if precision == "fp16":
            settings["fp16"]["initial_scale_power"] = 10  # else the first steps look for it, and are passed over
        (tmp_path / f"{stage}-{precision}.json").write_text(json.dumps(settings))
        job = experiment(
            shards, tmp_path / f"{stage}-{precision}", *SETTINGS, f"deepspeed={tmp_path / f'{stage}-{precision}.json'}",
            f"precision={precision}", "micro_batch_size=2", "model.recompute=blocks",
        )  # fmt: skip
        run = recorded_runs({"": job}, tmp_path, processes=0)[""]
        apart[f"{stage}-{precision}"] = gradient, loss = differences(run, plain)
        print(f"GPU, ZeRO-{stage} {precision}: gradient {gradient:.1e}  loss {loss:.1e}")
    for name, (gradient, loss) in apart.items():
        # What is left in fp32: TF32 is off, but cuDNN adds up in another order.
        assert max(gradient, loss) < (1e-3 if name.endswith("fp32") else 0.05), name


def test_a_step_that_is_not_finite_changes_nothing(shards, tmp_path):
    settings = [*SETTINGS, "schedule.steps=6", "micro_batch_size=2"]
    expected = np.array(plain_loop(shards, settings, passed_over=3).losses)
    cases = [(stage, precision) for stage in STAGES for precision in ("fp32", "bf16")]
    jobs = {
        f"{stage}-{precision}": experiment(
            shards, tmp_path / f"{stage}-{precision}", *settings, zero(stage, tmp_path), f"precision={precision}"
        )
        for stage, precision in cases
    }  # fmt: skip
    for name, run in recorded_runs(jobs, tmp_path, 2, 3).items():
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["train/skipped_steps"] for line in lines[:6]] == [0, 0, 0, 1, 1, 1], name
        assert all((line["train/gradient_norm"] is None) == (line["step"] == 3) for line in lines[:6]), name
        others = [step for step in range(6) if step != 3]
        apart = np.abs(np.array([run.losses[step] for step in others]) - expected[others]).max()
        assert apart < (1e-5 if name.endswith("fp32") else 0.05), name


def test_compiled_blocks_train_the_same(shards, tmp_path, plain):
    job = experiment(shards, tmp_path / "run", *SETTINGS, "compile=true", "model.recompute=2", zero(2, tmp_path))
    run = recorded_runs({"compiled": job}, tmp_path, processes=1)["compiled"]
    gradient, loss = differences(run, plain)
    print(f"compiled: gradient {gradient:.1e}  loss {loss:.1e}")
    assert gradient < 1e-5 and loss < 1e-5 and json.loads((run.folder / "compiled.json").read_text()) > 0
