"""The first sum of all processes of a run, in real processes."""

import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import PATIENCE, ROOT
from train.preflight import hosts_of_ranks, parse_places
from train.trial_sum import bus_bandwidth, main, wait_for_port, wrong_clocks

HOSTS = ["n0", "10.0.0.1", "gpu-node.cluster", "n3", "n4"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank(number: int, places: str, port: int, *arguments: object, first: str = "") -> subprocess.Popen:
    """One process of a trial sum, in which the Python code `first` runs before it."""
    place = {"RANK": number, "LOCAL_RANK": 0, "WORLD_SIZE": len(hosts_of_ranks(parse_places(places)))}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, "-c", f"{first}\nfrom train.trial_sum import main; main()", "--places", places, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {name: str(value) for name, value in place.items()},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Exit code and output of each, which all end by themselves."""
    try:
        return [(output := process.communicate(timeout=PATIENCE)) and (process.returncode, *output) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_sum():
    port = free_port()
    first, second = ended(*(rank(i, "n0:1,n1:1", port, "--megabytes", 8) for i in range(2)))
    assert first[0] == second[0] == 0 and first[2] == second[2] == second[1] == "", (first, second)
    assert re.fullmatch(r"all-reduce of 8 MB over 2 processes: \S+ s, (\d+\.\d) GB/s bus bandwidth\n", first[1])


def test_a_sum_and_a_clock_that_are_wrong_are_named(tmp_path):
    port = free_port()
    later = "import time; now = time.time; time.time = lambda: now() + 12"
    wrong = "import torch.distributed as dist; dist.all_reduce = lambda values: values.add_(5)"
    first, second = ended(
        *(
            rank(i, "n0:1,n1:1", port, "--megabytes", 1, "--unfit", tmp_path / "unfit", first=code)
            for i, code in ((0, wrong), (1, f"{later};{wrong}"))
        )
    )
    assert sorted((tmp_path / "unfit").read_text().split(",")) == ["", "n0", "n1"]
    assert first[0] == second[0] == 1 and second[1:] == ("", "")
    sums, more, clock = first[2].splitlines()
    assert sums.startswith("error: rank 0 (n0): the sums of 1 MB are wrong; ") and more.startswith(
        "error: rank 1 (n1): the sums "
    )
    assert clock.startswith("error: n1: its clock is 12 s ahead; ")


def test_one_rank_of_two_does_not_come(tmp_path):
    unfit = tmp_path / "unfit"
    ((code, output, told),) = ended(rank(0, "n0:1,n1:1", free_port(), "--timeout", 3, "--unfit", unfit))
    assert unfit.read_text() == "n1,"
    assert code == 1 and not output and told.startswith("error: rank 1 (n1) did not come within 3 s; ") and told.count("\n") == 1


def test_ranks_that_do_not_come_are_named():
    port, other, wrong = free_port(), free_port(), free_port()
    few = [rank(i, "n0:1,n1:1,n2:2", port, "--timeout", 6) for i in range(2)]  # one may be slower to start than the other
    lost = rank(1, "n0:1,n1:1", other, "--timeout", 3)
    with socket.socket() as taken:
        taken.bind(("", wrong))
        taken.listen()
        ((code, output, told),) = ended(rank(0, "n0:1,n1:1", wrong, "--timeout", 3))
        assert code == 1 and told.startswith(f"error: rank 0 (n0): cannot be met at 127.0.0.1:{wrong}; ") and not output
    first, second, lost = ended(*few, lost)
    assert first[0] == second[0] == lost[0] == 1
    assert first[2].startswith("error: ranks 2, 3 (n2) did not come within 6 s; ") and first[2].count("\n") == 1
    assert second[2] == ""  # rank 0 has said it
    assert lost[2].startswith(f"error: rank 1 (n1): cannot reach 127.0.0.1:{other} within 3 s: firewall, or the wrong ")
    assert lost[2].count("\n") == 1


def test_a_rank_that_comes_and_does_not_sum_ends_the_others_in_time():
    port = free_port()
    process = rank(0, "n0:1,n1:1", port, "--timeout", 5)
    wait_for_port("127.0.0.1", port)
    store = dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=30), wait_for_workers=False)
    store.set("rank 1", "is here")
    assert store.get("all are here") == b"yes"
    started = time.monotonic()
    ((code, _, told),) = ended(process)
    assert code == 1 and time.monotonic() - started < 20
    assert told.startswith("error: rank 0 (n0): the sums fail, or take over 5 s: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({}, "rank 0 of WORLD_SIZE 2: --places has 1 "),
        ({"MASTER_PORT": "99999"}, r"\{.*'MASTER_PORT': '99999'\}: must be "),
        ({"WORLD_SIZE": "two"}, r"\{.*'WORLD_SIZE': 'two'.*\}: must be "),
    ],
)
def test_variables_that_do_not_fit_are_refused(monkeypatch, capsys, variables, what):
    own = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in (own | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["trial_sum", "--places", "n0:1"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and re.fullmatch(rf"error: {what}.*\n", capsys.readouterr().err)


def test_variables_that_are_not_set_are_named(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(sys, "argv", ["trial_sum", "--places", "n0:1"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR: not set; ")


@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_a_clock_that_is_off_is_named(count, slots, data):
    hosts = [name for name in HOSTS[:count] for _ in range(slots)]
    off = data.draw(st.sampled_from(HOSTS[:count]))
    seconds = data.draw(st.integers(-90_000, 90_000))
    clocks = [1.7e9 + 0.01 * i + (seconds if name == off else 0) for i, name in enumerate(hosts)]
    told = wrong_clocks(clocks, hosts)
    # With two hosts the first is right, whichever was changed.
    named, by = (HOSTS[1], -seconds) if count == 2 and off == HOSTS[0] else (off, seconds)
    if abs(seconds) > 6 and count > 1:
        ((host, sentence),) = told.items()
        assert host == named
        way, amount = re.match(rf"{re.escape(named)}: its clock is (\d+) s (ahead|behind); ", sentence).group(2, 1)
        assert way == ("ahead" if by > 0 else "behind") and abs(int(amount) - abs(by)) <= 1
    elif abs(seconds) < 4 or count == 1:
        assert told == {}


def test_bandwidth_is_counted_as_in_nccl_tests():
    assert bus_bandwidth(64_000_000, 0.03, 4) == pytest.approx(64e6 / 0.03 * 1.5 / 1e9)
    assert bus_bandwidth(64_000_000, 0.03, 1) == 0
