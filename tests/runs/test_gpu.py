"""The laws of runs on a CUDA device: `make test-gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fieldmark.budget.run import train_within
from fieldmark.config import load_config
from fieldmark.errors import InterruptedRunError
from fieldmark.inference.predictor import Predictor
from fieldmark.progress import Quiet
from fieldmark.runs import session
from fieldmark.runs import train as training
from fieldmark.runs.folder import Run
from fieldmark.training.checkpoint import load_checkpoint, load_saved_weights
from fieldmark.training.loop import update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SMALL = (
    "model.name=resnet18",
    "model.weights=random",
    "augment.size=64",
    "eval.size=64",
    "train.epochs=2",
    "train.batch_size=16",
    "loader.workers=2",
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Four classes by color, 20 photos each."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, name in enumerate(("auk", "bee-eater", "crane", "dipper")):
        (root / name).mkdir()
        for place in range(20):
            pixels = rng.normal(60 + 35 * number, 40, (80 + place, 90, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{place}.jpg")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def settings(photos: Path, *more: str, recipe: str | None = "competition"):
    return load_config(recipe, [f'data.path="{photos}"', *SMALL, *more])


def test_a_run_learns_and_answers_alike_on_both(photos, tmp_path):
    list(training.train(settings(photos, "train.epochs=6", "optim.lr=1e-3", "mix.share=0"), tmp_path / "run"))
    run = Run(tmp_path / "run")
    assert run.summary["val"]["top1"] > 0.5
    files = sorted(photos.rglob("*.jpg"))[:8]
    there = Predictor.load(run).predict_proba(files)
    code = (
        "import sys, json; from fieldmark.inference.predictor import Predictor; "
        "print(json.dumps(Predictor.load(sys.argv[1]).predict_proba(sys.argv[2:]).tolist()))"
    )
    command = [sys.executable, "-c", code, str(run.path), *map(str, files)]
    said = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, check=True)
    np.testing.assert_allclose(np.array(json.loads(said.stdout.splitlines()[-1])), there, atol=0.03)


def test_a_run_that_was_stopped_ends_as_the_unbroken_one(photos, tmp_path, monkeypatch):
    config = settings(photos, "model.feature_dropout=0.2", "train.epochs=3")
    list(training.train(config, tmp_path / "whole"))

    def stop_in_the_middle(session, state, stop, *args):
        for number, batch in enumerate(iterate(session, state, stop, *args)):
            if state.epoch == 1 and number == 2:
                os.kill(os.getpid(), 2)
            yield batch

    iterate = training._iterate_with_stop
    with monkeypatch.context() as patch:
        patch.setattr(training, "_iterate_with_stop", stop_in_the_middle)
        with pytest.raises(InterruptedRunError):
            list(training.train(config, tmp_path / "broken"))
    list(training.resume(tmp_path / "broken"))
    whole, broken = (load_saved_weights(tmp_path / name / "best.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_device_between_two_updates(photos, tmp_path):
    config = settings(photos, "augment.executor=fast", "mix.share=1", "train.ema_decay=0.9")
    with session.open_session(config, tmp_path / "run", start="new", progress=Quiet()) as opened:
        state, options = opened.start_training(), opened.make_update_options()
        for epoch in range(2):  # in the first the passes are recorded, and torch's caches filled
            for number, batch in enumerate(opened.train_batches(epoch, 0)):
                if epoch == 1 and number == 1:
                    torch.cuda.set_sync_debug_mode("error")
                loss, logits = update(opened.fabric, state, batch, options)
                state.tally.add(batch, logits, loss)
            torch.cuda.set_sync_debug_mode("default")
        assert options.replay._passes is not None


@pytest.mark.parametrize("more", [(), ("model.feature_dropout=0.3", "train.ema_decay=0.9"), ("model.freeze=2",),
                                  ("train.precision=32-true", "model.freeze_batchnorm=true")])  # fmt: skip
def test_passes_that_are_replayed_learn_the_same(photos, tmp_path, more):
    found = []
    for kind in ("off", "auto"):
        list(training.train(settings(photos, "train.epochs=3", f"train.compile={kind}", *more), tmp_path / kind))
        found.append(load_checkpoint(tmp_path / kind / "last.pt")["model"])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_that_reads_a_number_back_trains_without_a_recording(photos, tmp_path, monkeypatch, dropout):
    def read_back(module, given):
        given[0].mean().item()

    start = session.Session.start_training
    monkeypatch.setattr(
        session.Session,
        "start_training",
        lambda opened: (opened.built.model.register_forward_pre_hook(read_back), start(opened))[1],
    )
    list(training.train(settings(photos, f"model.feature_dropout={dropout}"), tmp_path / "run"))
    assert Run(tmp_path / "run").summary["status"] == "finished"


def test_without_memory_the_batch_is_computed_in_parts(photos, tmp_path):
    code = (
        "import sys, torch; torch.cuda.set_per_process_memory_fraction(float(sys.argv[3]));"
        "from fieldmark.config import load_config; from fieldmark.runs.train import train;"
        f"config = load_config('competition', ['data.path=\"' + sys.argv[1] + '\"', *{SMALL}, "
        "'augment.size=448', 'train.batch_size=64', 'train.epochs=1']);"
        "list(train(config, sys.argv[2]))"
    )
    fraction = 1.6e9 / torch.cuda.get_device_properties(0).total_memory
    command = [sys.executable, "-c", code, str(photos), str(tmp_path / "run"), str(fraction)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-2000:]
    assert Run(tmp_path / "run").summary["status"] == "finished"


def test_a_budget_is_spent_on_the_gpu(photos, tmp_path):
    train_within(settings(photos, "model.name=test_resnet", recipe=None), tmp_path / "run", minutes=0.7)
    run = Run(tmp_path / "run")
    assert run.summary["status"] == "finished"
    assert Predictor.load(run)(sorted(photos.rglob("*.jpg"))[0]).label == "auk"
