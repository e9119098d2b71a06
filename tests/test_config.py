import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import TrainError
from train.config import load_config
from train.deepspeed_config import resolve

CONFIGS = sorted(Path("train/configs").glob("*.yaml"))
DEMO = Path("train/configs/demo.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_our_experiments_are_valid(path):
    config = load_config(path, [])
    assert config.accumulation(8 if "face" in path.stem else 2) >= 1
    for ds in Path("ds_configs").glob("*.json"):
        settings = resolve(config.model_copy(update={"deepspeed": ds}), 2, on_gpu=True)
        assert '"auto"' not in json.dumps(settings)


def test_recomputation_from_1b():
    sizes = {path.stem: load_config(path, []).model.recompute for path in CONFIGS if "face" in path.stem}
    assert sizes == {"face_0.3b": False, "face_0.6b": False, "face_1b": True, "face_2b": True}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.arhc=tiny"], "model.arhc: unknown key; known here: arch, image_size"),
        (["learning_rate=1"], "learning_rate: unknown key; known here: seed"),
        (["optimizer.lr=fast"], "optimizer.lr: .*valid number.*'fast'"),
        (["optimizer.lr=-1"], "optimizer.lr: .*greater than 0.*-1"),
        (["model.image_size=[128]"], "model.image_size"),
        (["model.arch=sapiens_3b"], "model.arch: .*sapiens_3b"),
        (["schedule.epochs=3"], "schedule: give one of `epochs` and `steps`"),
        (["loss.class_weights=some"], "loss.class_weights"),
        (["precision=fp16"], "precision: .*'fp16'"),
        (["data=3"], "data: "),
        (["augment.scale=[0,1]"], "augment.scale: .*no range"),
        (["optimizer.betas=[0.9,1]"], "optimizer.betas.1: .*less than 1"),
        (["nonsense"], "write key=value"),
        (["global_batch_size.x=1"], "global_batch_size is a value"),
        (["a=[1"], "not a YAML value"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, message):
    with pytest.raises(TrainError, match=message) as caught:
        load_config(DEMO, overrides)
    assert "\n" not in str(caught.value)


def test_all_mistakes_at_once():
    with pytest.raises(TrainError, match="model.arhc.*optimizer.lr"):
        load_config(DEMO, ["model.arhc=tiny", "optimizer.lr=fast"])


def test_yaml_files_that_are_none(tmp_path):
    for text, message in (("a: [", "not readable as YAML"), ("", "holds no"), ("seed: 1\n", "data: missing")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(TrainError, match=message):
            load_config(tmp_path / "x.yaml", [])
    with pytest.raises(TrainError, match="no such config; there are .*demo.yaml"):
        load_config(tmp_path / "y.yaml", [])


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_accumulation_follows_or_is_refused(batch, micro, world):
    config = load_config(DEMO, [f"global_batch_size={batch}", f"micro_batch_size={micro}"])
    if batch % (micro * world):
        with pytest.raises(TrainError, match="global_batch_size: .*does not divide"):
            config.accumulation(world)
    else:
        assert config.accumulation(world) * micro * world == batch


def test_exponents_without_a_dot_are_numbers():
    assert load_config(DEMO, ["optimizer.lr=3e-4"]).optimizer.lr == 3e-4


def with_json(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    return load_config(DEMO, [f"deepspeed={tmp_path / 'ds.json'}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "zero_optimization: missing"),
        ('{"zero_optimization": {"stage": 4}}', "stage: must be"),
        ('{"zero_optimization": {"stage": 1}, "zero_optimisation": {}}', "zero_optimisation: unknown key"),
        ('{"zero_optimization": {"stage": 1}, "optimizer": {}}', "optimizer: set `optimizer` in the YAML"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage: given twice"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}', "reduce_bucket_size: \"auto\" cannot be"),
        ('{"zero_optimization": {"stage": 1}, "train_batch_size": 7}', "train_batch_size: 7 contradicts"),
        ('{"zero_optimization": {"stage": 0}, "bf16": {"enabled": "auto"}}', "wrong results at ZeRO stage 0"),
        ('{"zero_optimization": {"stage": 2}}', "bf16: missing"),
        ('{"zero_optimization": {"stage": 1}, "bf16": true}', "bf16: must be a section"),
        ('{"zero_optimization": {"stage": 0}, "data_types": {}}', "data_types: .*stage 0"),
    ],
)
def test_what_deepspeed_would_swallow_is_refused(tmp_path, text, message):
    with pytest.raises(TrainError, match=message) as caught:
        resolve(with_json(tmp_path, text), 2, on_gpu=True)
    assert "ds.json" in str(caught.value)


def test_precision_fills_the_right_section():
    for name, key in (("zero0", "torch_autocast"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")):
        for on_gpu in (False, True):
            config = load_config(DEMO, [f"deepspeed=ds_configs/{name}.json"])
            assert resolve(config, 2, on_gpu)[key]["enabled"] is on_gpu
