"""Before a run on several hosts: whether they fit together.

    python -m train.preflight facts --name n1 --output-dir outputs/run --slots 8     (on each host: one line of JSON)
    python -m train.preflight compare FACTS --places n0:8,n1:8 --output-dir outputs/run [--unfit FILE]

`compare` reads the lines of all hosts. A host is unfit when it gave none, names problems of its own, does not share the output
folder, or is not as most hosts are. Exit code: 0 when all are fit, 1 when one is not, 2 for bad arguments.
"""

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from data.arguments import whole_number
from train.host_facts import host_facts, marker

SAME_PACKAGES = "install the same versions there, in the environment that the launch uses"
# Of what hosts differ in, other than packages.
REMEDIES = {
    "revision": "check out the same commit there",
    "code": "copy the same files there, those that are not committed too",
    "python": "make its environment with the same Python",
    "driver": "install the same driver there, or leave the host out",
    "gpus": "leave the host out, or take hosts with the same GPUs only",
}


class Parser(argparse.ArgumentParser):
    """Tells bad arguments in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def host_name(text: str) -> str:
    """For `type=`: a host's name that may be part of a file's."""
    if not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"'{text}' is no host's name: letters, digits, '.', '_' and '-' make one")
    return text


def parse_places(text: str) -> dict[str, int]:
    """For `type=`: `n0:8,n1:8` as {host: processes}, in the order of the ranks."""
    places = {}
    for place in text.split(","):
        host, _, slots = place.rpartition(":")
        if not host:
            raise argparse.ArgumentTypeError(f"'{place}' does not tell host and processes; write n0:8,n1:8")
        if host_name(host) in places:
            raise argparse.ArgumentTypeError(f"{host} is there twice; name each host once, as n0:8,n1:8")
        places[host] = whole_number(1)(slots)
    return places


def hosts_of_ranks(places: dict[str, int]) -> list[str]:
    """The host of each rank: launchers fill one host after another."""
    return [host for host, slots in places.items() for _ in range(slots)]


def read_facts(text: str, hosts: list[str]) -> dict[str, dict]:
    """The newest facts of each host that gave some. Other lines are passed over, and what stands before a line's first brace:
    banners without an end of line, and the names that srun and pdsh write in front."""
    answers = {}
    for line in text.splitlines():
        with suppress(ValueError):
            found, _ = json.JSONDecoder().raw_decode(line[line.index("{") :])
            if found.get("name") in hosts and {"packages", "gpus", "free_gb", "problems"} <= set(found):
                answers[found["name"]] = found
    return answers


def compared(answers: dict[str, dict], places: dict[str, int]) -> dict[str, dict[str, str]]:
    """What has to be the same, as {host: {key: value}}, in the order of the places. Of the GPUs, as many as every host has to
    have: the run may start more processes on one than on another."""
    least = min(places.values())
    values = {}
    for host in places:
        if found := answers.get(host):
            gpus = Counter(found["gpus"][:least])
            values[host] = {
                "revision": found.get("revision", ""),
                "code": found.get("code", "")[:12],
                "python": found.get("python", ""),
                **found["packages"],
                "driver": found.get("driver", ""),
                "gpus": ", ".join(f"{count} x {name}" for name, count in sorted(gpus.items())),
            }
    return values


def table(values: dict[str, dict[str, str]]) -> list[str]:
    """A line for each key that is not the same everywhere: its values, that of most hosts first, and who has them."""
    rows = []
    for key in dict.fromkeys(key for of_host in values.values() for key in of_host):
        groups = defaultdict(list)
        for host, of_host in values.items():
            groups[of_host.get(key) or "none"].append(host)
        if len(groups) > 1:
            most_first = sorted(groups.items(), key=lambda group: -len(group[1]))
            rows.append([key, *(f"{value} ({', '.join(hosts)})" for value, hosts in most_first)])
    columns = max(map(len, rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(columns)]
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def differences(values: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """What each host does not have as the largest group of equal hosts has it: a sentence for each remedy, none for those in
    that group. Of groups of one size the one with the earliest host counts."""
    groups = defaultdict(list)
    for host, of_host in values.items():
        groups[json.dumps(of_host, sort_keys=True)].append(host)
    right = max(groups.values(), key=len, default=[""])[0]
    sentences = {}
    for host, of_host in values.items():
        keys = defaultdict(list)
        for key in dict.fromkeys([*of_host, *values[right]]):
            if of_host.get(key) != values[right].get(key):
                keys[REMEDIES.get(key, SAME_PACKAGES)].append(key)
        sentences[host] = [f"not as {right}: {', '.join(names)}; {remedy}" for remedy, names in keys.items()]
    return sentences


def judge(answers: dict[str, dict], places: dict[str, int], seen: set[str], output_dir: Path) -> dict[str, list[str]]:
    """What makes each host unfit, as {host: sentences}; only those that are.

    Args:
        seen: the hosts whose marker is seen from here.
    """
    differs = differences(compared(answers, places))
    unfit = {}
    for host in places:
        if host not in answers:
            unfit[host] = ["gave no answer; see what `ssh` or `srun` to it says, and whether the repository is there"]
            continue
        sentences = list(answers[host]["problems"])
        if host not in seen and answers[host]["free_gb"] is not None:  # else it could not write it, and has said so
            sentences.append(f"{output_dir} is no shared folder: what {host} wrote is not seen here; take one that is")
        if sentences := sentences + differs[host]:
            unfit[host] = sentences
    return unfit


def take_markers(folder: Path, hosts: list[str]) -> set[str]:
    """The hosts whose marker is in the folder. Removes the markers."""
    with suppress(OSError):  # NFS looks at the folder anew when something was changed in it from here
        (folder / ".preflight").write_bytes(b"")
        (folder / ".preflight").unlink()
    seen = {host for host in hosts if (folder / marker(host)).exists()}
    for host in seen:
        with suppress(OSError):
            (folder / marker(host)).unlink()
    return seen


def compare(text: str, places: dict[str, int], output_dir: Path) -> list[str]:
    """Tell what the hosts' lines say; the unfit hosts."""
    answers = read_facts(text, list(places))
    values = compared(answers, places)
    unfit = judge(answers, places, take_markers(output_dir, list(places)), output_dir)
    if not unfit:
        first = next(iter(values.values()))
        told = f"{len(places)} hosts fit: {first['gpus'] or 'CPU'}, revision {first['revision'] or 'none'}"
    else:
        told = f"{len(unfit)} of {len(places)} hosts do not fit: {', '.join(unfit)}"
    print(f"preflight: {told}", *table(values), sep="\n", flush=True)
    for host, sentences in unfit.items():
        for sentence in sentences:
            print(f"error: {host}: {sentence}", file=sys.stderr)
    return list(unfit)


def main() -> None:
    parser = Parser(prog="python -m train.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("facts", help="what this host is")
    asked.add_argument("--name", type=host_name, required=True, help="of this host, as in --places")
    asked.add_argument("--slots", type=whole_number(1), required=True, help="processes that the run starts here")
    judged = commands.add_parser("compare", help="whether all hosts fit")
    judged.add_argument("facts", type=Path, help="file with the lines of all hosts")
    judged.add_argument("--places", type=parse_places, required=True, help="host:processes,...")
    judged.add_argument("--unfit", type=Path, help="file for the names of the unfit hosts, with commas between")
    for command in (asked, judged):
        command.add_argument("--output-dir", type=Path, required=True, help="the run's, shared by all hosts")
    args = parser.parse_args()
    if args.command == "facts":
        print(json.dumps(host_facts(args.name, args.output_dir, args.slots)))
        return
    try:
        unfit = compare(args.facts.read_text(errors="replace"), args.places, args.output_dir)
        if args.unfit:
            args.unfit.write_text(",".join(unfit))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    sys.exit(1 if unfit else 0)


if __name__ == "__main__":
    main()
