"""Laws of loading an export: a stranger's file answers or is refused, and never runs code or reports to anybody."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fieldmark.augment.reference import EvalSpec
from fieldmark.errors import ExportError
from fieldmark.export.formats import write_torch
from fieldmark.inference.exported import ExportedModel, ModelMetadata, _load_torch
from fieldmark.inference.predictor import Predictor

SPEC = EvalSpec("squash", 8, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
INPUT = "data/sample_inputs/model.pt"


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The members of a torch export, by name."""
    path = tmp_path_factory.mktemp("torch") / "model.pt2"
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2)).eval()
    write_torch(model, path, size=8, metadata="{}")
    with zipfile.ZipFile(path) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def write_export(folder, members):
    metadata = ModelMetadata(
        "torch", "float32", "model.pt2", "x", ("a", "b"), asdict(SPEC), (0, 0, 0), 1.0, 0.0, 1, "mit", "none", "run"
    )
    (folder / "fieldmark.json").write_text(metadata.to_json())
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edited(members, name, change):
    """The members with one JSON file changed as text."""
    text = members[name].decode()
    new = change(text)
    assert new != text
    return {**members, name: new.encode()}


def code(mark):
    return f"__import__('os').mkdir('{mark}')"


HOSTILE = {
    "a pickled input": lambda it, mark: {**it, INPUT: pickled(((Evil(mark),), {}))},
    "pickled weights": lambda it, mark: {
        **edited(
            it,
            "data/weights/model_weights_config.json",
            lambda text: text.replace('"use_pickle": false', '"use_pickle": true'),
        ),
        "data/weights/weight_0": pickled(Evil(mark)),
    },
    "a pickled object": lambda it, mark: {**it, "data/constants/opaque_obj_0": pickle.dumps(Evil(mark))},
    "a compiled library": lambda it, _: {**it, "data/aotinductor/model/a.so": b"\x7fELF"},
    "a function of torch that is none of a network": lambda it, _: edited(
        it, "models/model.json", lambda text: text.replace("torch.ops.aten.linear.default", "torch.os.system")
    ),
    "a size that is code": lambda it, mark: edited(
        it, "models/model.json", lambda text: text.replace("Symbol('s", f"{code(mark)} or Symbol('s", 1)
    ),
    "a name that is code": lambda it, mark: edited(
        it, "models/model.json", lambda text: text.replace('"name": "input"', f'"name": "input={code(mark)}"')
    ),
    "an operator as a value": lambda it, _: edited(
        it, "models/model.json", lambda text: text.replace('"as_int": 1', '"as_operator": "torch.os.system"', 1)
    ),
    "a structure that imports": lambda it, _: edited(
        it, "models/model.json", lambda text: text.replace("builtins.tuple", "collections.defaultdict")
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_torch_export_that_could_run_code_is_refused_before_it_does(kind, program, tmp_path):
    mark = tmp_path / "code-ran"
    write_export(tmp_path, HOSTILE[kind](program, mark))
    with pytest.raises(ExportError, match=r"model.pt2 is refused, since opening it could run code: it holds .* Make"):
        ExportedModel.load(tmp_path, threads=1)
    assert not mark.exists()


def test_the_older_form_which_torch_unpickles_is_not_read(program, tmp_path):
    mark = tmp_path / "code-ran"
    members = {
        "version": b"8.16",
        "serialized_exported_program.json": program["models/model.json"],
        "serialized_state_dict.pt": pickled(Evil(mark)),
        "serialized_constants.pt": pickled({}),
        "serialized_example_inputs.pt": pickled(()),
    }
    write_export(tmp_path, members)
    with pytest.raises(ExportError, match=r"model.pt2 cannot be loaded"):
        ExportedModel.load(tmp_path, threads=1)
    assert not mark.exists()


def test_the_same_archive_as_it_was_written_answers(program, tmp_path):
    write_export(tmp_path, program)
    loaded = ExportedModel.load(tmp_path, threads=1)
    assert loaded.logits(np.zeros((3, 3, 8, 8), np.float32)).shape == (3, 2)


def test_a_torch_export_says_nothing_of_the_machine_it_was_made_on(program):
    assert json.loads(program["models/model.json"])["graph_module"]["graph"]["nodes"]
    assert b".py" not in program["models/model.json"]


@pytest.mark.slow
def test_openvino_contacts_nobody(tmp_path):
    script = (
        "import socket\n"
        "asked = []\n"
        "socket.getaddrinfo = lambda *given, **named: asked.append(given) or []\n"
        "from fieldmark.inference.exported import import_openvino\n"
        "import_openvino().Core()\n"
        "import nncf\n"
        "print(asked)\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "intel").exists()


NOT_FOR = {  # values of the wrong type, range or length, by key; text that says nothing to the answers may be any
    "format": [0, "1", None],
    "kind": ["tflite", 3, None],
    "file": ["other.pt2", "../model.pt2", "", 3],
    "classes": [[], ["a"], ["a", "a"], ["a", "b", "c"], "ab", None, [1, 2]],
    "preprocessing": [{}, [], None],
    "preprocessing.size": [0, -8, 10**9, "wide", None],
    "preprocessing.crop_fraction": [0, 2, float("nan"), None],
    "preprocessing.transform": ["zoom", None],
    "preprocessing.interpolation": ["nearest", None],
    "preprocessing.mean": [[0.5], [0.5, 0.5, float("inf")], None],
    "preprocessing.std": [[0.2, 0.2, 0], [0.2, 0.2, -1], [0.2, 0.2, float("nan")], "x"],
    "background": [[0, 0], [0, 0, 256], [0, 0, -1], None],
    "temperature": [0, -1, float("nan"), float("inf"), "hot", None],
    "threshold": [-0.1, 1.5, float("nan"), None],
    "max_pixels": [0, "many", None],
    "batch_size": [0, -1, None],
    "back_off": [{"levels": []}, [1], "x"],
    "evidence": [[], None],
}


def set_key(content, key, value):
    *way, last = key.split(".")
    for step in way:
        content = content[step]
    content[last] = value


@pytest.mark.parametrize("key", NOT_FOR)
def test_metadata_that_is_not_what_it_should_be_is_refused_in_one_sentence_that_names_its_key(program, tmp_path, key):
    write_export(tmp_path, program)
    text = (tmp_path / "fieldmark.json").read_text()
    for value in NOT_FOR[key]:
        content = json.loads(text)
        set_key(content, key, value)
        (tmp_path / "fieldmark.json").write_text(json.dumps(content))
        with pytest.raises(ExportError, match=r"fieldmark.json|unknown form|has no ") as refused:
            ExportedModel.load(tmp_path, threads=1)
        said = str(refused.value)
        assert "\n" not in said
        assert key.rpartition(".")[2] in said or key in ("kind", "file", "classes", "preprocessing"), said


def test_any_cut_and_any_flipped_byte_of_the_metadata_is_refused_or_answers_as_before(program, tmp_path):
    write_export(tmp_path, program)
    whole = (tmp_path / "fieldmark.json").read_bytes()
    before = ModelMetadata.load(tmp_path)
    refused = 0
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 150, replace=False):
        for content in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :],
        ):
            (tmp_path / "fieldmark.json").write_bytes(content)
            try:
                found = ModelMetadata.load(tmp_path)
            except ExportError:
                refused += 1
                continue
            # What a flipped digit or letter leaves valid is within its range.
            assert found.temperature > 0
            assert 0 <= found.threshold <= 1
            assert len(set(found.classes)) == len(before.classes)
            assert found.preprocessing.size > 0
    assert refused > 200


def test_an_export_of_an_earlier_version_has_the_default_limits(program, tmp_path):
    write_export(tmp_path, program)
    content = json.loads((tmp_path / "fieldmark.json").read_text())
    del content["max_pixels"], content["batch_size"]
    (tmp_path / "fieldmark.json").write_text(json.dumps(content))
    found = ExportedModel.load(tmp_path, threads=1).metadata
    assert (found.max_pixels, found.batch_size) == (178_956_970, 64)


def test_a_predictor_keeps_the_limit_of_the_export(program, tmp_path):
    write_export(tmp_path, program)
    content = json.loads((tmp_path / "fieldmark.json").read_text())
    (tmp_path / "fieldmark.json").write_text(json.dumps(content | {"max_pixels": 99}))
    predictor = Predictor.load(tmp_path)
    small, large = np.zeros((9, 11, 3), np.uint8), np.zeros((10, 10, 3), np.uint8)
    first, second = predictor.predict([Image.fromarray(photo) for photo in (small, large)])
    assert (first.problem, first.label in ("a", "b")) == ("", True)
    assert "99" in second.problem


class Part(nn.Module):
    """Computes a part of itself in full precision, as EfficientViT does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 2)

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return self.linear(images.flatten(1)) * 2


def test_a_graph_within_the_graph_is_read_where_it_only_says_how_to_compute(tmp_path):
    model = Part().eval()
    write_torch(model, tmp_path / "model.pt2", size=8, metadata="{}")
    assert b"wrap_with_autocast" in (tmp_path / "model.pt2").read_bytes()
    images = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        expected = model(images).numpy()
    np.testing.assert_allclose(_load_torch(tmp_path / "model.pt2")(images.numpy()), expected, atol=1e-5)
