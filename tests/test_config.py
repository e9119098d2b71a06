import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from train import TrainError
from train.config import load_config
from train.deepspeed_config import refuse_wrong_deepspeed, resolve

CONFIGS = sorted(Path("train/configs").glob("*.yaml"))
DEMO = Path("train/configs/demo.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_our_experiments_are_valid(path):
    config = load_config(path, [])
    assert config.accumulation(2 if path == DEMO else 8) >= 1
    for ds in Path("ds_configs").glob("*.json"):
        settings = resolve(config.model_copy(update={"deepspeed": ds}), 2, on_gpu=True)
        assert '"auto"' not in json.dumps(settings)


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
        (["precision=fp8"], "precision: .*'fp8'"),
        (["data=3"], "data: "),
        (["augment.scale=[0,1]"], "augment.scale: .*no range"),
        (["optimizer.betas=[0.9,1]"], "optimizer.betas.1: .*less than 1"),
        (["micro_batch_size=true"], "micro_batch_size: .*true or false"),
        (["augment.flip_probability=yes"], "augment.flip_probability: .*true or false"),
        (["augment.photometric=maybe"], "augment.photometric: "),
        (["optimizer.lr=.inf"], "optimizer.lr: .*finite"),
        (["augment.scale=[0.5,.inf]"], "augment.scale.1: .*finite"),
        (["schedule.steps=null", "schedule.epochs=1e300"], "schedule.epochs: .*less than"),
        (["schedule.steps=null", "schedule.epochs=.inf"], "schedule.epochs: "),
        (["nonsense"], "write key=value"),
        (["global_batch_size.x=1"], "global_batch_size: .*valid integer"),
        (["seed=1", "seed.x=1"], "seed is a value"),
        (["base=train/configs/face_1b.yaml"], "base: unknown key"),
        (["a=[1"], "not a YAML value"),
        (["data.train=[]"], "data.train: names no shard set"),
        (["data.train=[3]"], "data.train.0: must hold keys with values, not 3$"),
        (["data.train=[{path: a, wieght: 2}]"], "data.train.0.wieght: unknown key; known here: path, weight, label_map$"),
        (["data.train=[{path: a, weight: -2}]"], "data.train.0.weight: .*, not -2$"),
    ],
)
def test_mistakes_are_named_in_one_line(overrides, message):
    with pytest.raises(TrainError, match=message) as caught:
        load_config(DEMO, overrides)
    assert "\n" not in str(caught.value)


def test_shard_sets_by_their_paths_alone():
    entries = load_config(DEMO, ["data.train=[a/train, {path: b/train, weight: 0.5}]"]).data.train
    assert [(entry.path, entry.weight) for entry in entries] == [("a/train", 1), ("b/train", 0.5)]
    assert load_config(DEMO, ["data.train=a/train"]).data.train == entries[:1]


def test_all_mistakes_at_once():
    with pytest.raises(TrainError, match="model.arhc.*optimizer.lr"):
        load_config(DEMO, ["model.arhc=tiny", "optimizer.lr=fast"])


def test_yaml_files_that_are_none(tmp_path):
    for text, message in (
        ("a: [", "not valid YAML"), ("", "holds no"), ("seed: 1\n", "data: missing"), ("seed: 1\nseed: 2\n", "stands twice")
    ):  # fmt: skip
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(TrainError, match=message):
            load_config(tmp_path / "x.yaml", [])
    with pytest.raises(TrainError, match="no such config; in train/configs there are .*demo"):
        load_config(tmp_path / "y.yaml", [])


def write(folder, **files):
    """NAME.yaml of each text; returns the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_base_is_changed_key_by_key(tmp_path):
    (tmp_path / "sub").mkdir()
    top = write(
        tmp_path,
        top="base: sub/middle.yaml\nschedule: {steps: 9}\naugment: {scale: [0.5, 1.5]}\n",
        **{"sub/middle": "base: ../low.yaml\nschedule: {steps: 8, warmup_steps: 3}\nseed: 7\n", "low": DEMO.read_text()},
    )
    plain, config = load_config(DEMO, []), load_config(top, ["schedule.warmup_steps=2"])
    assert (config.schedule.steps, config.schedule.warmup_steps, config.seed) == (9, 2, 7)
    assert config.augment.scale == (0.5, 1.5) and config.augment.photometric is False
    same = {"schedule", "seed", "augment"}
    assert config.model_dump(exclude=same) == plain.model_dump(exclude=same)
    again = write(tmp_path, again=yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(again, []) == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml"}, "a.yaml: base: .*b.yaml: no such file"),
        ({"a": "base: a.yaml"}, "a.yaml: base: a.yaml builds on this file itself"),
        ({"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: ../{}/b.yaml"}, "c.yaml: base: .*b.yaml builds on this"),
        ({"a": "base: [b.yaml, c.yaml]"}, "a.yaml: base: must be the path of one YAML file, not \\['b.yaml'"),
        ({"a": "base:"}, "a.yaml: base: must be the path of one YAML file, not None"),
        ({"a": "base: b.yaml", "b": "- 1"}, "b.yaml: holds no"),
        ({"a": "base: b.yaml", "b": "a: ["}, "b.yaml: not valid YAML"),
        ({"a": "base: b.yaml\nlog_every: 1", "b": "log_evry: 1"}, "a.yaml: .*data: missing.*; .*b.yaml: log_evry: unknown key"),
        ({"a": "base: b.yaml\nmodel: 3", "b": "model: {arch: tiny}"}, "a.yaml: .*; model: .*not 3"),
    ],
)
def test_mistakes_in_a_base_are_told_with_its_name(tmp_path, files, message):
    files = {name: text.replace("{}", tmp_path.name) for name, text in files.items()}
    with pytest.raises(TrainError, match=message) as caught:
        load_config(write(tmp_path, **files), [])
    assert "\n" not in str(caught.value)


def test_an_override_is_not_blamed_on_the_base():
    with pytest.raises(TrainError, match=r"^train/configs/lip_2b.yaml: optimizer.lr: .*; loss.dise: unknown key"):
        load_config(Path("train/configs/lip_2b.yaml"), ["optimizer.lr=fast", "loss.dise=1"])


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
        ('{"zero_optimization": {"stage": 1}, "flops_profiler": {"enabled": "maybe"}}', "flops_profiler.enabled: must be true"),
        ('{"zero_optimization": {"stage": 1}, "comms_logger": 5}', "comms_logger: must be a section"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "DeepSpeed refuses zero_optimization.overlap_com: "),
        ({"bf16": {"enabled": "auto", "foo": 1}}, "DeepSpeed refuses bf16.foo: "),
        ({"fp16": {"enabled": False, "loss_scale": "many"}}, "DeepSpeed refuses fp16.loss_scale: "),
        ({"communication_data_type": "fp13"}, "DeepSpeed refuses it: Invalid communication_data_type"),
        ({"wall_clock_breakdown": "perhaps"}, "DeepSpeed refuses it: "),
        ({"data_types": {"grad_accum_dtype": "fp13"}}, "data_types.grad_accum_dtype: must be"),
        ({"steps_per_print": "many"}, "steps_per_print: must be"),
    ],
)
def test_what_deepspeed_would_refuse_later_is_refused_at_once(tmp_path, changes, message):
    whole = json.loads(Path("ds_configs/zero1.json").read_text()) | changes
    with pytest.raises(TrainError, match=message):
        resolve(with_json(tmp_path, json.dumps(whole)), 2, on_gpu=True)


def test_precision_fills_the_right_section():
    for name, key in (("zero0", "torch_autocast"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3", "bf16")):
        for on_gpu in (False, True):
            config = load_config(DEMO, [f"deepspeed=ds_configs/{name}.json"])
            assert resolve(config, 2, on_gpu)[key]["enabled"] is on_gpu


@pytest.mark.parametrize("wrong", ["0.17.6", "0.18.2", "0.19.3"])
def test_versions_with_wrong_gradients_are_refused(wrong):
    with pytest.raises(TrainError, match=rf"deepspeed {wrong}: .*pip install 'deepspeed>=0.19.4'"):
        refuse_wrong_deepspeed(wrong)
    refuse_wrong_deepspeed("0.19.4")


def test_gradients_are_added_up_and_sent_in_fp32_unless_the_json_says_otherwise(tmp_path):
    for stage in (0, 1, 2, 3):
        path = tmp_path / f"{stage}.json"
        half = "torch_autocast" if stage == 0 else "bf16"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}, half: {"enabled": "auto"}}))
        settings = resolve(load_config(DEMO, [f"deepspeed={path}", "precision=bf16"]), 1, on_gpu=True)
        assert settings["communication_data_type"] == "fp32"
        assert settings.get("torch_autocast", {"dtype": "bfloat16"})["dtype"] == "bfloat16"
        assert settings.get("data_types", {"grad_accum_dtype": "fp32"}) == {"grad_accum_dtype": "fp32"}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "communication_data_type": "bf16"}))
    assert resolve(load_config(DEMO, [f"deepspeed={path}"]), 1, on_gpu=False)["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "message"),
    [
        (["precision=fp16"], False, "precision: fp16 needs a GPU"),
        (["precision=fp16", "deepspeed=ds_configs/zero0.json"], True, "zero0.json: fp16: not there, or at ZeRO stage 0"),
        (["compile=true", "deepspeed=ds_configs/zero3.json"], False, "compile: ds_configs/zero3.json is ZeRO stage 3"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, on_gpu, message):
    with pytest.raises(TrainError, match=message):
        resolve(load_config(DEMO, overrides), 1, on_gpu)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}, "offload_param: "),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer: NVMe needs"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer: must be a section"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "and ZeRO stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "an average"),
        ({"zero_optimization": {"stage": 0}, "torch_autocast": {"enabled": "auto", "dtype": "float16"}}, "must be bfloat16"),
        ({"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": "auto"}}, "torch_autocast: gradients would be sent"),
        ({"zero_optimization": {"stage": 1}, "data_types": {"grad_acum_dtype": "fp32"}}, "data_types: grad_acum_dtype: unknown"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "zero_optimization.compute_grad_norm: without it"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto", "check_grad_overflow": False}}, "check_grad_overflow"),
    ],
)
def test_settings_that_would_harm_are_refused(tmp_path, sections, message):
    path = tmp_path / "zero.json"
    half = {} if "torch_autocast" in sections else {"bf16": {"enabled": "auto"}}
    path.write_text(json.dumps(half | sections))
    with pytest.raises(TrainError, match=message):
        resolve(load_config(DEMO, [f"deepspeed={path}", "ema.decay=0.9", "precision=bf16"]), 1, on_gpu=False)


def test_no_offload_may_be_null(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 3, "offload_param": null, "offload_optimizer": null}}')
    resolve(load_config(DEMO, [f"deepspeed={path}"]), 1, on_gpu=False)


def test_fp16_on_a_gpu():
    settings = resolve(load_config(DEMO, ["precision=fp16"]), 1, on_gpu=True)
    assert settings["fp16"] == {"enabled": True} and settings["bf16"] == {"enabled": False}
