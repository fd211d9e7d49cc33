from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fieldmark
from fieldmark.errors import ResourceError
from fieldmark.files import whole_folder, whole_or_absent, write_whole


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not on this system")  # noqa: PTH110
def test_a_really_full_device_is_a_clear_error(tmp_path):
    with pytest.raises(ResourceError, match="could not be written"):
        whole_or_absent(tmp_path / "x", lambda part: torch.save({"a": torch.zeros(10**5)}, "/dev/full"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "told"), [(28, "Free some space"), (13, "writable"), (30, "writable")])
def test_what_to_do_depends_on_what_was_wrong(tmp_path, number, told):
    def refused(part):
        raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError, match=told):
        whole_or_absent(tmp_path / "x", refused)


@pytest.mark.skipif(sys.platform == "win32", reason="not on this system")
def test_what_is_synced_may_be_written_as_windows_asks(tmp_path, monkeypatch):
    """Windows refuses to sync a file that is open for reading alone."""
    import fcntl

    synced, sync = [], os.fsync

    def fsync(handle):
        synced.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "x", "new")
    assert synced == [os.O_RDWR]
    places = [path for path in Path(fieldmark.__file__).parent.rglob("*.py") if "fsync" in path.read_text("utf-8")]
    assert [path.name for path in places] == ["files.py"]  # the one place that syncs


@pytest.mark.parametrize("refusals", [0, 3, 99])
def test_a_file_that_windows_holds_for_a_reader_is_replaced_a_moment_later(tmp_path, monkeypatch, refusals):
    def replace(part, path):
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise PermissionError(13, "in use")
        return move(part, path)

    move = Path.replace
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr("fieldmark.files.sys.platform", "win32")
    monkeypatch.setattr("fieldmark.files.time.sleep", lambda _: None)
    monkeypatch.setattr(Path, "replace", replace)
    if refusals == 99:
        with pytest.raises(ResourceError):
            write_whole(tmp_path / "file", "new")
    else:
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == ("old" if refusals > 0 else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_text("old")

    def broken_off(part):
        part.write_text("half")
        raise error

    with pytest.raises(error):
        whole_or_absent(tmp_path / "x", broken_off)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "old")]


def test_a_folder_that_a_kill_left_half_made_goes_when_it_is_made_again(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out = tmp_path / "my [export]"
    half = tmp_path / f".{out.name}.abc.{dead.pid}.part"
    others = [tmp_path / f".{out.name}.abc.{os.getpid()}.part", tmp_path / f".other.abc.{dead.pid}.part"]
    for folder in (half, *others):
        folder.mkdir()
        (folder / "model.onnx").touch()
    with whole_folder(out) as part:
        assert part.is_dir()
    assert out.is_dir()
    assert not half.exists()
    assert all(folder.is_dir() for folder in others)


def test_a_folder_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/x could not be written: Not a directory"):
        whole_or_absent(tmp_path / "file" / "x", lambda part: part.write_text("new"))
