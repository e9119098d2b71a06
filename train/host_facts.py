"""What this host is, and what is wrong with it: the facts that train.preflight compares. Imports nothing slow."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train import TrainError

ROOT = Path(__file__).parent.parent
SOURCE_FOLDERS = ("data", "model", "train", "launch", "ds_configs")
SOURCE_SUFFIXES = (".py", ".yaml", ".json", ".sh")
PATIENCE = 10.0  # seconds that nvidia-smi and git have
GPU_IN_USE = 1.0  # GB, from which on a GPU is not idle
FREE_NEEDED = 5.0  # GB, for the first checkpoint and the log
GPU_FIELDS = "index,uuid,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"


def marker(name: str) -> str:
    """The name of the empty file that a host leaves in the output folder: who else sees it shares the folder."""
    return f".preflight_{name}"


def host_facts(name: str, output_dir: Path, slots: int) -> dict:
    """What this host is and what is wrong with it, as `compare` wants it. Leaves `.preflight_NAME` in the output folder.

    Args:
        slots: processes that the run starts here, one for each GPU.
    """
    free, problems = _folder(output_dir, name)
    driver, gpus = "", []
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        try:
            found = _gpus()
            driver, gpus = (found[0].driver if found else ""), [gpu.name for gpu in found]
            problems += _gpu_problems(found, slots)
        except TrainError as error:
            problems.append(str(error))
    return {
        "name": name, "revision": revision(), "code": _code(), "python": platform.python_version(), "packages": packages(),
        "driver": driver, "gpus": gpus, "free_gb": free, "problems": problems,
    }  # fmt: skip


def _folder(folder: Path, name: str) -> tuple[float | None, list[str]]:
    """The free space in GB, None when the folder cannot be written; and its problems."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / marker(name)).write_bytes(b"")
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return None, [f"{folder}: cannot be written ({error.strerror}); mount it there, or take another OUTPUT_DIR"]
    if free < FREE_NEEDED:
        needed = f"{free:.1f} GB are free, {FREE_NEEDED:.0f} GB are needed"
        return round(free, 1), [f"{folder}: {needed}; clear the disk, or take another OUTPUT_DIR"]
    return round(free, 1), []


def _output(*command: str) -> str:
    """What a command prints. Raises TrainError when it fails or hangs, FileNotFoundError when there is none."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, told = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and not waited for: what hangs in a driver does not die
        raise TrainError(f"{command[0]} has not answered for {PATIENCE:g} s; reset the GPUs, or restart the host") from None
    if process.returncode:
        first = next(iter((output + told).split("\n")))
        raise TrainError(f"{command[0]} failed ({first.strip() or process.returncode}); repair the driver, or restart the host")
    return output


def revision() -> str:
    """The commit of this code, marked when it was changed; empty outside git."""
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    with suppress(TrainError, OSError):
        return _output("git", "--no-optional-locks", "-C", str(ROOT), *describe).strip()
    return ""


def _code() -> str:
    """A checksum over the names and contents of all source files."""
    paths = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES]
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def packages() -> dict[str, str]:
    """The versions of what requirements.txt names and of NCCL, whose package is named after its CUDA."""
    names = re.findall(r"^[A-Za-z0-9][\w.-]*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    versions = dict.fromkeys(names, "missing")
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    for package in importlib.metadata.distributions():
        if (package.name or "").startswith("nvidia-nccl-"):
            versions[package.name] = package.version
    return versions


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    driver: str
    used: float  # GB
    ecc_errors: float  # uncorrected, since the driver was loaded


def _gpus() -> list[Gpu]:
    """The GPUs that the run may take, by nvidia-smi; none without it. Raises TrainError when it does not work."""
    try:
        output = _output("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits")
    except OSError:
        return []
    gpus = [_gpu(line) for line in output.splitlines() if line.strip()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or "SLURM_JOB_ID" not in os.environ:  # DeepSpeed's launcher does not look at it, Slurm's jobs do
        return gpus
    wanted = [word.strip() for word in visible.split(",") if word.strip()]
    return [gpu for word in wanted for gpu in gpus if word == str(gpu.index) or gpu.uuid.startswith(word)]


def _gpu(line: str) -> Gpu:
    fields = [field.strip() for field in line.split(",")]
    try:
        index, uuid, name, driver = fields[:4]
        # N/A: a GPU without ECC, or one that shares the CPU's memory. Anything else is an error's name.
        used, errors = (0.0 if field in ("[N/A]", "[Not Supported]") else float(field) for field in fields[4:])
        return Gpu(int(index), uuid, name, driver, used * 2**20 / 1e9, errors)
    except ValueError:
        raise TrainError(f"nvidia-smi says '{line.strip()}'; reset that GPU, or restart the host") from None


def _gpu_problems(gpus: list[Gpu], slots: int) -> list[str]:
    problems = []
    if not gpus and not shutil.which("nvidia-smi"):
        return ["there is no nvidia-smi; install the GPU's driver, or set DS_ACCELERATOR=cpu to train on the CPUs"]
    if len(gpus) < slots:
        problems.append(f"has {len(gpus)} GPUs, {slots} are needed; give it fewer slots, or see nvidia-smi for those missing")
    for gpu in gpus[:slots]:  # those that the run takes
        which = f"GPU {gpu.index} ({gpu.name})"
        if gpu.used > GPU_IN_USE:
            problems.append(f"{which} is not idle: {gpu.used:.1f} GB in use{_users(gpu)}; end them, or leave the host out")
        if gpu.ecc_errors > 0:
            problems.append(f"{which} has {gpu.ecc_errors:.0f} uncorrected ECC errors; reset it (nvidia-smi -r) or replace it")
    return problems


def _users(gpu: Gpu) -> str:
    """The processes that use it, where nvidia-smi can tell: it cannot see out of a container."""
    pids = []
    with suppress(TrainError, OSError):
        rows = _output("nvidia-smi", "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader,nounits").splitlines()
        pids = [pid.strip() for uuid, _, pid in (row.partition(",") for row in rows) if uuid.strip() == gpu.uuid]
    return f" by processes {', '.join(pids)}" if pids else " by processes that nvidia-smi does not name"
