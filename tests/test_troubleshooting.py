"""docs/troubleshooting.md has every error and warning of ours, and none that is gone.

A message is known again by its own words: the longest run of them between two values that no other message has too.
"""

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
PACKAGES = ("data", "model", "train")
LEAST, MOST = 12, 60  # characters of a run of words that are enough, and that are compared
GAP = "\0"  # where a value is put in
# Any string of words is taken for a message, wherever it stands: problems are yielded, appended, kept in tables.
# These, by their module and their beginning, are none.
NO_MESSAGES = {
    "headings of tables and pictures": (
        "build_shards: jpeg, quality", "inspect: height x width", "inspect: % of pixels", "inspect: loss.class_weights=",
        "inspect: mirrored", "dashboard: share of pixels", "metrics: IoU", "evaluate: mIoU", "report: Classes over",
        "report: %{y}", "report: Validation over", "report: The last validation", "report: where the pixels", "report: rgb(",
        "report: system-ui",
    ),
    "results": (
        "export: MB, its logits differ by", "trial_sum: s GB/s bus bandwidth", "run: at x classes training and",
        "data_findings: training images of", "data_findings: of each set", "data_findings: look at", "doctor: a new run in",
        "doctor: fresh: load_from", "doctor: measured in", "doctor: whose checksums", "doctor: devices that",
        "benchmark: views on", "benchmark: half of the steps",
        "benchmark: x images x", "benchmark: train.doctor predicts", "doctor: hours at", "doctor: GB are needed on",
        "doctor: none asked", "doctor: the checkpoint's", "doctor: the steps that are left", "remedies: GB of each",
        "data_findings: validation images",
    ),
    "layouts of data sets, which --help and docs/data.md tell": (
        "sources: the unpacked", "sources: LIP", "sources: CIHP", "sources: images/, masks/", "sources: two folders of images",
    ),
    "commands": ("build_shards: python -m", "transfer: pipe:aws"),
    "names and formats, mostly of others": (
        "raw_files: Raw profile", "labels: Value error", "loader: DataLoader worker", "errors: out of memory|",
        "engine: untested", "host_facts: Not Supported", "flops: RTX", "watchdog: {phase} of", "synthetic: BACKGROUND",
        "synthetic: yaw", "logs: %(asctime)", "trial_sum: all are here",
    ),
}  # fmt: skip
TOLD_ELSEWHERE = {"help", "description", "epilog", "prog"}  # arguments: --help shows them
FOR_US = {"AssertionError", "IndexError", "log.info", "parser.add_argument_group"}  # no mistakes of users, and what goes well
SPEAKERS = re.compile(r"\w*Error|Rejected|UnreadableImage|log\.(warning|error)|parser\.error|_?leave")
# Of shell scripts: what says it, and a string, which may go on in the next line.
SHELL = re.compile(r'\b(refuse|say|requeue|echo|sys\.exit\(f?) *"((?:[^"\\\n]|\\["\\$`]|" *\\\n *")*)"')
BAD_NEWS = re.compile(r"(error|warning|note|damaged|interrupted|no val split)\b")  # of what is printed


@dataclass(frozen=True)
class Message:
    """What the code says, cut where values are put in."""

    where: str  # file:line
    pieces: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where}: {' ... '.join(self.pieces)}"


def plain(text: str) -> str:
    """In one line, without Markdown's and YAML's backticks, and without punctuation at its ends."""
    return " ".join(text.replace("`", "").split()).strip(" .,;:()[]'\"")


def cut(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(plain, text.split(GAP))))


def said_by(module: str, text: str) -> str:
    return f"{module}: {GAP.join(cut(text))}"


def is_known_again(text: str) -> bool:
    return len(text) >= LEAST and " " in text


def constants(trees: dict[Path, ast.Module]) -> dict[str, str]:
    """The packages' constants that are strings: an f-string that holds one says it."""
    assigned = [node for tree in trees.values() for node in tree.body if isinstance(node, ast.Assign)]
    return {
        node.targets[0].id: node.value.value
        for node in assigned
        if isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def text_of(node: ast.Constant | ast.JoinedStr, known: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return re.sub(r"%[.\d]*[sdf]", GAP, node.value) if isinstance(node.value, str) else ""
    values = [getattr(part, "value", None) for part in node.values]
    return "".join(value if isinstance(value, str) else known.get(getattr(value, "id", ""), GAP) for value in values)


def strings(path: Path, tree: ast.Module, known: dict[str, str]) -> Iterator[tuple[ast.expr, list[ast.AST], str]]:
    """Yields (string, what it stands in, from the inside out, its text)."""
    outer = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant | ast.JoinedStr) or isinstance(outer[node], ast.JoinedStr | ast.FormattedValue):
            continue  # a part of one
        around, one = [], node
        while not isinstance(one, ast.stmt):
            one = outer[one]
            around.append(one)
        yield node, around, text_of(node, known)


def is_message(module: str, around: list[ast.AST], text: str) -> bool:
    if isinstance(around[0], ast.Expr):  # a docstring
        return False
    calls = [node for node in around if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    keywords = {node.arg for node in around if isinstance(node, ast.keyword)}
    if isinstance(around[-1], ast.Assert) or keywords & TOLD_ELSEWHERE or names & FOR_US:
        return False
    pieces = cut(text)
    if "print" in names and not BAD_NEWS.match(plain(text)) and "stderr" not in ast.unparse(calls[-1]):
        return False
    if any(said_by(module, text).replace(GAP, " ").startswith(none) for none in chain(*NO_MESSAGES.values())):
        return False
    says = calls and around[0] is calls[0] and SPEAKERS.fullmatch(ast.unparse(calls[0].func))
    return any(map(is_known_again, pieces)) or bool(says and pieces)


@cache
def messages(root: Path) -> tuple[list[Message], list[str]]:
    """The messages of the packages and of launch/*.sh under `root`, and all that any string there says."""
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    known, found, said = constants(trees), [], []
    for path, tree in trees.items():
        for node, around, text in strings(path, tree, known):
            said.append(said_by(path.stem, text))
            if is_message(path.stem, around, text):
                found.append(Message(f"{path.relative_to(root)}:{node.lineno}", cut(text)))
    for path in [*sorted((root / "launch").glob("*.sh")), *root.glob("Makefile")]:
        script = path.read_text()
        for told in SHELL.finditer(script):
            text = re.sub(r'" *\\\n *"', " ", told[2])  # goes on in the next line
            text = re.sub(r"\$\(.*|\$\{[^}]*\}|\$[\w*]+|\{\w+\}", GAP, re.sub(r'\\(["\\])', r"\1", text))
            said.append(said_by(path.stem, text))
            to_stderr = ">&2" in script[told.end() :].partition("\n")[0] or text.startswith("error")
            if cut(text) and (told[1] in ("refuse", "say", "requeue") or to_stderr):
                found.append(Message(f"{path.relative_to(root)}:{1 + script.count(chr(10), 0, told.start())}", cut(text)))
    return found, said


def on_the_page(page: str) -> list[str]:
    """The messages in the first column of the page's tables of messages."""
    found, in_table = [], False
    for line in page.splitlines():
        first = line.split("|")[1] if line.startswith("| ") else ""
        in_table = bool(first) and (in_table or first.strip() == "message") or (in_table and line.startswith("|--"))
        if in_table and first and first.strip() != "message" and not first.startswith(" *"):  # a symptom
            found += [" ".join(text.replace("`", "").split()) for text in first.split("<br>")]
    return found


def missing(found: list[Message], page: list[str]) -> list[str]:
    every = {message.pieces for message in found}
    lost = []
    for message in found:
        others = GAP.join(piece for pieces in every if pieces != message.pieces for piece in pieces)
        own = [piece for piece in message.pieces if is_known_again(piece) and piece not in others]
        wanted = [max(own, key=len)[:MOST]] if own else [piece[:MOST] for piece in message.pieces]
        in_order = re.compile(".*".join(map(re.escape, wanted)))
        if not any(in_order.search(text) for text in page):
            lost.append(str(message))
    return lost


def gone(page: list[str], said: list[str]) -> list[str]:
    """What stands on the page and nowhere in the code; what is put in stands there in capitals, or as dots."""
    everything = GAP.join(said)

    def is_said(part: str) -> bool:  # at once, or in two strings, of which one is put into the other
        halves = [(part[:i], part[i:]) for i in range(1, len(part) + 1)]
        return any(plain(one) in everything and plain(other) in everything for one, other in halves)

    lost = []
    for text in page:
        parts = [plain(part) for part in re.split(r"\.\.\.|\b[A-Z][A-Z0-9_]*\b|[;:(),]", text)]
        wanted = [part for part in parts if len(part) >= LEAST] or [max(parts, key=len)]
        lost += [f"{text}: {part}" for part in wanted if not is_said(part)]
    return lost


def test_every_message_is_explained():
    found, _ = messages(ROOT)
    assert len(found) > 400, "the messages are not found any more"
    lost = missing(found, on_the_page(PAGE.read_text()))
    assert not lost, "give them a row in docs/troubleshooting.md, or a reason in NO_MESSAGES:\n" + "\n".join(lost)


def test_no_message_on_the_page_is_gone():
    page = on_the_page(PAGE.read_text())
    assert len(page) > 300 and not (lost := gone(page, messages(ROOT)[1])), "\n".join(lost)


def test_no_exception_is_gone():
    said = [text.replace(GAP, " ") for text in messages(ROOT)[1]]
    lost = [none for none in chain(*NO_MESSAGES.values()) if not any(text.startswith(none) for text in said)]
    assert not lost, f"remove them from NO_MESSAGES: {lost}"


NEW = {
    "data/new.py": """
        WHY = "the moon is full"
        def load(path):
            if not path:
                raise DataError(f"{path}: cannot be eaten; cook it")
            yield "classes", f"{path} has grown a beard"
            raise TrainError(f"{WHY}: wait") if path else DataError("new")
        def warn(found, error):
            log.warning("%s: has turned %d times: %s", *found)
            log.info("all went well with %s", found)
            found.append(f"the {found} lies on its back")
            print("error: no light there", file=sys.stderr)
            print("all went well again")
            parser.error("a cup of tea is missing")
            raise DataError(f"{error}") from None
    """,
    "launch/new.sh": """
        [ -n "$TEA" ] || refuse "TEA: '$TEA' is not hot; boil" \\
          "water"
        echo "error: $TEA: spilt over" >&2
        echo "all went well too"
    """,
}


def test_a_new_message_is_missed(tmp_path):
    for name, text in NEW.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    found, said = messages(tmp_path)
    page = [
        "PATH: cannot be eaten; cook it", "PATH has grown a beard", "the moon is full: wait", "new",
        "PATH: has turned N times: REASON", "the NAME lies on its back", "error: no light there", "a cup of tea is missing",
        "TEA: 'VALUE' is not hot; boil water", "error: VALUE: spilt over",
    ]  # fmt: skip
    assert not missing(found, page) and not gone(page, said)
    for i in range(len(page)):
        assert missing(found, page[:i] + page[i + 1 :]), page[i]
    assert "data/new.py:5: cannot be eaten; cook it" in missing(found, [])
    assert gone(["PATH: cannot be baked; cook it"], said)
