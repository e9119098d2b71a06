"""The DeepSpeed JSON, filled from the experiment and checked: DeepSpeed itself drops `"auto"` and unknown keys in silence."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version
from pydantic import ValidationError

from train import TrainError
from train.config import Config

SOUND = "0.19.4"  # the first version with right gradients: DeepSpeed#7718, #8224
# What a file in ds_configs/ may hold: memory and communication. The rest is the experiment's.
KNOWN_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "zero_force_ds_cpu_optimizer",
    "zero_allow_untested_optimizer",
    "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state",
}  # fmt: skip
SWITCHES = ("bf16", "fp16", "torch_autocast", "comms_logger", "flops_profiler")  # sections with an `enabled`
# What DeepSpeed calls them when it refuses one of their keys.
SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedBF16Config": "bf16", "DeepSpeedFP16Config": "fp16",
    "CommsLoggerConfig": "comms_logger",
}  # fmt: skip
ELSEWHERE = {
    "optimizer": "set `optimizer` in the YAML",
    "scheduler": "set `schedule` in the YAML",
    "activation_checkpointing": "set `model.recompute` in the YAML",
    "amp": "use bf16 (`precision` in the YAML)",
}


def resolve(config: Config, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, without an "auto" left. Raises TrainError naming file, key and remedy."""
    refuse_wrong_deepspeed(version("deepspeed"))
    path = config.deepspeed
    settings = _read(path)
    for key in settings:
        if key not in KNOWN_KEYS:
            raise TrainError(f"{path}: {key}: {ELSEWHERE.get(key, 'unknown key; known: ' + ', '.join(sorted(KNOWN_KEYS)))}")
    for section in (*SWITCHES, "data_types"):
        if not isinstance(settings.get(section, {}), dict):
            raise TrainError(f'{path}: {section}: must be a section, as {{"enabled": "auto"}}')
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        settings.setdefault(key, "auto")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
    fp16 = config.precision == "fp16"
    values = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16.enabled": bf16,
        "fp16.enabled": fp16,
        "torch_autocast.enabled": bf16,
    }
    for key, value in values.items():
        *section, name = key.split(".")
        holder = settings.get(section[0]) if section else settings
        if holder is None or name not in holder:
            continue
        if holder[name] == "auto":
            holder[name] = value
        elif holder[name] != value:
            raise TrainError(f'{path}: {key}: {holder[name]} contradicts the experiment, which gives {value}; write "auto"')
    if "torch_autocast" in settings:
        settings["torch_autocast"].setdefault("dtype", "bfloat16")  # torch's own is fp16, of which nobody would scale the loss
    _refuse_traps(path, settings, bf16, fp16, on_gpu, config.ema.decay is not None)
    if config.compile and stage(settings) == 3:
        raise TrainError(f"compile: {path} is ZeRO stage 3, whose gathering of weights breaks every graph; use stage 2")
    # By default DeepSpeed adds up and sends gradients in the weights' precision.
    settings.setdefault("communication_data_type", "fp32")
    if stage(settings) > 0:
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # torch's fused AdamW steps what is offloaded as well, without the minutes that DeepSpeed's takes to compile.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("zero_allow_untested_optimizer", True)  # ours: train.optim
    _ask_deepspeed(path, settings)
    return settings


def _ask_deepspeed(path: Path, settings: dict[str, Any]) -> None:
    from train.engine import deepspeed  # not above: its import takes seconds, and ours are told at once

    # Of the batch it knows no number of processes yet.
    asked = {key: value for key, value in settings.items() if key != "train_batch_size"}
    try:
        deepspeed.DeepSpeedConfig(asked)
    except ValidationError as error:
        section = SECTIONS.get(error.title, error.title)
        found = (f"{'.'.join(map(str, (section, *problem['loc'])))}: {problem['msg']}" for problem in error.errors())
        raise TrainError(f"{path}: DeepSpeed refuses {'; '.join(found)}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise TrainError(f"{path}: DeepSpeed refuses it: {error}") from None


def stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of a resolved dict."""
    return settings["zero_optimization"]["stage"]


def _read(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise TrainError(f"{path}: {', '.join(sorted(twice))}: given twice; keep one")
        return dict(pairs)

    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json")))
        raise TrainError(f"deepspeed: {path}: no such file; there are {known}")
    try:
        settings = json.loads(path.read_text(), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TrainError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise TrainError(f'{path}: zero_optimization: missing; it names the ZeRO stage, as {{"stage": 1}}')
    if settings["zero_optimization"].get("stage") not in (0, 1, 2, 3):
        raise TrainError(f"{path}: zero_optimization.stage: must be 0, 1, 2 or 3")
    for key in ("offload_param", "offload_optimizer"):
        if not isinstance(settings["zero_optimization"].get(key) or {}, dict):
            raise TrainError(f'{path}: zero_optimization.{key}: must be a section, as {{"device": "cpu"}}')
    return settings


def refuse_wrong_deepspeed(installed: str) -> None:
    """Raises TrainError for versions whose gradients are wrong."""
    if Version(installed) < Version(SOUND):
        raise TrainError(
            f"deepspeed {installed}: its ZeRO-2 gradients are wrong in bf16 where a module runs twice in a step (0.17.6 to "
            f"0.18.2: always); pip install 'deepspeed>={SOUND}'"
        )


def _refuse_traps(path: Path, settings: dict[str, Any], bf16: bool, fp16: bool, on_gpu: bool, averaged: bool) -> None:
    left = _find_auto(settings)
    if left:
        raise TrainError(f'{path}: {", ".join(left)}: "auto" cannot be filled here; write a value')
    half = settings.get("bf16", {}).get("enabled", False)
    autocast = settings.get("torch_autocast", {}).get("enabled", False)
    if stage(settings) == 0 and half:
        # Initialising the bf16 optimizer at stage 0 runs a real AdamW step before the first batch.
        raise TrainError(f"{path}: bf16: wrong results at ZeRO stage 0; use torch_autocast there, or stage 1")
    if stage(settings) == 0 and "data_types" in settings:
        raise TrainError(f"{path}: data_types: DeepSpeed has none of it at ZeRO stage 0; remove it")
    if autocast and stage(settings) > 0:
        raise TrainError(f"{path}: torch_autocast: gradients would be sent in bf16; use bf16 at ZeRO stages 1 to 3")
    if autocast and settings["torch_autocast"]["dtype"] != "bfloat16":
        raise TrainError(f"{path}: torch_autocast.dtype: must be bfloat16")
    unknown = settings.get("data_types", {}).keys() - {"grad_accum_dtype"}
    if unknown:
        raise TrainError(f"{path}: data_types: {', '.join(sorted(unknown))}: unknown key; known: grad_accum_dtype")
    if settings.get("data_types", {}).get("grad_accum_dtype") not in (None, "fp32", "bf16", "fp16"):
        raise TrainError(f"{path}: data_types.grad_accum_dtype: must be fp32, bf16 or fp16")
    for section in SWITCHES:
        if not isinstance(settings.get(section, {}).get("enabled", False), bool):
            raise TrainError(f"{path}: {section}.enabled: must be true or false")
    if not isinstance(settings.get("steps_per_print", 1), int):
        raise TrainError(f"{path}: steps_per_print: must be a number of steps")
    if bf16 and not half and not autocast:
        raise TrainError(f'{path}: bf16: missing, but precision is bf16; add "bf16": {{"enabled": "auto"}}')
    if fp16 and not on_gpu:
        raise TrainError("precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if fp16 and (stage(settings) == 0 or not settings.get("fp16", {}).get("enabled", False)):
        raise TrainError(f'{path}: fp16: not there, or at ZeRO stage 0; use stage 1, 2 or 3 with "fp16": {{"enabled": "auto"}}')
    zero = settings["zero_optimization"]
    offload = {key: zero.get(key) or {} for key in ("offload_param", "offload_optimizer")}
    if offload["offload_param"].get("device") == "nvme":
        raise TrainError(f"{path}: offload_param: checkpoints cannot take weights from NVMe; offload them to cpu")
    if offload["offload_optimizer"].get("device") == "nvme":
        if stage(settings) < 3 or not offload["offload_optimizer"].get("nvme_path"):
            raise TrainError(f"{path}: offload_optimizer: NVMe needs an nvme_path, and ZeRO stage 3")
        if averaged:
            raise TrainError(f"{path}: offload_optimizer: an average (ema.decay) needs the weights in memory; offload to cpu")
    for section, key in (("zero_optimization", "compute_grad_norm"), ("bf16", "check_grad_overflow")):
        if settings.get(section, {}).get(key) is False:
            raise TrainError(f"{path}: {section}.{key}: without it nobody sees gradients that are not finite; remove it")


def _find_auto(value: Any, key: str = "") -> list[str]:
    if value == "auto":
        return [key]
    if isinstance(value, dict):
        return [found for k, v in value.items() for found in _find_auto(v, f"{key}.{k}".lstrip("."))]
    return []
