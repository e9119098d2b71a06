"""The commands of docs/clusters.md, on a real Slurm and on two hosts with ssh."""

import re
import shutil
from pathlib import Path

import pytest

from model.weight_files import read_metadata
from tests.cluster.conftest import SSH_PORT
from tests.documents import commands, make_world, run

PAGE = "docs/clusters.md"
# Of this cluster, not of the page: no GPUs, and two nodes with a process each.
VARIABLES = {
    "DS_ACCELERATOR": "cpu", "NUM_NODES": "2", "GPUS_PER_NODE": "1", "CPUS_PER_GPU": "1", "CPUS_PER_TASK": "1",
    "SSH_PORT": str(SSH_PORT), "PREFLIGHT": "0",  # the page's first command does that
}  # fmt: skip


@pytest.fixture
def world(tmp_path) -> Path:
    """With the faces packed, and not trained."""
    make_world(tmp_path)
    packing = "python -m data.build_shards --dataset facesynthetics --root path/to/dataset_100 --out shards/face"
    code, output = run(["bash", "-c", packing], tmp_path)
    assert code == 0, output
    return tmp_path


def of_page(*starts: str) -> list[str]:
    return [command for command in commands(PAGE) if command.startswith(starts)]


def test_every_command_is_run_by_one_of_these_tests():
    assert commands(PAGE) == of_page("HOSTFILE=") + of_page("CONFIG=") + of_page("TASKS=")


def test_those_of_two_hosts(hosts, world):
    shutil.copy(hosts.hostfile(1), world / "hostfile")
    for command in of_page("HOSTFILE="):
        shutil.rmtree(world / "outputs", ignore_errors=True)  # else the second training would have nothing to do
        words = ["bash", "-c", command.replace("worker-3", hosts.addresses[1])]
        code, output = run(hosts.command(0, *words), world, **VARIABLES, **hosts.environment)
        assert code == 0, f"{command}\n{output}"
        if "multinode.sh" in command:
            assert f"{1 if 'EXCLUDE' in command else 2} x cpu" in output, output
            assert read_metadata(world / "outputs/face_1b/model.safetensors")["step"] > 1


@pytest.mark.parametrize("start", ["CONFIG=", "TASKS="])
def test_those_of_slurm(slurm, world, start):
    slurm.run("scontrol", "update", "PartitionName=main", "MaxTime=2-0")
    for command in of_page(start):
        code, output = run(["bash", "-c", command], world, **VARIABLES, **slurm.environment)
        assert code == 0, f"{command}\n{output}"
        jobs = re.findall(r"^job (\d+)", output, re.MULTILINE)
        assert jobs or "--dry-run" in command, output
        for job in jobs:
            slurm.wait(job, "COMPLETED")
    left = {"CONFIG=": "outputs/face_1b/model.safetensors", "TASKS=": "shards/lip/train/index.json"}
    assert (world / left[start]).is_file()
