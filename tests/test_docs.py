"""What README.md and docs/*.md say, is so: their commands run, their links, options and keys exist."""

import re
import shlex
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.yaml_files import Settings
from tests.conftest import PATIENCE, ROOT, python
from tests.documents import INSTEAD, NOT_RUN, PAGES, README, blocks, commands, literal, make_world, prose, run
from train.config import Config, load_config

ELSEWHERE = ["docs/clusters.md"]  # tests/cluster/test_docs.py runs its commands
# What a page's reader has already, by README's steps: a path, and which of theirs it is.
GIVEN = {
    "shards/face": "shards/face", "outputs/face_1b": "outputs/face_1b", "outputs/demo/run": "outputs/face_1b",
    "outputs/demo/shards": "shards/face",
}  # fmt: skip
ALONE = [README, "docs/data.md"]  # where nothing is given
# What there is when all of a page's commands have run.
LEFT = {
    README: ["outputs/face_1b/model_sapiens.pth", "masks/mask/one.png", "inspect_face_train.png"],
    "docs/data.md": ["masks/mask/0.png", "outputs/mine/model.safetensors", "shards/listed/val/index.json"],
    "docs/resuming.md": ["outputs/other/model.safetensors"],
    "docs/export.md": ["mask.png", "sapiens_1b_goliath_converted.safetensors"],
    "docs/watching.md": ["outputs/demo/run/report.html"],
}
VARIABLES = r"(?:[A-Za-z_]+=(?:\"[^\"]*\"|\S*) +)*"
COMMAND = re.compile(rf"{VARIABLES}(python3?|deepspeed|make|pip|pytest|bash|srun|sbatch|launch/\w+\.sh)( |$)")
INLINE = re.compile(rf"({VARIABLES})(python -m [\w.]+|python [\w/]+\.py|launch/\w+\.sh)(.*)")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The small repository after README's packing, and its training in one process."""
    folder = tmp_path_factory.mktemp("trained")
    make_world(folder)
    packing = next(command for command in commands(README) if "build_shards" in command)
    follow(folder, README, [packing, "python -m train --config train/configs/face_1b.yaml"])
    return folder


def follow(folder: Path, page: str, chosen: list[str]) -> None:
    """Run commands one after the other."""
    for command in chosen:
        code, output = run(["bash", "-euo", "pipefail", "-c", literal(command, folder)], folder)
        assert code == 0, f"{page}: exit code {code} of\n{command}\n\n{output[-6000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and commands(page)])
def test_the_commands_of_a_page_run(page, request, tmp_path):
    make_world(tmp_path)
    for there, theirs in () if page in ALONE else GIVEN.items():
        shutil.copytree(request.getfixturevalue("trained") / theirs, tmp_path / there)
    follow(tmp_path, page, [command for command in commands(page) if command not in NOT_RUN])
    missing = [name for name in LEFT.get(page, []) if not (tmp_path / name).is_file()]
    assert not missing, f"{page}: its commands have not made {missing}"
    if page == "docs/export.md":
        ours, theirs = (np.asarray(Image.open(tmp_path / name)) for name in ("masks/mask/one.png", "mask.png"))
        assert ours.shape == theirs.shape and (ours == theirs).mean() > 0.99, "the example's mask is not that of model.predict"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_no_bash_or_python_block_holds_no_command(page):
    text = (ROOT / page).read_text()
    assert text.count("```") == 2 * len(blocks(page)), f"{page}: a fence that is not closed, or does not begin its line"
    others = [content for language, content in blocks(page) if language not in ("bash", "python")]
    indented = re.findall(r"(?:\n    .*)+", prose(page))
    lines = [line.strip() for content in others + indented for line in content.splitlines()]
    assert not [line for line in lines if COMMAND.match(line)], f"{page}: put it into a ```bash block"
    assert {language for language, _ in blocks(page)} <= {"bash", "python", "yaml", ""}


def test_the_tables_of_commands_name_none_that_is_gone():
    told = {command for page in PAGES for command in commands(page)}
    assert not (NOT_RUN.keys() | INSTEAD.keys()) - told


@pytest.mark.parametrize("page", PAGES)
def test_yaml_blocks_are_experiments(page, tmp_path):
    for language, content in blocks(page):
        if language == "yaml":
            (tmp_path / "a.yaml").write_text(f"base: {ROOT}/train/configs/face_1b.yaml\n{content}")
            load_config(tmp_path / "a.yaml", [])


def spans(page: str) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


@cache
def told_by(command: str) -> str:
    """What `COMMAND --help` prints."""
    if command.startswith("python"):
        done = python(*command.split()[1:], "--help")
    else:
        done = subprocess.run([ROOT / command, "--help"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{command} --help: exit code {done.returncode}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_have_the_options_that_they_name(page):
    for span in spans(page):
        if span.startswith("make "):
            assert f"\n{span.split()[1]}:" in (ROOT / "Makefile").read_text(), f"{page}: {span}"
        if not (found := INLINE.match(" ".join(span.split()))):
            continue
        variables, command, rest = found.groups()
        words = shlex.split(rest)
        named = [word.split("=")[0] for word in words[: words.index("--") if "--" in words else None] if word.startswith("--")]
        named += [] if command.startswith("python") else re.findall(r"([A-Za-z_]+)=", variables)
        if command.startswith("python -m "):
            assert find_spec(command.split()[2]), f"{page}: {span}: no such module"
        else:
            assert (ROOT / command.split()[-1]).is_file(), f"{page}: {span}: no such file"
        missing = [name for name in named if name != "--help" and not re.search(rf"(?<![\w-]){name}(?![\w-])", told_by(command))]
        assert not missing, f"{page}: {span}: {command} --help does not tell of {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_the_configuration_exist(page):
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    sections = {name: kind for name, kind in sections.items() if isinstance(kind, type) and issubclass(kind, Settings)}
    for section, key in re.findall(r"`([a-z_]+)\.([a-z_]+)(?:[=:][^`]*)?`", prose(page)):
        is_file = (ROOT / section / f"{key}.py").is_file() or key in ("safetensors", "onnx")
        assert section not in sections or is_file or key in sections[section].model_fields, f"{page}: no key {section}.{key}"


def anchors(page: Path) -> set[str]:
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}: not there"
        assert not anchor or anchor in anchors(target), f"{page}: {link}: no such heading, there are {anchors(target)}"
