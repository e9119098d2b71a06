"""One experiment: a YAML file and `key=value` overrides, checked as a whole before anything is allocated."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data.augment import AugmentConfig
from data.labels import reason
from data.mixture import Mixture, MixtureEntry
from data.order import Order
from data.yaml_files import Settings
from model.archs import ARCHS, get_arch
from train import TrainError
from train.config_files import file_of, merge, read_layers

Fraction = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Settings):
    train: tuple[MixtureEntry, ...] = Field(
        description="shard folder or URL of the training split (holds index.json), or several: [PATH, {path, weight, label_map}]",
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
        return (train,) if isinstance(train, str) else train

    @field_validator("train")
    @classmethod
    def _some(cls, train: tuple[MixtureEntry, ...]) -> tuple[MixtureEntry, ...]:
        if not train:  # min_length would also count entries that are at fault themselves as missing
            raise ValueError("names no shard set; give the folder or URL of one")
        return train


class ModelConfig(Settings):
    arch: str = Field(description=f"one of {', '.join(ARCHS)}, or timm:NAME")
    image_size: tuple[PositiveInt, PositiveInt] = Field((1024, 768), description="height, width")
    patch_padding: int | None = Field(
        None, ge=0, description="of the patch convolution: 0 for face and Goliath; null: as pre-trained, 2 for Sapiens v1"
    )
    rope_precision: Literal["bf16", "fp32"] = Field("bf16", description="Sapiens2's; bf16 is how it was pre-trained")
    dropout: Fraction = Field(0.1, description="of the head's channels")
    drop_path: Fraction = Field(0.0, description="stochastic depth: the last block's rate, growing from 0")
    recompute: Literal["none", "head", "attention", "mlp", "blocks"] | Annotated[int, Field(gt=1, strict=True)] = Field(
        "none",
        description="activations to compute again in the backward pass instead of keeping them: the head's; also every "
        "block's attention, or MLP; every block, or every n-th one",
    )
    freeze: Literal["backbone"] | Annotated[int, Field(ge=0, strict=True)] | None = Field(
        None, description="what does not learn: backbone, or the embeddings and so many of the first blocks; null: all learns"
    )

    @field_validator("arch")
    @classmethod
    def _known(cls, name: str) -> str:
        return get_arch(name).name

    @field_validator("freeze")
    @classmethod
    def _has_so_many_blocks(cls, freeze: str | int | None, info: ValidationInfo) -> str | int | None:
        if isinstance(freeze, int) and "arch" in info.data:
            depth = get_arch(info.data["arch"]).depth
            if freeze > depth:
                raise ValueError(f"{info.data['arch']} has {depth} blocks; give 0..{depth}, or backbone for all of it")
        return freeze


class OptimizerConfig(Settings):
    lr: PositiveFloat = 5e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: float = Field(0.1, ge=0, description="not applied to 1-D tensors, biases and pos_embed")
    layer_decay: float = Field(0.85, gt=0, le=1, description="lr factor from each layer to the one below it")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")


class ScheduleConfig(Settings):
    epochs: float | None = Field(None, gt=0, le=1e6, description="length of the run; give this or `steps`")
    steps: PositiveInt | None = Field(None, description="length of the run in optimizer steps")
    warmup_steps: int = Field(400, ge=0)
    warmup_factor: float = Field(1e-3, ge=0, le=1, description="lr factor of the first warm-up step")
    decay: Literal["linear", "linear_after_warmup", "cosine"] = Field(
        "linear", description="linear and cosine fall from the first step on, as Sapiens v1's; linear_after_warmup is Sapiens2's"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "ScheduleConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give one of `epochs` and `steps` (set the other to null)")
        return self


class LossConfig(Settings):
    class_weights: Literal["none", "auto", "label_set"] | list[float] = Field(
        "none",
        description="auto: from the pixel counts in the shards' index, so that small parts are learnt soon; label_set: its own",
    )
    label_smoothing: Fraction = Field(0.0, description="of the cross-entropy's targets, spread evenly over the classes")
    dice: float = Field(0.0, ge=0, le=1e3, description="weight of the soft Dice loss of the foreground classes")


class EmaConfig(Settings):
    decay: float | None = Field(
        None, gt=0, lt=1, description="of a moving average of the weights, which is validated and exported; null: none"
    )


class CheckpointConfig(Settings):
    every_steps: PositiveInt = 1000
    keep: PositiveInt = Field(2, description="the newest so many stay on disk")


class GuardConfig(Settings):
    skipped_in_a_row: int = Field(20, ge=0, description="so many steps without finite gradients are passed over before the end")
    spike_after: PositiveInt = Field(50, description="steps whose losses have to be seen before one can stand out")
    spike_deviations: PositiveFloat = Field(6.0, description="a loss so many standard deviations above the mean is told")
    hang_minutes: PositiveFloat | None = Field(
        10, description="a process that does one thing of a step for so long ends the run; null: never"
    )
    straggler_factor: float = Field(1.5, gt=1, description="a process that takes so many times as long as the others is told")
    data_share: float = Field(0.2, gt=0, le=1, description="of a step: more waiting for data is told")


class EvaluateConfig(Settings):
    every_steps: PositiveInt | None = Field(None, description="null: at the end only")
    batch_size: PositiveInt = Field(4, description="images for each GPU")
    pictures: int = Field(8, ge=0, description="images on each of the sheets: the first ones, the worst, the best")


class WandbConfig(Settings):
    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "sapiens-seg"
    entity: str | None = None
    finish_seconds: PositiveFloat = Field(60, description="how long the end of a run waits for wandb to send the rest")


class Config(Settings):
    """See README.md and train/configs/."""

    seed: int = Field(0, ge=0, lt=2**32)
    output_dir: Path = Field(Path("outputs/run"), description="checkpoints, logs, pictures; the same folder resumes")
    resume_from: Path | None = Field(None, description="a run's output_dir, or one checkpoint in it, to continue from")
    load_from: str | None = Field(
        None, description="weights to start from: .pth, .safetensors or hf-hub:OWNER/NAME[/FILE][@REVISION]"
    )
    load_partial: bool = Field(False, description="draw anew what the file lacks of the backbone, instead of refusing it")
    load_classes: bool = Field(True, description="where classes differ, take the head's rows of those with the same name")
    deepspeed: Path = Field(Path("ds_configs/zero1.json"), description="memory and communication settings")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    compile: bool = Field(False, description="torch.compile of every block; not with ZeRO-3")
    timeout_minutes: PositiveFloat = Field(30, description="a collective that takes longer ends the run")
    global_batch_size: PositiveInt = Field(description="samples in one optimizer step, over all GPUs")
    micro_batch_size: PositiveInt = Field(description="samples a GPU holds at a time; accumulation follows")
    log_every: PositiveInt = 10
    peak_tflops: PositiveFloat | None = Field(
        None, description="what one device can do at most, for MFU; null: as known of NVIDIA's larger GPUs in bf16 and fp16"
    )
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    loss: LossConfig = LossConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
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
    """The YAML at `path`, on top of the files that it names as its `base`, and below `a.b=value` overrides. Checks all keys.

    Raises TrainError naming the wrong ones all at once, and the file of each.
    """
    layers = read_layers(path, overrides)
    try:
        return Config.model_validate(merge(layers))
    except ValidationError as error:
        found: dict[Path, list[str]] = {}
        for problem in error.errors():
            found.setdefault(file_of(problem["loc"], layers), []).append(_describe(problem))
        raise TrainError("; ".join(f"{file}: {'; '.join(problems)}" for file, problems in found.items())) from None


def _describe(error: dict[str, Any]) -> str:
    """One pydantic finding with its dotted key; an unknown key comes with the known ones of its section."""
    branches = ("list[", "literal[", "constrained-")  # of a union
    loc = [part for part in error["loc"] if not str(part).startswith(branches)]
    key = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        model: Any = Config
        for part in loc[:-1]:
            model = MixtureEntry if isinstance(part, int) else model.model_fields[part].annotation
        return f"{key}: unknown key; known here: {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = reason(error)
    given = error["input"]
    return f"{key}: {message}" + (f", not {given!r}" if isinstance(given, str | int | float | bool | None) else "")
