"""The process's place in the job, and the DeepSpeed engine around the model."""

import gc
import os
import threading
import time
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import, which settles it

import deepspeed
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param, safe_set_local_fp32_param
from pydantic import ValidationError

from model.segmenter import Segmenter
from train import TrainError
from train.config import Config
from train.optim import build_optimizer, parameter_groups


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
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def join_job() -> Job:
    """Join the processes that the launcher started, or make a job of one when there is no launcher."""
    if "RANK" not in os.environ:
        # Port 0 is any free one: nobody else has to know it.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        local_size = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))  # else the ranks fight for the cores
        # Compiling DeepSpeed's shared-memory collectives takes over a minute; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    _leave_with_the_launcher()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Job(dist.get_rank(), dist.get_world_size(), device)


def _leave_with_the_launcher() -> None:
    """End this process within a second of its launcher's: `deepspeed` that gets a SIGTERM leaves its ranks running."""
    launchers = [process for process in psutil.Process().parents()[:2] if _is_launcher(process)]

    def watch() -> None:
        while all(map(_is_launcher, launchers)):
            time.sleep(1)
        os._exit(143)

    if launchers:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _is_launcher(process: psutil.Process) -> bool:
    """Whether it is alive and one of DeepSpeed's: another parent may well end before its training does."""
    try:
        command = process.cmdline()  # empty for a zombie
        return process.is_running() and any(
            os.path.basename(part) == "deepspeed" or part.startswith("deepspeed.launcher.") for part in command[:5]
        )
    except psutil.Error:
        return False


def build_engine(model: Segmenter, config: Config, settings: dict, job: Job) -> DeepSpeedEngine:
    """The engine of a resolved DeepSpeed dict. The model is whole on every rank beforehand.

    `zero.Init` around a timm model would silently change its initialisation, so the model is built plainly, on the CPU,
    and DeepSpeed partitions it from there. Raises TrainError for a key that DeepSpeed does not know.
    """
    optimizer = build_optimizer(parameter_groups(model, config.optimizer), config.optimizer, job.on_gpu)
    gc.freeze()  # its bf16 optimizer collects garbage twice for each group: half a minute of looking through all of PyTorch
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise TrainError(f"{config.deepspeed}: DeepSpeed refuses {found}") from None
    finally:
        gc.unfreeze()
    return engine


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


class Masters:
    """The fp32 weights that this rank's optimizer steps: all of them at ZeRO stage 0, else its part."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.stage, self.optimizer = engine.zero_optimization_stage(), engine.optimizer
        self.parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def read(self) -> list[torch.Tensor]:
        """One tensor for each parameter, or at stages 1 and 2 for each of the optimizer's groups: not copies."""
        if self.stage == 3:
            return [safe_get_local_fp32_param(parameter).detach() for parameter in self.parameters]
        return [master.detach() for group in self.optimizer.param_groups for master in group["params"]]

    def write(self, values: list[torch.Tensor]) -> None:
        """Set them, and the model's weights after them as an optimizer step does. Every rank must call it."""
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # lets go of the small parameters, which stay gathered
            for parameter, value in zip(self.parameters, values, strict=True):
                safe_set_local_fp32_param(parameter, value)
                parameter.ds_tensor.data.copy_(value)
            self.optimizer.checkpoint_event_epilogue()  # and gathers them anew
            return
        for master, value in zip(self.read(), values, strict=True):
            master.copy_(value)
        if self.stage > 0:
            self.optimizer.update_lp_params()
