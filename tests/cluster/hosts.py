"""Two hosts on one machine: network namespaces joined by a cable, each with its own sshd. Needs root, iproute2 and openssh."""

import itertools
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

INTERFACE = "veth0"  # the cable's end, on both hosts
NOBODY = "02:00:00:00:00:00"  # an Ethernet address that neither host has
serial = itertools.count()


class Hosts:
    """Two hosts, up when this returns and until `stop`. They reach each other and nothing else. They share the machine's files
    and processes, and ssh between them leaves the user's ~/.ssh alone."""

    def __init__(self, folder: Path, ssh_port: int = 22):
        self.folder, self.ssh_port = folder.absolute(), ssh_port
        number = next(serial)
        pair = f"host{os.getpid()}-{number}"
        self.names = f"{pair}-0", f"{pair}-1"
        # No pair sees another: different subnets only tell their commands apart in a list of processes.
        subnet = os.getpid() * 16 + number
        network = f"10.{subnet >> 8 & 255}.{subnet & 255}"
        self.addresses = f"{network}.1", f"{network}.2"
        self.servers: list[subprocess.Popen] = []
        try:
            self._configure_ssh()
            self._build_network()
            for i in (0, 1):
                self._serve(i)
        except BaseException:
            self.stop()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """The variables, on top of os.environ, of what `command` starts."""
        # Gloo would take the address of the machine's name, which is no address of these hosts.
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": INTERFACE}

    def command(self, i: int, *command: object) -> list[str]:
        """How to run `command` on host `i`. It keeps folder, environment and process id."""
        return ["ip", "netns", "exec", self.names[i], *map(str, command)]

    def hostfile(self, slots: int) -> Path:
        path = self.folder / "hostfile"
        path.write_text("".join(f"{address} slots={slots}\n" for address in self.addresses))
        return path

    def cut(self) -> None:
        """From now on all packets vanish, and no host is told: a link that is down would be an error at once."""
        for i in (0, 1):
            neighbour = ["ip", "neighbour", "replace", self.addresses[1 - i], "lladdr", NOBODY]
            _run(self.command(i, *neighbour, "dev", INTERFACE, "nud", "permanent"))

    def mend(self) -> None:
        for i in (0, 1):
            _run(self.command(i, "ip", "neighbour", "flush", "dev", INTERFACE, "nud", "permanent"))

    def processes(self, i: int) -> list[psutil.Process]:
        """All that live on host `i`, apart from its sshd and what that forks for each connection."""
        return [one for one in self._inhabitants(i) if not one.info["name"].startswith("sshd")]

    def stop(self) -> None:
        """Kill whatever lives there and remove the hosts. May be called again."""
        deadline = time.monotonic() + 10
        # More than once, as the killed may have forked meanwhile.
        while inhabitants := self._inhabitants(0) + self._inhabitants(1):
            if time.monotonic() > deadline:
                raise RuntimeError(f"cannot be killed: {inhabitants}")
            for process in inhabitants:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)
        for server in self.servers:
            server.wait()
        for name in self.names:
            if Path("/run/netns", name).exists():
                _run(["ip", "netns", "delete", name])

    def _build_network(self) -> None:
        for name in self.names:
            _run(["ip", "netns", "add", name])
        one, other = (["name", INTERFACE, "netns", name] for name in self.names)
        _run(["ip", "link", "add", *one, "type", "veth", "peer", *other])
        for name, address in zip(self.names, self.addresses, strict=True):
            _run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE])
            # No IPv6 address: `cut` parts what IPv4 joins.
            _run(["ip", "-n", name, "link", "set", INTERFACE, "addrgenmode", "none"])
            for interface in ("lo", INTERFACE):
                _run(["ip", "-n", name, "link", "set", interface, "up"])

    def _configure_ssh(self) -> None:
        (self.folder / "bin").mkdir(parents=True)
        for key in ("client_key", "host_key_0", "host_key_1"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(self.folder / key)])
        config = self.folder / "ssh_config"
        # The port is not told here: who starts ssh has to know it, as on real hosts.
        config.write_text(
            f'IdentityFile "{self.folder}/client_key"\nIdentitiesOnly yes\nBatchMode yes\n'
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        shim = self.folder / "bin" / "ssh"
        shim.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F "{config}" "$@"\n')
        shim.chmod(0o755)

    def _serve(self, i: int) -> None:
        config, log = self.folder / f"sshd_config_{i}", self.folder / f"sshd_{i}.log"
        config.write_text(
            f'Port {self.ssh_port}\nPidFile none\nHostKey "{self.folder}/host_key_{i}"\n'
            f'AuthorizedKeysFile "{self.folder}/client_key.pub"\n'
            # The folder may be in one that others can write to, and a container may be without PAM.
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
        )
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd refuses to start without it
        with log.open("w") as output:
            command = self.command(i, "/usr/sbin/sshd", "-D", "-e", "-f", config)
            self.servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=output, start_new_session=True))
        ssh = [self.folder / "bin" / "ssh", "-o", "ConnectTimeout=2", "-p", self.ssh_port, self.addresses[i], "true"]
        deadline = time.monotonic() + 10
        while (asked := subprocess.run(self.command(i, *ssh), capture_output=True, text=True)).returncode:
            if self.servers[i].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the sshd of {self.addresses[i]} does not answer: {asked.stderr}{log.read_text()}")
            time.sleep(0.05)

    def _inhabitants(self, i: int) -> list[psutil.Process]:
        if (network := _network(f"/run/netns/{self.names[i]}")) is None:
            return []
        return [one for one in psutil.process_iter(["name"]) if _network(f"/proc/{one.pid}/ns/net") == network]


def _network(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # the process has ended, or no host of that name is up
        return None
    return status.st_dev, status.st_ino


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}")
