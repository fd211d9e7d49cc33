"""Other processors compute the same: their instruction sets are forced upon oneDNN, torch and our own kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fieldmark.augment.kernels import finish, soften
from fieldmark.models.classifier import create_classifier, freeze_stages
from fieldmark.training.evaluate import Device

OLD = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "NUMBA_CPU_NAME": "generic"}
NEWER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell"}


def compute() -> dict[str, np.ndarray]:
    """An update's gradients, with strided and wide depthwise kernels, and a picture by kernels of ours."""
    torch.manual_seed(0)
    model = create_classifier("tf_efficientnet_lite0", num_classes=3, head="linear", head_hidden=0, head_dropout=0.0,
                              feature_dropout=0.0, drop_path=0.0, stride_in_1x1=False)  # fmt: skip
    for module in list(model.modules()):  # a ReLU turns a rounding of 1e-6 near its corner into half of a gradient
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU6):
                setattr(module, name, torch.nn.SiLU())
    freeze_stages(model.to(memory_format=torch.channels_last).train(), 0, freeze_batchnorm=True)
    photos = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    functional.cross_entropy(model(photos), torch.tensor([0, 1, 2, 0])).backward()
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    photo = np.random.default_rng(0).integers(0, 256, (40, 150), dtype=np.uint8)
    words = np.zeros((30, 41), np.uint32)
    soften(photo, 3, 2, np.uint16(30), np.uint16(60), words)
    picture = np.random.default_rng(1).random((3, 32, 32), dtype=np.float32) * 255
    kinds, factors = np.array([0, 1, 2, 3]), np.array([1.2, 0.8, 1.3, 0.1], np.float32)
    scale, offset, bank = np.full(3, 0.01, np.float32), np.full(3, -1, np.float32), np.ones(64, np.float32)
    finish(picture, kinds, factors, scale, offset, np.array([2, 3, 9, 9]), bank, 0)
    is_fast_in_bf16 = np.array(Device.choose("bf16-mixed").precision == "bf16-mixed")
    return {**found, "softened": words.view(np.uint8), "picture": picture, "bf16": is_fast_in_bf16}


@pytest.mark.parametrize("forced", [OLD, pytest.param(NEWER, marks=pytest.mark.slow)], ids=["SSE4.1", "AVX2"])
def test_an_older_processor_computes_the_same(tmp_path: Path, forced: dict[str, str]):
    told = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "old.npz")], env=os.environ | forced, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    old, new = np.load(tmp_path / "old.npz"), compute()
    assert not old["bf16"]  # it would emulate it, slowly
    assert old.keys() == new.keys()
    assert len(new) > 100
    for name in new.keys() - {"bf16"}:
        largest = np.abs(new[name].astype(np.float64)).max()
        np.testing.assert_allclose(old[name], new[name], atol=1e-3 * largest, rtol=0, err_msg=name)


if __name__ == "__main__":
    np.savez(sys.argv[1], **compute())
