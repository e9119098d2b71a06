"""The files of a Slurm of three nodes on this machine."""

import os
import random
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

NODES = ("n0", "n1", "n2")
CPUS, GPUS, MEMORY = 8, 4, 8000  # of each node, whatever the machine has
FREEZER = Path("/sys/fs/cgroup/freezer")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
KillWait=3
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=30
JobRequeue=1
EnforcePartLimits=ALL
PropagateResourceLimits=NONE
FirstJobId={first_job}
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n[0-2] Default=YES MaxTime=60 DefaultTime=5 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=n[0-2] MaxTime=60 DefaultTime=5 State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}"
GRES = f"NodeName=n[0-2] Name=gpu File=/dev/tty[0-{GPUS - 1}]\n"  # any device files do
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"


def write(folder: Path) -> None:
    """Makes what a cluster needs in its folder."""
    for name in ("munge", "ctld", "log", "run", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    host = socket.gethostname().partition(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    nodes = [
        NODE.format(name=name, host=host, port=port, cpus=CPUS, memory=MEMORY, gpus=GPUS)
        for name, port in zip(NODES, ports, strict=True)
    ]
    # Under cgroup, signals go as on most real clusters; the other knows a step's processes by their parents.
    cgroup = os.getuid() == 0 and FREEZER.is_dir() and os.access(FREEZER, os.W_OK)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=host, controller=controller, user=_user(), folder=folder, nodes="\n".join(nodes),
            proctrack="cgroup" if cgroup else "linuxproc", first_job=random.randrange(1000, 60_000_000),
        )  # fmt: skip
    )
    (folder / "gres.conf").write_text(GRES)
    (folder / "cgroup.conf").write_text(CGROUP)


def _free_ports(count: int) -> list[int]:
    """Below those that the kernel hands out for outgoing connections; drawn at random, for other tests look for some too."""
    draw, ports = random.SystemRandom(), []
    while len(ports) < count:
        port = draw.randrange(12_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            ports.append(port)
    return ports


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
