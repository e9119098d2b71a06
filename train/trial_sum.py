"""python -m train.trial_sum --places n0:8,n1:8 [--megabytes 64] [--timeout 60] [--unfit FILE]

In every process of a job, as a launcher starts them: do all come, do their sums arrive, how fast, and do their hosts' clocks
agree? Without the model and DeepSpeed, so that a host or a network that does not work is named, within the timeout. Exit code:
0 when all is well, 1 when not, 2 for bad arguments.
"""

import argparse
import os
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before the import: it tells each failed connection with a stack trace

import torch
import torch.distributed as dist

from data.arguments import whole_number
from train.preflight import Parser, hosts_of_ranks, parse_places

ROUNDS = 5
CLOCKS_AGREE = 5.0  # seconds; logs and files of several hosts are put in order by their times
GRACE = 5.0  # seconds for rank 0's word, after the timeout
NETWORK = "firewall, or the wrong network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"


@dataclass(frozen=True)
class Member:
    """This process among the others."""

    rank: int
    hosts: list[str]  # of all ranks
    address: str  # of rank 0
    port: int
    device: torch.device
    timeout: float  # seconds, of each stage
    unfit: Path | None  # where the names of unfit hosts go

    @property
    def size(self) -> int:
        return len(self.hosts)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.hosts[self.rank]})"


def blame(member: Member, hosts: Iterable[str]) -> None:
    """Note unfit hosts in the file for them, with a comma behind each."""
    if member.unfit:
        with member.unfit.open("a") as file:
            file.write("".join(f"{host}," for host in hosts))


def leave(*messages: str) -> NoReturn:
    """At once: a thread of the process group may wait for what does not come."""
    for message in messages:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def within(seconds: float, message: str, end: Callable[[str], NoReturn] = leave) -> Iterator[None]:
    """Ends the process with the message when the block takes longer, or torch gives up in it. Collectives have timeouts of their
    own, but NCCL's end in an abort with a stack trace, and a store's connection takes up to three times its."""
    timer = threading.Timer(seconds, end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, OSError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        end(f"{message} [{told}]")
    finally:
        timer.cancel()


def wait_for_port(address: str, port: int) -> None:
    """Until somebody listens there. A store that comes before rank 0 would try again at ever longer intervals."""
    while True:
        with suppress(OSError):
            socket.create_connection((address, port), timeout=5).close()
            return
        time.sleep(0.2)


def meet(member: Member) -> dist.TCPStore:
    """The store at rank 0, when all ranks have come to it. Rank 0 names those that have not, and tells the others to leave."""
    where = f"{member.address}:{member.port}"
    cannot = f"{member}: cannot reach {where} within {member.timeout:g} s: {NETWORK}"
    if member.rank == 0:
        cannot = f"{member}: cannot be met at {where}; take a free MASTER_PORT, and for MASTER_ADDR an address of rank 0's host"
    with within(member.timeout, cannot):
        limit = timedelta(seconds=member.timeout + GRACE)
        if member.rank:
            wait_for_port(member.address, member.port)
        store = dist.TCPStore(member.address, member.port, member.size, member.rank == 0, limit, wait_for_workers=False)
        store.set(f"rank {member.rank}", "is here")
    if member.rank == 0:
        missing = _wait_for_all(member, store)
        store.set("all are here", "no" if missing else "yes")
        if missing:
            blame(member, {member.hosts[rank] for rank in missing})
            time.sleep(1)  # the others still ask the store
            leave(*missing_ranks(missing, member))
    else:
        with within(member.timeout + GRACE, f"{member}: {where} was reached, but went away; see what rank 0 says"):
            if store.get("all are here") != b"yes":
                leave()  # rank 0 names them
    return store


def _wait_for_all(member: Member, store: dist.TCPStore) -> list[int]:
    """The ranks that have not come within the timeout."""
    deadline = time.monotonic() + member.timeout
    missing = list(range(member.size))
    while missing and time.monotonic() < deadline:
        time.sleep(0.1)
        missing = [rank for rank in missing if not store.check([f"rank {rank}"])]
    return missing


def missing_ranks(missing: list[int], member: Member) -> list[str]:
    """A sentence for each host that ranks are missing from."""
    ranks = defaultdict(list)
    for rank in missing:
        ranks[member.hosts[rank]].append(str(rank))
    return [
        f"{'rank' if len(of_host) == 1 else 'ranks'} {', '.join(of_host)} ({host}) did not come within {member.timeout:g} s; see "
        f"what {host} says, and whether it reaches {member.address}:{member.port} (firewall), or leave it out"
        for host, of_host in ranks.items()
    ]


def bus_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """GB/s of an all-reduce of so many bytes, as nccl-tests count: what each link carries, whatever the number of ranks."""
    return size / seconds * 2 * (ranks - 1) / ranks / 1e9


def time_sums(member: Member, megabytes: int) -> tuple[float, bool]:
    """The median of the seconds that an all-reduce takes, after a first one, and whether all of this rank's sums were right."""
    values = torch.empty(megabytes * 250_000, device=member.device)  # of 4 bytes
    seconds, right = [], True
    for _ in range(1 + ROUNDS):
        values.fill_(member.rank + 1)
        _barrier(member)
        started = time.perf_counter()
        dist.all_reduce(values)
        _wait_for_device(member)
        seconds.append(time.perf_counter() - started)
        right = right and bool((values == member.size * (member.size + 1) / 2).all())
    return statistics.median(seconds[1:]), right


def _barrier(member: Member) -> None:
    dist.barrier()
    _wait_for_device(member)


def _wait_for_device(member: Member) -> None:
    if member.device.type == "cuda":
        torch.cuda.synchronize(member.device)


def gather(member: Member, right: bool) -> tuple[list[float], list[int]]:
    """Of all ranks, at the same moment: the seconds of the wall clock, and the ranks whose sums were wrong."""
    _barrier(member)
    mine = torch.tensor([time.time(), right], dtype=torch.float64, device=member.device)
    all_ranks = [torch.empty_like(mine) for _ in range(member.size)]
    dist.all_gather(all_ranks, mine)
    clocks, rights = torch.stack(all_ranks).cpu().T.tolist()
    return clocks, [rank for rank, good in enumerate(rights) if not good]


def wrong_clocks(clocks: list[float], hosts: list[str]) -> dict[str, str]:
    """{host: sentence} of those whose clock, in seconds, is far from the median of all hosts'. Both lists are of the ranks."""
    of_hosts = {host: statistics.median(c for c, h in zip(clocks, hosts, strict=True) if h == host) for host in hosts}
    middle = statistics.median_low(of_hosts.values()), statistics.median_high(of_hosts.values())
    true = min(middle, key=lambda clock: abs(clock - of_hosts[hosts[0]]))  # of two hosts the first is right
    return {
        host: f"{host}: its clock is {abs(clock - true):.0f} s {'ahead' if clock > true else 'behind'}; set it by NTP "
        "(timedatectl set-ntp true), or leave the host out"
        for host, clock in of_hosts.items()
        if abs(clock - true) > CLOCKS_AGREE
    }


def try_sums(member: Member, megabytes: int) -> None:
    """Join the process group and sum; tell on rank 0 how fast, or all that is wrong."""
    on_gpu = member.device.type == "cuda"
    if on_gpu:
        def own_fault(message: str) -> NoReturn:
            blame(member, [member.hosts[member.rank]])
            leave(message)

        told = f"{member}: its GPU does not start; see nvidia-smi there, or leave the host out"
        with within(member.timeout, told, own_fault):
            torch.cuda.set_device(member.device)
            torch.zeros(1, device=member.device)
    store = meet(member)
    with within(member.timeout, f"{member}: the sums fail, or take over {member.timeout:g} s: another rank ended, {NETWORK}"):
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=member.rank, world_size=member.size,
            timeout=timedelta(seconds=member.timeout + GRACE), device_id=member.device if on_gpu else None,
        )  # fmt: skip
        seconds, right = time_sums(member, megabytes)
        clocks, wrong = gather(member, right)
    problems = [
        f"rank {rank} ({member.hosts[rank]}): the sums of {megabytes} MB are wrong; leave the host out, or try NCCL_P2P_DISABLE=1"
        for rank in wrong
    ]
    clocks_off = wrong_clocks(clocks, member.hosts)
    problems += clocks_off.values()
    if member.rank == 0:
        told = f"{seconds:.2g} s, {bus_bandwidth(megabytes * 10**6, seconds, member.size):.1f} GB/s bus bandwidth"
        print(f"all-reduce of {megabytes} MB over {member.size} processes: {told}", flush=True)
    if problems:
        if member.rank == 0:
            blame(member, {member.hosts[rank] for rank in wrong} | clocks_off.keys())
        leave(*problems if member.rank == 0 else ())
    with within(member.timeout, f"{member}: the processes do not part"):
        dist.destroy_process_group()


def join(hosts: list[str], timeout: float, unfit: Path | None) -> Member:
    """This process's place by the launcher's variables. Raises ValueError for those that do not fit."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if absent := [name for name in names if name not in os.environ]:
        raise ValueError(f"{', '.join(absent)}: not set; a launcher starts this in every process")
    numbers = {name: os.environ[name] for name in names if name != "MASTER_ADDR"}
    if not all(number.isdecimal() for number in numbers.values()) or int(numbers["MASTER_PORT"]) >= 2**16:
        raise ValueError(f"{numbers}: must be whole numbers, the port below 65536")
    rank, size, local_rank, port = map(int, numbers.values())
    if size != len(hosts) or rank >= size:
        raise ValueError(f"rank {rank} of WORLD_SIZE {size}: --places has {len(hosts)} processes; make them the same")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(f"rank {rank} ({hosts[rank]}): LOCAL_RANK {local_rank}, but {count} GPUs; give it fewer slots")
        device = torch.device("cuda", local_rank)
    return Member(rank, hosts, os.environ["MASTER_ADDR"], port, device, timeout, unfit)


def main() -> None:
    parser = Parser(prog="python -m train.trial_sum", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=parse_places, required=True, help="host:processes,... in the order of the ranks")
    parser.add_argument("--megabytes", type=whole_number(1), default=64, help="of each sum (64)")
    parser.add_argument("--timeout", type=whole_number(1), default=60, help="seconds that each stage has (60)")
    parser.add_argument("--unfit", type=Path, help="file to which the names of unfit hosts are added, with a comma behind each")
    args = parser.parse_args()
    try:
        member = join(hosts_of_ranks(args.places), args.timeout, args.unfit)
    except ValueError as error:
        parser.error(str(error))
    try_sums(member, args.megabytes)


if __name__ == "__main__":
    main()
