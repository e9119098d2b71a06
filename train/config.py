"""One experiment: a YAML file and `key=value` overrides, checked as a whole before anything is allocated."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from data.augment import AugmentConfig
from data.mixture import Mixture, MixtureEntry
from data.order import Order
from model.archs import ARCHS, get_arch
from train import TrainError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel, frozen=True, extra="forbid"):
    """Unknown keys are errors: a misspelt one would otherwise train with the default in silence."""


class DataConfig(_Section):
    train: tuple[MixtureEntry, ...] = Field(
        min_length=1,
        description="shard folder or URL of the training split (holds index.json), or several: [{path, weight, label_map}]",
    )
    val: str | None = Field(None, description="the validation split; none: no evaluation")
    workers: int = Field(4, ge=0, description="loader processes for each GPU; 0 loads in the training process")
    window: int | None = Field(
        None, gt=0, lt=2**32, description="shuffle within so many samples, for network disks; null: uniformly over all"
    )
    rare_share: float | None = Field(
        None, gt=0, le=1, description="images with a class that fewer than this share of all images show come more often"
    )
    max_bad_fraction: Fraction = Field(0.001, description="of all samples; so many may be damaged before the run ends")
    cache: Path | None = Field(None, description="where remote shards are kept; null: SAPIENS_SEG_CACHE or ~/.cache")
    cache_gigabytes: float = Field(50.0, gt=0, le=1e6)

    @field_validator("train", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, train: Any) -> Any:
        return ({"path": train},) if isinstance(train, str) else train


class ModelConfig(_Section):
    arch: str = Field(description=f"one of {', '.join(ARCHS)}")
    image_size: tuple[PositiveInt, PositiveInt] = Field((1024, 768), description="height, width")
    patch_padding: int = Field(2, ge=0, description="of the patch convolution: 2 as pre-trained, LIP, CIHP; 0 face, Goliath")
    dropout: Fraction = Field(0.1, description="of the head's channels")
    recompute: bool = Field(False, description="recompute every block in the backward pass: less memory, a third more work")

    @field_validator("arch")
    @classmethod
    def _known(cls, name: str) -> str:
        return get_arch(name).name


class OptimizerConfig(_Section):
    lr: PositiveFloat = 5e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(0.1, ge=0, description="not applied to 1-D tensors, biases and pos_embed")
    layer_decay: float = Field(0.85, gt=0, le=1, description="lr factor from each layer to the one below it")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")


class ScheduleConfig(_Section):
    epochs: PositiveFloat | None = Field(None, description="length of the run; give this or `steps`")
    steps: PositiveInt | None = Field(None, description="length of the run in optimizer steps")
    warmup_steps: int = Field(400, ge=0)
    warmup_factor: float = Field(1e-3, ge=0, le=1, description="lr factor of the first warm-up step")

    @model_validator(mode="after")
    def _one_length(self) -> "ScheduleConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of `epochs` and `steps` (set the other to null)")
        return self


class LossConfig(_Section):
    class_weights: Literal["none", "auto", "label_set"] | list[float] = Field(
        "none",
        description="auto: from the pixel counts in the shards' index, so that small parts are learnt soon; label_set: its own",
    )


class CheckpointConfig(_Section):
    every_steps: PositiveInt = 1000
    keep: PositiveInt = Field(2, description="the newest so many stay on disk")


class EvaluateConfig(_Section):
    every_steps: PositiveInt | None = Field(None, description="null: at the end only")
    batch_size: PositiveInt = Field(4, description="images for each GPU")
    pictures: int = Field(8, ge=0, description="examples on the contact sheet")


class WandbConfig(_Section):
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "sapiens-seg"
    entity: str | None = None


class Config(_Section):
    """See README.md and train/configs/."""

    seed: int = Field(0, ge=0, lt=2**32)
    output_dir: Path = Field(Path("outputs/run"), description="checkpoints, logs, pictures; the same folder resumes")
    resume_from: Path | None = Field(None, description="a run's output_dir, or one checkpoint in it, to continue from")
    load_from: Path | None = Field(None, description="weights to start from: .pth or .safetensors")
    deepspeed: Path = Field(Path("ds_configs/zero1.json"), description="memory and communication settings")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    global_batch_size: PositiveInt = Field(description="samples in one optimizer step, over all GPUs")
    micro_batch_size: PositiveInt = Field(description="samples a GPU holds at a time; accumulation follows")
    log_every: PositiveInt = 10
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    wandb: WandbConfig = WandbConfig()

    def accumulation(self, world_size: int) -> int:
        """Micro batches of a GPU in one step. Raises TrainError when the batch does not divide."""
        together = self.micro_batch_size * world_size
        if self.global_batch_size % together:
            raise TrainError(
                f"global_batch_size: {self.global_batch_size} does not divide by micro_batch_size x processes = "
                f"{self.micro_batch_size} x {world_size} = {together}; choose a multiple of {together}"
            )
        return self.global_batch_size // together

    def total_steps(self, epoch_length: int) -> int:
        """Optimizer steps of the whole run, of so many samples an epoch."""
        if self.schedule.steps is not None:
            return self.schedule.steps
        return max(1, -(-round(self.schedule.epochs * epoch_length) // self.global_batch_size))


def training_order(config: Config, train: Mixture) -> Order:
    """Which sample each position of the run takes."""
    return train.order(config.seed, config.data.window, config.data.rare_share)


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read the YAML at `path`, apply `a.b=value` overrides, check all keys. Raises TrainError naming them all at once."""
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("train/configs").glob("*.yaml")))
        raise TrainError(f"{path}: no such config; there are {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TrainError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise TrainError(f"{path}: holds no `key: value` lines")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise TrainError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise TrainError(f"override {override!r}: write key=value, for example optimizer.lr=1e-4")
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise TrainError(f"override {override!r}: {section} is a value, not a section")
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise TrainError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None


def _describe(error: dict[str, Any]) -> str:
    """One pydantic finding with its dotted key; an unknown key comes with the known ones of its section."""
    loc = [part for part in error["loc"] if not str(part).startswith(("list[", "literal["))]  # the branches of a union
    key = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        model: Any = Config
        for part in loc[:-1]:
            model = MixtureEntry if isinstance(part, int) else model.model_fields[part].annotation
        return f"{key}: unknown key; known here: {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    return f"{key}: {message}" + (f", not {given!r}" if isinstance(given, str | int | float | bool | None) else "")
