"""Weights that fit only in part: other classes, half a backbone; and weights from the hub."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model import ModelError
from model.segmenter import build_segmenter
from model.trained import load_segmenter
from model.weight_files import NAMES, locate_weights, original_key, read_weights, rename_key, save_safetensors
from model.weights import CLASSIFIER, load_weights
from tests.conftest import PATIENCE, python
from tests.model_cases import METADATA, SIZE, build_golden, build_golden2, build_tiny, refused, write_segmentation2

NAMES_OF_FIVE = ("Background", "Left_Eye", "Right_Eye", "Hair", "Nose")


def save_with_classes(path, names):
    model = build_tiny()
    torch.nn.init.normal_(model.decode_head.conv_seg.bias)
    classes = [{"id": i, "name": name} for i, name in enumerate(names)]
    save_safetensors(path, model.state_dict(), METADATA | {"label_set": {"classes": classes}})
    return model.decode_head.conv_seg


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=5, max_size=5, unique=True),
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=8, unique=True),
)
def test_rows_of_the_head_follow_the_names(tmp_path_factory, theirs, ours):
    path = tmp_path_factory.mktemp("classes") / "theirs.safetensors"
    source = save_with_classes(path, theirs)
    model = build_segmenter("tiny", len(ours), SIZE)
    report = load_weights(model, path, classes=[name.upper() for name in ours])
    head = model.decode_head.conv_seg
    for i, name in enumerate(ours):
        if name in theirs:
            assert torch.equal(head.weight[i], source.weight[theirs.index(name)])
            assert torch.equal(head.bias[i], source.bias[theirs.index(name)])
        else:
            assert head.bias[i] == 0 and head.weight[i].std() < 0.05
    common = len({*theirs} & {*ours})
    if ours == theirs:
        assert not report.resized and not report.reinitialised
    elif common:
        assert report.resized.keys() == {*CLASSIFIER} and f"{common} of {len(ours)} classes" in report.summary()
    else:
        assert report.reinitialised == dict.fromkeys(CLASSIFIER, "other classes")


def test_same_number_of_other_classes_is_never_taken_by_position(tmp_path):
    source = save_with_classes(tmp_path / "a.safetensors", NAMES_OF_FIVE)
    swapped = [NAMES_OF_FIVE[i] for i in (0, 2, 1, 3, 4)]
    model = build_tiny(1)
    load_weights(model, tmp_path / "a.safetensors", swapped)
    assert torch.equal(model.decode_head.conv_seg.bias[1:3], source.bias[[2, 1]])
    report = load_weights(model, tmp_path / "a.safetensors", swapped, match_classes=False)
    assert report.reinitialised.keys() == {*CLASSIFIER} and model.decode_head.conv_seg.bias.eq(0).all()
    load_weights(model, tmp_path / "a.safetensors")  # nobody told the model's classes
    assert torch.equal(model.decode_head.conv_seg.bias, source.bias)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("背景", "左眼", "右眼", "d", "e"), ("背景", "右眼", "左眼", "d", "e")),
        (("bg", "T-shirt", "T shirt", "d", "e"), ("bg", "T shirt", "T-shirt", "d", "e")),
    ],
)
def test_names_in_any_script_and_names_alike_are_told_apart(tmp_path, theirs, ours):
    source = save_with_classes(tmp_path / "a.safetensors", theirs)
    model = build_tiny(1)
    load_weights(model, tmp_path / "a.safetensors", ours)
    assert torch.equal(model.decode_head.conv_seg.bias, source.bias[[0, 2, 1, 3, 4]])


@pytest.mark.parametrize(
    "metadata",
    [
        {"image_size": "128"}, {"image_size": [128]}, {"image_size": [128.0, 96.0]}, {"label_set": None}, {"arch": 5},
        {"label_set": {"classes": [{"id": 0}]}}, {"num_classes": "x"}, {"patch_padding": True},
        {"label_set": {"classes": [{"name": "a", "color": "red"}]}},
        {"label_set": {"classes": [{"name": "a"}], "flip_pairs": [[0, 9]]}},
    ],
)  # fmt: skip
def test_odd_metadata_is_refused_with_its_key(tmp_path, metadata):
    save_safetensors(tmp_path / "a.safetensors", build_tiny().state_dict(), METADATA | metadata)
    for action in (load_segmenter, lambda path: load_weights(build_tiny(), path)):
        refused(action, tmp_path / "a.safetensors", match=f"a.safetensors: metadata: {next(iter(metadata))}")


def test_a_strangers_metadata_does_not_matter(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", build_tiny().state_dict(), {"origin": "somewhere"})
    assert load_weights(build_tiny(1), tmp_path / "a.safetensors").licence.startswith("https://")


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=60), st.integers(0, 2000), st.booleans())
def test_damaged_torch_files_are_told_so(tmp_path_factory, noise, place, zipped):
    path = tmp_path_factory.mktemp("damaged") / "a.pth"
    torch.save({"pos_embed": torch.ones(4)}, path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(noise)] = noise
    path.write_bytes(content)
    try:
        read_weights(path)
    except ModelError as error:
        assert "a.pth" in str(error) and "\n" not in str(error)


def test_another_familys_file_loads_in_part_only(tmp_path):
    save_safetensors(tmp_path / "v1.safetensors", build_tiny().state_dict(), {})
    refused(load_weights, build_segmenter("tiny2", 5, SIZE), tmp_path / "v1.safetensors", match="looks like tiny:")
    report = load_weights(build_segmenter("tiny2", 5, SIZE), tmp_path / "v1.safetensors", partial=True)
    assert "backbone.pos_embed" in report.unused


def test_class_names_of_the_originals_own_files_are_read(tmp_path):
    state = build_golden(num_classes=3).state_dict()
    meta = {"dataset_meta": {"classes": ("background", "left_eye", "right_eye")}}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    model = build_golden(num_classes=2)
    report = load_weights(model, tmp_path / "a.pth", ["Right_Eye", "Hat"])
    assert "1 of 2 classes" in report.resized[CLASSIFIER[0]]
    assert torch.equal(model.decode_head.conv_seg.weight[0], state[CLASSIFIER[0]][2])


def test_a_part_of_a_backbone_loads_only_when_asked_to(tmp_path):
    state, path = build_tiny().state_dict(), tmp_path / "part.safetensors"
    lost, other = "backbone.blocks.3.norm1.weight", "backbone.blocks.0.mlp.fc1.weight"
    save_file({key: value for key, value in state.items() if key != lost} | {other: torch.zeros(2, 2)}, path)
    refused(load_weights, build_tiny(1), path, match="2 keys")
    model, before = build_tiny(1), build_tiny(1).state_dict()
    report = load_weights(model, path, partial=True)
    assert report.reinitialised == {lost: "not in the file", other: "(2, 2) in the file, (384, 96) in the model"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in (lost, other) else state[key]), key
    save_file({"backbone.something": torch.zeros(2)}, path)
    refused(lambda: load_weights(build_tiny(), path, partial=True), match="no vision transformer")


@pytest.mark.parametrize("family", NAMES)
def test_names_go_to_the_original_and_back(tmp_path, family):
    model = build_golden() if family == "sapiens" else build_golden2(write_segmentation2(tmp_path / "a.safetensors"))
    keys = list(model.state_dict())
    theirs = [original_key(key, family) for key in keys]
    assert len(set(theirs)) == len(keys) and [rename_key(key) for key in theirs] == keys
    assert not any(".mlp." in key or ".norm1." in key for key in theirs)


def test_an_originals_file_tells_its_model(tmp_path):
    path = write_segmentation2(tmp_path / "a.safetensors")
    refused(load_segmenter, path, match="does not tell its arch, image_size, patch_padding")  # no size that is released
    model, state = build_segmenter("tiny2", 5, (1024, 768)), {}
    for key, value in model.state_dict().items():
        state[original_key(key, "sapiens2")] = value
    save_file(state, path)
    again, metadata = load_segmenter(path)
    assert metadata["arch"] == "tiny2" and metadata["num_classes"] == 5 and again.image_size == (1024, 768)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(torch.zeros(1, 3, 64, 48)), model.eval()(torch.zeros(1, 3, 64, 48)))


def test_told_and_stored_must_agree(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", build_tiny().state_dict(), METADATA)
    refused(lambda: load_segmenter(tmp_path / "a.safetensors", patch_padding=0), match="says patch_padding 2, not 0")


class Hub:
    """The few answers of the Hugging Face hub that a download needs, for one repository's files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        hub = self
        self.files, self.asked = files, []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                name = path.rpartition("/")[2]
                if path.startswith("/api/models/owner/name"):
                    listed = [{"type": "file", "oid": "0" * 40, "size": len(v), "path": k} for k, v in files.items()]
                    content = json.dumps(listed).encode()
                elif path.startswith("/owner/name/resolve/") and name in files:
                    content = files[name]
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if "/owner/name/" in path else "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(200)
                self.send_header("X-Repo-Commit", "1" * 40)
                self.send_header("ETag", '"abc"')
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


LOCATE = """
import json, sys
from model import ModelError
from model.weight_files import locate_weights
for name in sys.argv[1:]:
    try:
        print(json.dumps(["at", str(locate_weights("hf-hub:" + name))]))
    except ModelError as error:
        print(json.dumps(["refused", str(error)]))
"""


def locate(endpoint, cache, *names):
    """In a fresh process: huggingface_hub reads its settings when it is imported."""
    done = python("-c", LOCATE, *names, HF_ENDPOINT=endpoint, HF_HOME=str(cache), HF_HUB_DISABLE_XET="1", timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def test_weights_come_from_the_hub(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", build_tiny().state_dict(), METADATA)
    content = (tmp_path / "a.safetensors").read_bytes()
    wrong = ("owner/name/none.safetensors", "nobody/nothing", "nonsense", "owner/name/README.md")
    with Hub({"README.md": b"hello", "model.safetensors": content}) as endpoint:
        right = ("owner/name", "owner/name/model.safetensors", "owner/name@main")
        answers = locate(endpoint, tmp_path / "home", *right, *wrong)
    for kind, path in answers[:3]:
        assert kind == "at" and Path(path).read_bytes() == content
    for name, (kind, message) in zip(wrong, answers[3:], strict=True):
        assert kind == "refused" and name.rpartition("/")[2] in message and "\n" not in message
    with Hub({"a.safetensors": b"1", "b.pth": b"2"}) as endpoint:
        ((kind, message),) = locate(endpoint, tmp_path / "other", "owner/name")
    assert kind == "refused" and "holds 2 weight files" in message and "a.safetensors" in message
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        answers = locate(nowhere, tmp_path / "home", "owner/name/model.safetensors", "owner/name")
    assert [kind for kind, _ in answers] == ["at", "refused"] and "check the name and the network" in answers[1][1]
    assert locate_weights(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
