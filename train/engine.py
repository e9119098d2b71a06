"""The process's place in the job, and the DeepSpeed engine around the model."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# Before the import, which settles it. An empty one, which DeepSpeed would refuse, is none.
if not os.environ.get("DS_ACCELERATOR"):
    os.environ.pop("DS_ACCELERATOR", None)
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param

from model.segmenter import Segmenter
from train import TrainError
from train.config import Config
from train.deepspeed_config import stage
from train.optim import build_optimizer


@dataclass(frozen=True)
class Job:
    """Who this process is among the others, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in double precision."""
        if self.world_size == 1:  # without the way to the device and back, for which it would have to finish its work first
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of all ranks, in double precision, rank by rank."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        found = mine.new_empty(self.world_size * len(mine))
        dist.all_gather_into_tensor(found, mine)
        return found.view(self.world_size, -1).tolist()


def join_job() -> Job:
    """Join the processes that the launcher started, or make a job of one when there is no launcher."""
    if "RANK" not in os.environ:
        # Port 0 is any free one: nobody else has to know it.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = False  # fp32 is to be fp32: torch's default is to convolve in less
    else:
        local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))  # else the ranks fight for the cores
        # Compiling DeepSpeed's shared-memory collectives takes over a minute; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Job(dist.get_rank(), dist.get_world_size(), device)


def build_engine(model: Segmenter, config: Config, settings: dict) -> DeepSpeedEngine:
    """The engine of a resolved DeepSpeed dict. The model is whole on every rank beforehand.

    `zero.Init` around a timm model would silently change its initialisation, so the model is built plainly, on the CPU,
    and DeepSpeed partitions it from there. Raises TrainError for settings that DeepSpeed refuses only now.
    """
    optimizer = build_optimizer(model, config.optimizer)
    if stage(settings) == 0:
        optimizer.clip_norm = config.optimizer.clip_norm
        settings = settings | {"gradient_clipping": 0.0}
    # Its warning is of an optimizer that it does not know: tests/test_stages.py compares ours with PyTorch's at every stage.
    deepspeed_logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    gc.freeze()  # its bf16 optimizer collects garbage twice for each group: half a minute of looking through all of PyTorch
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    except (AssertionError, ValueError, ZeRORuntimeException) as error:
        raise TrainError(f"{config.deepspeed}: DeepSpeed refuses it: {str(error).strip() or type(error).__name__}") from error
    finally:
        gc.unfreeze()
    _limit_collectives(config.timeout_minutes)
    return engine


def _limit_collectives(minutes: float) -> None:
    """ZeRO's process groups do not take over the timeout that `init_distributed` is given."""
    limit = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout  # its name until torch 2.14
    for group in list(distributed_c10d._world.pg_map):
        limit(timedelta(minutes=minutes), group)


def forget_gradients(engine: DeepSpeedEngine) -> None:
    """To be called after each optimizer step. A step that ZeRO-1 and 2 pass over with the optimizer offloaded would else leave
    its sums of gradients, which are not finite, for the next step to add to: all others would be passed over as well."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None


def gather_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """All parameters in fp32 on the CPU, by name: the optimizer's masters, at any ZeRO stage, and the frozen ones as they
    are. Every rank must call it; ranks other than 0 get an empty dict."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # None without ZeRO, and for a frozen one
        with deepspeed.zero.GatheredParameters([parameter], enabled=full is None):
            if dist.get_rank() == 0:
                weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
    return weights
