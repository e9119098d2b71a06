"""The design's rules about the code itself."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {"data": {"data"}, "model": {"model"}, "train": {"train", "data", "model"}}
# Not all of ROOT: DeepSpeed leaves a script in a run's checkpoints, under outputs/.
FOLDERS = ("data", "model", "train", "tests", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names & {"data", "model", "train", "tests", "benchmarks"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_in_the_designs_direction(package):
    files = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == package]
    assert files
    for path in files:
        assert imported_packages(path) <= MAY_IMPORT[package], path


def test_no_file_over_300_lines():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long


@pytest.mark.parametrize(
    ("script", "names"),
    [
        ("node.sh", "CONFIG DEVICES OUTPUT_DIR TRAIN_BATCH_SIZE_PER_GPU RESUME_FROM LOAD_FROM debug"),
        ("multinode.sh", "CONFIG OUTPUT_DIR TRAIN_BATCH_SIZE_PER_GPU RESUME_FROM LOAD_FROM HOSTFILE INCLUDE SSH_PORT PASS_ENV"),
        ("slurm.sh", "CONFIG OUTPUT_DIR TRAIN_BATCH_SIZE_PER_GPU NUM_NODES GPUS_PER_NODE CONDA_ENV PARTITION TIME --dry-run"),
        ("preflight.sh", "HOSTFILE OUTPUT_DIR"),
        ("shards.sh", "TASKS PARTITION --root --out"),
    ],
)
def test_launch_scripts_explain_themselves(script, names):
    path = ROOT / "launch" / script
    text = subprocess.run([path, "--help"], check=True, capture_output=True, text=True).stdout
    assert not [name for name in names.split() if name not in text]
