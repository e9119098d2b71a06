"""The DeepSpeed JSON, filled from the experiment and checked: DeepSpeed itself drops `"auto"` and unknown keys in silence."""

import json
from pathlib import Path
from typing import Any

from train import TrainError
from train.config import Config

# What a file in ds_configs/ may hold: memory and communication. The rest is the experiment's.
KNOWN_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "torch_autocast", "data_types", "communication_data_type",
    "prescale_gradients", "gradient_predivide_factor",
    "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state",
}  # fmt: skip
ELSEWHERE = {
    "optimizer": "set `optimizer` in the YAML",
    "scheduler": "set `schedule` in the YAML",
    "activation_checkpointing": "set `model.recompute` in the YAML",
    "fp16": "use bf16 (`precision` in the YAML)",
    "amp": "use bf16 (`precision` in the YAML)",
}


def resolve(config: Config, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, without an "auto" left. Raises TrainError naming file, key and remedy."""
    path = config.deepspeed
    settings = _read(path)
    for key in settings:
        if key not in KNOWN_KEYS:
            raise TrainError(f"{path}: {key}: {ELSEWHERE.get(key, 'unknown key; known: ' + ', '.join(sorted(KNOWN_KEYS)))}")
    for section in ("bf16", "torch_autocast", "data_types"):
        if not isinstance(settings.get(section, {}), dict):
            raise TrainError(f'{path}: {section}: must be a section, as {{"enabled": "auto"}}')
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        settings.setdefault(key, "auto")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
    values = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16.enabled": bf16,
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
    _refuse_traps(path, settings, bf16, config.ema.decay is not None)
    return settings


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
    except json.JSONDecodeError as error:
        raise TrainError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise TrainError(f"{path}: zero_optimization: missing; it names the ZeRO stage")
    if settings["zero_optimization"].get("stage") not in (0, 1, 2, 3):
        raise TrainError(f"{path}: zero_optimization.stage: must be 0, 1, 2 or 3")
    return settings


def _refuse_traps(path: Path, settings: dict[str, Any], bf16: bool, ema: bool) -> None:
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
    if bf16 and not half and not autocast:
        raise TrainError(f'{path}: bf16: missing, but precision is bf16; add "bf16": {{"enabled": "auto"}}')
    if ema and settings["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
        raise TrainError(f"{path}: offload_param: weights on NVMe cannot be averaged; offload to cpu, or set ema.decay=null")


def _find_auto(value: Any, key: str = "") -> list[str]:
    if value == "auto":
        return [key]
    if isinstance(value, dict):
        return [found for k, v in value.items() for found in _find_auto(v, f"{key}.{k}".lstrip("."))]
    return []
