"""Files are whole or absent, and loading never runs code."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from fieldmark.errors import ResourceError, RunError
from fieldmark.training import checkpoint
from fieldmark.training.checkpoint import load_checkpoint, load_saved_weights, save_checkpoint, save_weights


def test_what_is_saved_is_loaded(tmp_path):
    content = {"weights": {"a": torch.randn(3)}, "epoch": 4, "history": "[]"}
    checkpoint.save_checkpoint(tmp_path / "last.pt", content)
    loaded = checkpoint.load_checkpoint(tmp_path / "last.pt")
    assert loaded["epoch"] == 4
    assert torch.equal(loaded["weights"]["a"], content["weights"]["a"])


def test_a_full_disk_leaves_the_last_checkpoint_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, {"epoch": 1})

    def full(content, part):
        part.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ResourceError, match=r"No space left on device.*before is intact"):
        checkpoint.save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_weights_that_may_not_be_read_are_a_clear_error(tmp_path, monkeypatch):
    checkpoint.save_weights(tmp_path / "best.safetensors", {"a": torch.zeros(3)})

    def forbidden(self, *arguments):
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(type(tmp_path), "open", forbidden)
    with pytest.raises(RunError, match="cannot be read: Permission denied"):
        checkpoint.load_saved_weights(tmp_path / "best.safetensors")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch /tmp/fieldmark-was-here",)

    path = tmp_path / "last.pt"
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, path)
    with pytest.raises(RunError, match="is not a checkpoint"):
        checkpoint.load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RunError, match="is not a checkpoint"):
        checkpoint.load_checkpoint(path)
    assert not os.path.exists("/tmp/fieldmark-was-here")  # noqa: PTH110


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_torn_files_are_clear_errors(tmp_path, share):
    weights, state = tmp_path / "best.safetensors", tmp_path / "last.pt"
    checkpoint.save_weights(weights, {"a": torch.randn(1000)})
    checkpoint.save_checkpoint(state, {"a": torch.randn(1000)})
    for path in (weights, state):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load_saved_weights(weights)
    with pytest.raises(RunError, match=r"is not a checkpoint.*delete it and resume: the run then starts again"):
        checkpoint.load_checkpoint(state)


def test_absent_and_foreign_files_are_clear_errors(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        checkpoint.load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(RunError, match="no weights yet"):
        checkpoint.load_saved_weights(tmp_path / "best.safetensors")
    torch.save({"format": 99}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="another format"):
        checkpoint.load_checkpoint(tmp_path / "last.pt")


def test_weights_keep_their_values_whatever_their_memory_layout(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    checkpoint.save_weights(tmp_path / "w.safetensors", {"w": weight, "same": weight})
    loaded = checkpoint.load_saved_weights(tmp_path / "w.safetensors")
    assert torch.equal(loaded["w"], weight)
    assert torch.equal(loaded["same"], weight)


def test_weights_may_be_read_by_those_who_may_read_other_files(tmp_path):
    (tmp_path / "other").write_text("x")
    checkpoint.save_weights(tmp_path / "w.safetensors", {"w": torch.zeros(1)})
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_who_reads_while_a_checkpoint_is_saved_reads_the_old_one_whole(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, {"epoch": 1})
    with path.open("rb") as reader:
        checkpoint.save_checkpoint(path, {"epoch": 2})
        assert torch.load(reader, weights_only=True)["epoch"] == 1
    assert checkpoint.load_checkpoint(path)["epoch"] == 2


def _flipped(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    damaged = path.with_name("damaged" + path.suffix)
    damaged.write_bytes(content)
    return damaged


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, suffix):
    path = tmp_path / f"state{suffix}"
    tensors = {"a": torch.arange(300.0), "b": torch.tensor(3), "c": torch.ones(4, 5, dtype=torch.bfloat16)}
    if suffix == ".pt":
        save_checkpoint(path, {"tensors": tensors})
    else:
        save_weights(path, tensors)
    refusals = []
    size = path.stat().st_size
    for position in range(0, size, max(size // 300, 1)):
        damaged = _flipped(path, position)
        try:
            found = load_checkpoint(damaged)["tensors"] if suffix == ".pt" else load_saved_weights(damaged)
        except RunError as error:
            refusals.append(str(error))
            continue
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(len(refusal.splitlines()) == 1 for refusal in refusals)
    assert sum("is damaged: its checksum does not fit" in refusal for refusal in refusals) > 50


def test_weights_of_before_without_a_checksum_still_load(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "old.safetensors")
    assert torch.equal(load_saved_weights(tmp_path / "old.safetensors")["a"], torch.ones(3))
