"""Hosts before a run: what each tells of itself, and which of them do not fit."""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import python
from train import host_facts as host
from train.preflight import compared, differences, hosts_of_ranks, judge, parse_places, read_facts, table

HOSTS = ["n0", "10.0.0.1", "gpu-node.cluster", "n3", "n4"]
KEYS = ["revision", "code", "python", "torch", "driver", "gpus"]
JUNK = ["", "Welcome to n0 {quiet hours}", "srun: warning: {", '{"name": "n0"}', '{"name": "other", "problems": []}', "[1, 2]"]
LINE = {
    "name": "n0", "revision": "5f4c9ac", "code": "0123456789abcdef", "python": "3.11.7", "packages": {"torch": "2.15.0"},
    "driver": "570.1", "gpus": ["H100", "H100"], "free_gb": 100.0, "problems": [],
}  # fmt: skip


def line(name: str, **different) -> dict:
    """Facts of a host that is as all others; torch=... is its package."""
    packages = {**LINE["packages"], **({"torch": different.pop("torch")} if "torch" in different else {})}
    return {**LINE, "name": name, "packages": packages, **different}


def of_kind(name: str, kind: tuple[int, ...]) -> dict:
    """Facts that are told apart by `kind`: how often it was changed in each of KEYS."""
    values = {key: f"{key}{number}" for key, number in zip(KEYS, kind, strict=True)}
    return line(name, **values | {"gpus": [values["gpus"]] * 2})


# Few kinds, so that several hosts are often of one.
KINDS = st.sampled_from([(0,) * 6, *(tuple(int(j == i) for j in range(6)) for i in range(6))])


@given(kinds=st.lists(KINDS, min_size=1, max_size=5), noise=st.lists(st.sampled_from(JUNK), max_size=6), data=st.data())
@settings(max_examples=200)
def test_those_out_of_the_largest_group_are_unfit(kinds, noise, data):
    hosts = HOSTS[: len(kinds)]
    silent = data.draw(st.sets(st.sampled_from(hosts)))
    local = data.draw(st.sets(st.sampled_from(hosts)))  # hosts whose folder is their own
    kind_of = dict(zip(hosts, kinds, strict=True))
    told = [json.dumps(of_kind(name, kind_of[name])) for name in hosts if name not in silent]
    # An earlier line of the same host, which is no longer true, and lines of others.
    outdated = [json.dumps(line(name, problems=["busy"])) for name in hosts if name not in silent]
    text = "\n".join([*outdated, *data.draw(st.permutations(told + noise))])

    answered = [name for name in hosts if name not in silent]
    sizes = [sum(kind_of[other] == kind_of[name] for other in answered) for name in answered]
    right = kind_of[answered[sizes.index(max(sizes))]] if answered else None
    expected = {name for name in hosts if name in silent or name in local or kind_of[name] != right}

    places = dict.fromkeys(hosts, 2)
    answers = read_facts(text, hosts)
    unfit = judge(answers, places, set(hosts) - local, Path("out"))
    assert set(unfit) == expected and list(unfit) == [name for name in hosts if name in expected]
    for name in unfit:
        assert ("gave no answer" in " ".join(unfit[name])) == (name in silent)
        assert ("no shared folder" in " ".join(unfit[name])) == (name in local - silent)
    named = {row.split()[0] for row in table(compared(answers, places))}
    assert named == {key for i, key in enumerate(KEYS) if len({kind_of[name][i] for name in answered}) > 1}


def test_of_two_hosts_the_first_is_right():
    values = compared({"n1": line("n1"), "n0": line("n0", torch="2.11.0", driver="")}, {"n0": 1, "n1": 1})
    assert differences(values)["n0"] == []
    packages, driver = differences(values)["n1"]
    assert packages.startswith("not as n0: torch; install") and driver.startswith("not as n0: driver; install")


def test_the_table_is_aligned_and_groups_the_hosts():
    answers = {"n0": line("n0"), "n1": line("n1", driver="560.28"), "n2": line("n2", torch="2.11.0")}
    values = compared(answers, parse_places("n0:1,n1:1,n2:1"))
    assert table(values) == [
        "torch    2.15.0 (n0, n1)   2.11.0 (n2)",
        "driver   570.1 (n0, n2)    560.28 (n1)",
    ]


def test_a_host_with_more_gpus_than_others_fits_when_it_has_more_processes():
    answers = {"n0": line("n0", gpus=["H100"] * 8), "n1": line("n1", gpus=["H100"] * 4)}
    assert not judge(answers, {"n0": 8, "n1": 4}, {"n0", "n1"}, Path("out"))
    answers["n1"] = line("n1", gpus=["H100"] * 3 + ["A100"])
    assert "gpus" in judge(answers, {"n0": 8, "n1": 4}, {"n0", "n1"}, Path("out"))["n1"][0]


def test_places():
    assert hosts_of_ranks(parse_places("n1:2,10.0.0.1:1")) == ["n1", "n1", "10.0.0.1"]
    for wrong in ("", "n0", "n0:0", "n0:x", "n0:1,", "n0:1,n0:2", "../n0:1", "a b:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="no host|twice|whole number|does not tell"):
            parse_places(wrong)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--places", "n0:1,"], "argument --places: "),
        ([], "the following arguments are required: --places"),
        (["--places", "n0:1"], ""),
    ],
)
def test_bad_arguments_are_told_in_a_line(tmp_path, arguments, what):
    done = python("-m", "train.preflight", "compare", tmp_path / "no_file", "--output-dir", tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {what or tmp_path / 'no_file'}")
    assert done.stderr.count("\n") == 1 and not done.stdout


def ask(folder: Path, name: str = "n1", slots: int = 1, **environment: str) -> dict:
    """What this machine tells of itself."""
    done = python("-m", "train.preflight", "facts", "--name", name, "--output-dir", folder, "--slots", slots, **environment)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stdout + done.stderr
    return json.loads(done.stdout)


def weigh(facts: list[dict], folder: Path, places: str, *arguments: object) -> subprocess.CompletedProcess:
    text = folder.parent / "facts.txt"
    text.write_text("".join(f"Last login: Friday\n{json.dumps(one)}\n" for one in facts))
    return python("-m", "train.preflight", "compare", text, "--places", places, "--output-dir", folder, *arguments)


def test_two_names_of_this_machine_fit_and_a_third_that_is_silent_does_not(tmp_path):
    folder, unfit = tmp_path / "run", tmp_path / "unfit"
    facts = [ask(folder, name, DS_ACCELERATOR="cpu") for name in ("n0", "gpu-node.cluster")]
    assert facts[0]["packages"]["torch"] == version("torch") and facts[0]["python"] == platform.python_version()
    assert facts[0]["problems"] == [] and facts[0]["gpus"] == [] and facts[0]["driver"] == ""
    done = weigh(facts, folder, "n0:1,gpu-node.cluster:1", "--unfit", unfit)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert done.stdout == f"preflight: 2 hosts fit: CPU, revision {facts[0]['revision']}\n"
    assert unfit.read_text() == "" and not list(folder.iterdir())

    facts = [ask(folder, "n0", DS_ACCELERATOR="cpu"), facts[1] | {"python": "3.12.1"}]  # the marker of the other is gone
    done = weigh(facts, folder, "n0:1,gpu-node.cluster:1,n2:4", "--unfit", unfit)
    assert done.returncode == 1 and unfit.read_text() == "gpu-node.cluster,n2"
    headline, row = done.stdout.splitlines()
    assert headline == "preflight: 2 of 3 hosts do not fit: gpu-node.cluster, n2"
    assert row == f"python   {facts[0]['python']} (n0)   3.12.1 (gpu-node.cluster)"
    shared, differs, silent = done.stderr.splitlines()
    assert shared.startswith(f"error: gpu-node.cluster: {folder} is no shared folder: ")
    assert differs.startswith("error: gpu-node.cluster: not as n0: python; ") and silent.startswith("error: n2: gave no answer; ")


def test_facts_name_packages_and_code(tmp_path, monkeypatch):
    for name in ("data", "launch"):
        (tmp_path / name).mkdir()
    (tmp_path / "requirements.txt").write_text("# torch\nnumpy>=1\nno_such_package\n")
    monkeypatch.setattr(host, "ROOT", tmp_path)
    versions = host.packages()
    assert versions["no_such_package"] == "missing" and versions["numpy"] == version("numpy")
    assert {name.rpartition("-")[0] for name in set(versions) - {"numpy", "no_such_package"}} <= {"nvidia-nccl"}
    assert host.revision() == ""
    seen = {host._code()}
    (tmp_path / "data" / "a.py").write_text("x")
    seen.add(host._code())
    (tmp_path / "data" / "a.py").rename(tmp_path / "launch" / "a.py")
    seen.add(host._code())
    (tmp_path / "launch" / "a.py").write_text("y")
    seen.add(host._code())
    (tmp_path / "launch" / "notes.txt").write_text("no source")
    assert len(seen) == 4 and host._code() in seen


def test_facts_are_there_without_slow_imports():
    code = "import sys, train.preflight; sys.exit(bool({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    assert python("-c", code).returncode == 0


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` with these rows on PATH: a function of the rows and a script that runs before."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def write(rows: list[str], first: str = "") -> None:
        script = tmp_path / "bin" / "nvidia-smi"
        answer = "\n".join(f"  echo '{row}'" for row in rows) or "  :"
        apps = "echo 'GPU-b, 4321'; echo 'GPU-b, 99'; echo 'GPU-a, 7'"
        script.write_text(f"#!/bin/sh\n{first}\ncase $1 in --query-compute-apps*) {apps} ;; *)\n{answer} ;; esac\n")
        script.chmod(0o755)

    return write


IDLE = ["0, GPU-a, NVIDIA H100 80GB HBM3, 570.1, 4, 0", "1, GPU-b, NVIDIA H100 80GB HBM3, 570.1, 900, 0"]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (IDLE, None),
        (
            [IDLE[0], "1, GPU-b, NVIDIA A10, 570.1, 20000, [N/A]"],
            "GPU 1 (NVIDIA A10) is not idle: 21.0 GB in use by processes 4321, 99; ",
        ),
        ([IDLE[0], IDLE[1][:-1] + "3"], "GPU 1 (NVIDIA H100 80GB HBM3) has 3 uncorrected ECC errors; "),
        (IDLE[:1], "has 1 GPUs, 2 are needed; "),
        ([*IDLE, "2, GPU-c, NVIDIA H100 80GB HBM3, 570.1, 70000, 5"], None),  # the run does not take it
        ([IDLE[0], "1, GPU-b, NVIDIA H100 80GB HBM3, 570.1, [GPU requires reset], 0"], "nvidia-smi says '1, GPU-b"),
        (["No devices were found"], "nvidia-smi says 'No devices were found'; "),
    ],
    ids=["idle", "busy", "ecc", "few", "more", "reset", "none"],
)
def test_gpus(tmp_path, nvidia_smi, rows, problem):
    nvidia_smi(rows)
    facts = ask(tmp_path / "run", slots=2, DS_ACCELERATOR="cuda")
    assert len(facts["problems"]) == (problem is not None), facts
    assert all(one.startswith(problem) for one in facts["problems"])
    if problem is None:
        assert facts["driver"] == "570.1" and facts["gpus"] == ["NVIDIA H100 80GB HBM3"] * len(rows)


def test_gpus_are_those_of_the_slurm_job(tmp_path, nvidia_smi):
    nvidia_smi([IDLE[0].replace(" 4,", " 50000,"), IDLE[1]])
    job = {"DS_ACCELERATOR": "cuda", "SLURM_JOB_ID": "7"}
    for visible in ("1", "GPU-b"):
        assert ask(tmp_path / "run", CUDA_VISIBLE_DEVICES=visible, **job)["problems"] == []
    assert "not idle" in ask(tmp_path / "run", CUDA_VISIBLE_DEVICES="1,0", slots=2, **job)["problems"][0]
    assert "has 1 GPUs" in ask(tmp_path / "run", CUDA_VISIBLE_DEVICES="1", slots=2, **job)["problems"][0]


def test_an_nvidia_smi_that_fails_or_hangs(tmp_path, nvidia_smi, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    nvidia_smi([], "echo 'Driver/library version mismatch' >&2; exit 18")
    (problem,) = ask(tmp_path / "run")["problems"]
    assert problem.startswith("nvidia-smi failed (Driver/library version mismatch); ")
    assert ask(tmp_path / "run", DS_ACCELERATOR="cpu")["problems"] == []

    nvidia_smi([], f"sleep 30 & echo $! >{tmp_path / 'pid'}; wait")
    monkeypatch.setattr(host, "PATIENCE", 0.5)
    monkeypatch.setattr(host, "revision", lambda: "")  # git may take longer
    started = time.monotonic()
    (problem,) = host.host_facts("n1", tmp_path / "run", 1)["problems"]
    assert problem.startswith("nvidia-smi has not answered for 0.5 s; ") and time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):  # nothing is left of it
        for _ in range(50):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_a_machine_without_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    (problem,) = host.host_facts("n1", tmp_path / "run", 1)["problems"]
    assert problem.startswith("there is no nvidia-smi; ") and "DS_ACCELERATOR=cpu" in problem


def test_an_output_folder_that_cannot_be_written_or_is_full(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    facts = ask(folder, DS_ACCELERATOR="cpu")
    (problem,) = facts["problems"]
    assert problem.startswith(f"{folder}: cannot be written (Not a directory); ") and facts["free_gb"] is None
    assert list(judge({"n1": facts}, {"n1": 1}, set(), folder).values()) == [[problem]]  # and not that it is not shared

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(host, "FREE_NEEDED", 1e9)
    facts = host.host_facts("n1", tmp_path / "run", 1)
    (problem,) = facts["problems"]
    assert problem.startswith(f"{tmp_path / 'run'}: {facts['free_gb']:.1f} GB are free, ") and facts["free_gb"] > 0
    assert (tmp_path / "run" / ".preflight_n1").read_bytes() == b""
