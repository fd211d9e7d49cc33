"""Settings become the parts that they name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric.plugins import MixedPrecision, Precision

from fieldmark.config import load_config
from fieldmark.errors import ConfigError
from fieldmark.runs import build

TINY = ("model.name=test_resnet", "model.weights=random")
PRECISIONS = {
    "32-true": Precision(),
    "bf16-mixed": MixedPrecision("bf16-mixed", "cpu"),
    "16-mixed": MixedPrecision("16-mixed", "cpu"),
}


@pytest.mark.parametrize(
    ("precision", "clip_norm", "is_fused"),
    [("32-true", 1, True), ("bf16-mixed", 1, True), ("16-mixed", 0, True), ("16-mixed", 1, False)],
)
def test_the_fused_kernel_is_given_up_only_where_fabric_could_not_clip(
    precision: str, clip_norm: int, is_fused: bool
) -> None:
    config = load_config(None, [*TINY, f"optim.clip_norm={clip_norm}"])
    model = build.build_model(config, num_classes=3).model
    plugin = PRECISIONS[precision]
    optimizer = build.build_optimizer(config, model, precision=plugin)
    assert bool(optimizer.defaults["fused"]) == is_fused
    with plugin.forward_context():
        loss = model(torch.rand(2, 3, 32, 32)).square().sum()
    plugin.backward(loss, model)
    if clip_norm:
        plugin.unscale_gradients(optimizer)  # what Fabric does before it clips
    plugin.optimizer_step(optimizer)


def test_fp16_on_a_processor_is_recorded_as_the_bf16_that_it_is():
    from fieldmark.config import load_config
    from fieldmark.runs.build import choose_precision

    choice = choose_precision(load_config(None, ["train.precision=16-mixed"]), "cpu")
    assert choice.value == "bf16-mixed"
    assert "needs a GPU" in choice.reason


@pytest.mark.parametrize(
    "setting", ["augment.size=100", "eval.size=100", "train.resolution_steps=[[0, 96], [0.5, 100]]"]
)
def test_a_size_that_the_model_does_not_take_is_refused_before_training(setting: str) -> None:
    config = load_config(None, ["model.name=test_vit", "model.weights=random", setting])
    with pytest.raises(ConfigError, match=r"test_vit takes images of 160 pixels, .* got 100"):
        build.build_model(config, num_classes=3)


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_to_compile_without_a_compiler_is_refused_in_words(monkeypatch, tmp_path, variable: str) -> None:
    config, model = load_config(None, ["train.compile=on"]), torch.nn.Linear(1, 1)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, .* set train\.compile=auto"):
        build.compile_model(config, model, torch.device("cpu"))
    own = tmp_path / "own-compiler"
    own.write_text("")
    own.chmod(0o755)
    monkeypatch.setenv(variable, f"{own} --fast")
    assert build.compile_model(config, model, torch.device("cpu")) is not model
    assert build.compile_model(load_config(None, []), model, torch.device("cpu")) is model


@pytest.mark.parametrize(
    ("device", "world_size", "setting", "is_replayed"),
    [("cuda", 1, "auto", True), ("cuda", 1, "off", False), ("cuda", 2, "auto", False), ("cpu", 1, "auto", False)],
)
def test_passes_are_replayed_on_a_single_gpu(device: str, world_size: int, setting: str, is_replayed: bool) -> None:
    fabric: Any = SimpleNamespace(device=torch.device(device), world_size=world_size)
    replay = build.make_replay(load_config(None, [f"train.compile={setting}"]), fabric, torch.nn.Linear(1, 1))
    assert (replay is not None) == is_replayed
