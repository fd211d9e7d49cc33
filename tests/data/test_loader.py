from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.data.loader import (
    Batch,
    Loader,
    auto_workers,
    cut_plan,
    epoch_order,
    join_batches,
    limit_team,
    shard_plan,
)
from fieldmark.errors import PhotoError, ResourceError, TrainingError

# Worker processes import what they unpickle, so what prepares batches must live in an importable module.
MODULE = """
import os, signal, threading, time
from dataclasses import dataclass
import cv2, torch
from fieldmark.data.loader import Batch
from fieldmark.errors import PhotoError


@dataclass(frozen=True)
class Prepare:
    side: int = 4
    dtype: torch.dtype = torch.float32

    def __call__(self, numbers, epoch):
        numbers = torch.tensor(list(numbers), dtype=torch.int64)
        images = (numbers * 1000 + epoch).to(self.dtype)[:, None, None, None].repeat(1, 3, self.side, self.side)
        problems = tuple((place, "is odd") for place, number in enumerate(numbers.tolist()) if number % 5 == 3)
        return Batch(images, numbers, numbers % 7 - 1, problems)


class Facts:
    def __call__(self, numbers, epoch):
        facts = [os.getpid(), torch.get_num_threads(), cv2.getNumThreads(), threading.active_count()]
        facts.append(int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN))
        return Batch(torch.zeros(1), torch.tensor(facts), torch.tensor([epoch]), ())


class Bad:
    def __init__(self, error):
        self.error = error

    def __call__(self, numbers, epoch):
        if 13 in numbers:
            raise self.error
        return Prepare()(numbers, epoch)


class Unlucky(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Raises:
    def __call__(self, numbers, epoch):
        raise Unlucky("this", "that")


class Dies:
    def __call__(self, numbers, epoch):
        if 13 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return Prepare()(numbers, epoch)


class Slow:
    def __call__(self, numbers, epoch):
        time.sleep(0.05)
        return Prepare()(numbers, epoch)


class CannotBeUnpickled:
    def __reduce__(self):
        return int, ("not a number",)

    def __call__(self, numbers, epoch):
        return Prepare()(numbers, epoch)
"""


@pytest.fixture(scope="module")
def preparing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "preparing_of_test_loader.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("preparing_of_test_loader")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module", params=[None, pytest.param("spawn", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> Iterator[Loader]:
    """Two workers, started as on Linux, and by spawn as on macOS and Windows."""
    with Loader(workers=2, threads=1, start_method=request.param) as loader:
        yield loader


PLAN = [[3, 1, 2], [9, 8], [4, 5, 6, 7], [13], [0, 10, 11, 12], [14, 15]]


def content(batch: Batch) -> tuple[object, ...]:
    return batch.images.tolist(), batch.images.dtype, batch.numbers.tolist(), batch.labels.tolist(), batch.problems


@given(st.integers(0, 300), st.integers(0, 2**63), st.integers(0, 10**6))
def test_every_photo_is_in_an_epoch_once(num_photos: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_photos, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_photos))
    assert np.array_equal(order, epoch_order(num_photos, seed=seed, epoch=epoch))


def test_the_order_changes_with_seed_and_epoch_alone() -> None:
    orders = [epoch_order(50, seed=s, epoch=e).tolist() for s in range(3) for e in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    np.random.seed(5)  # noqa: NPY002  # the global state must not matter
    assert epoch_order(50, seed=0, epoch=0).tolist() == orders[0]


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert epoch_order(8, seed=1, epoch=2).tolist() == [3, 7, 0, 5, 6, 1, 2, 4]


def test_each_photo_is_equally_likely_in_each_place() -> None:
    places = np.zeros((6, 6))
    for epoch in range(6000):
        places[np.arange(6), epoch_order(6, seed=3, epoch=epoch)] += 1
    chi_square = ((places - 1000) ** 2 / 1000).sum()
    assert chi_square < 52.6  # 25 degrees of freedom, p = 0.001


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=5), st.integers(1, 5))
def test_the_shares_of_all_processes_are_the_batch(plan: list[list[int]], processes: int) -> None:
    shares = [shard_plan(plan, rank=rank, processes=processes) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(plan)}
    for step, numbers in enumerate(plan):
        parts = [share[step] for share in shares]
        assert [number for part in parts for number in part] == numbers
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_workers_and_threads_change_nothing(preparing: ModuleType, pair: Loader) -> None:
    prepare = preparing.Prepare()
    expected = [content(prepare(numbers, 5)) for numbers in PLAN]
    assert [content(batch) for batch in Loader(workers=0, threads=1).batches(prepare, PLAN, epoch=5)] == expected
    with Loader(workers=0, threads=3) as loader:
        assert [content(batch) for batch in loader.batches(prepare, PLAN, epoch=5)] == expected
    assert [content(batch) for batch in pair.batches(prepare, PLAN, epoch=5)] == expected


def test_an_empty_plan_gives_no_batch(preparing: ModuleType, pair: Loader) -> None:
    assert list(pair.batches(preparing.Prepare(), [], epoch=0)) == []
    assert list(Loader(workers=0, threads=1).batches(preparing.Prepare(), [], epoch=0)) == []


def test_a_cut_plan_holds_every_photo_once_in_order():
    assert cut_plan(range(7), 3) == [range(3), range(3, 6), range(6, 7)]
    assert cut_plan([], 3) == []


def test_workers_outlive_epochs_and_take_what_each_epoch_needs(preparing: ModuleType, pair: Loader) -> None:
    pids = []
    for epoch, side in enumerate((4, 9, 2)):
        seen = list(pair.batches(preparing.Prepare(side), PLAN, epoch=epoch))
        assert [content(batch) for batch in seen] == [content(preparing.Prepare(side)(n, epoch)) for n in PLAN]
        facts = list(pair.batches(preparing.Facts(), [[0], [0]], epoch=epoch))
        pids.append({int(batch.numbers[0]) for batch in facts})
    assert len(pids[0]) == 2
    assert pids[0] == pids[1] == pids[2]
    assert os.getpid() not in pids[0]


def test_a_worker_computes_alone_and_is_deaf_to_ctrl_c(preparing: ModuleType, pair: Loader) -> None:
    (facts,) = pair.batches(preparing.Facts(), [[0]], epoch=0)
    _, torch_threads, cv2_threads, _, ignores_interrupts = facts.numbers.tolist()
    assert (torch_threads, cv2_threads, ignores_interrupts) == (1, 1, 1)


def test_threads_compute_alone_and_leave_all_others_theirs() -> None:
    def prepare(numbers: Sequence[int], epoch: int) -> Batch:
        counts = torch.full((len(numbers),), torch.get_num_threads())
        return Batch(torch.zeros(len(numbers), 3, 1, 1), counts, counts, ())

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Loader(workers=0, threads=2) as loader:
            (batch,) = loader.batches(prepare, [[0, 1, 2, 3]], epoch=0)
        assert batch.numbers.tolist() == [1] * 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
        with ThreadPoolExecutor(1, initializer=limit_team, initargs=(2,)) as pool:
            assert (pool.submit(torch.get_num_threads).result(), torch.get_num_threads()) == (2, 3)
    finally:
        torch.set_num_threads(before)


def test_a_batch_that_is_kept_is_never_overwritten(preparing: ModuleType, pair: Loader) -> None:
    prepare = preparing.Prepare(16)
    plan = [[number] for number in range(24)]
    kept = list(pair.batches(prepare, plan, epoch=1))
    views = [batch.images[0, 1:] for batch in kept]
    del kept
    gc.collect()
    later = list(pair.batches(prepare, plan, epoch=2))
    assert all(view.eq(number * 1000 + 1).all() for number, view in enumerate(views))
    assert all(batch.images.eq(number * 1000 + 2).all() for number, batch in enumerate(later))


def test_memory_is_used_again_once_nobody_holds_it(preparing: ModuleType, pair: Loader) -> None:
    plan = [[number] for number in range(40)]
    list(pair.batches(preparing.Prepare(32), plan[:8], epoch=0))
    places = {batch.images.data_ptr() for batch in pair.batches(preparing.Prepare(32), plan, epoch=0)}
    assert len(places) <= 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_every_kind_of_pixels_travels(dtype: torch.dtype, preparing: ModuleType, pair: Loader) -> None:
    plan = [[number] for number in range(8)]
    prepare = preparing.Prepare(8, dtype)
    assert [content(batch) for batch in pair.batches(prepare, plan, epoch=0)] == [content(prepare(n, 0)) for n in plan]


def test_an_epoch_that_is_left_early_disturbs_nothing(preparing: ModuleType, pair: Loader) -> None:
    first = pair.batches(preparing.Prepare(), PLAN, epoch=1)
    next(first)
    first.close()
    expected = [content(preparing.Prepare()(numbers, 2)) for numbers in PLAN]
    assert [content(batch) for batch in pair.batches(preparing.Prepare(), PLAN, epoch=2)] == expected


def test_two_epochs_at_once_are_refused(preparing: ModuleType) -> None:
    with Loader(workers=1, threads=1) as loader:
        first = loader.batches(preparing.Prepare(), PLAN, epoch=1)
        next(first)
        next(loader.batches(preparing.Prepare(), PLAN, epoch=2))
        with pytest.raises(TrainingError, match="a second epoch was begun while the first was still read"):
            next(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_ours_arrives_as_it_was(workers: int, preparing: ModuleType) -> None:
    bad = preparing.Bad(PhotoError("a/b.jpg", "is truncated"))
    with Loader(workers=workers, threads=2) as loader:
        iterator = loader.batches(bad, PLAN, epoch=0)
        assert [next(iterator).numbers.tolist() for _ in range(3)] == PLAN[:3]
        with pytest.raises(PhotoError) as caught:
            next(iterator)
    assert (caught.value.path, caught.value.reason) == ("a/b.jpg", "is truncated")


def test_other_errors_arrive_with_the_place_where_they_arose(preparing: ModuleType) -> None:
    with Loader(workers=1, threads=1) as loader:
        with pytest.raises(RuntimeError, match="Unlucky: this and that") as caught:
            list(loader.batches(preparing.Raises(), PLAN, epoch=0))
        assert "preparing_of_test_loader.py" in caught.value.__notes__[0]
        bad = preparing.Bad(KeyError("thirteen"))
        with pytest.raises(KeyError, match="thirteen"):
            list(loader.batches(bad, PLAN, epoch=0))
        with pytest.raises(ValueError, match="not a number"):
            list(loader.batches(preparing.CannotBeUnpickled(), PLAN, epoch=0))


def test_what_cannot_be_sent_is_named(preparing: ModuleType) -> None:
    with (
        Loader(workers=1, threads=1) as loader,
        pytest.raises(TrainingError, match=r"cannot be sent to a worker process .*set loader\.workers=0"),
    ):
        list(loader.batches(lambda numbers, epoch: None, PLAN, epoch=0))  # type: ignore[arg-type, return-value]


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do(preparing: ModuleType) -> None:
    with Loader(workers=2, threads=1) as loader:
        arrived: list[list[int]] = []
        with pytest.raises(ResourceError, match=r"died: signal SIGKILL.* set loader\.workers=0") as caught:
            arrived.extend(batch.numbers.tolist() for batch in loader.batches(preparing.Dies(), PLAN, epoch=0))
        # The death may be met while later photos are asked for, before all that came first was handed out.
        assert arrived == PLAN[: len(arrived)]
        assert len(arrived) <= 3
        pid = int(str(caught.value).split("process ")[1].split(")")[0])
        assert not psutil.pid_exists(pid)
        # The loader stays usable: it starts new workers.
        assert len(list(loader.batches(preparing.Prepare(), PLAN, epoch=0))) == len(PLAN)


def test_closing_ends_the_processes(preparing: ModuleType) -> None:
    loader = Loader(workers=2, threads=1)
    pids = [int(batch.numbers[0]) for batch in loader.batches(preparing.Facts(), [[0], [0]], epoch=0)]
    loader.close()
    loader.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


SCRIPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
sys.path.insert(0, {folder!r})
from preparing_of_test_loader import Facts, Slow
from fieldmark.data.loader import Loader

if __name__ == "__main__":
    with Loader(workers=2, threads=1, start_method={method!r}) as loader:
        print(*[int(batch.numbers[0]) for batch in loader.batches(Facts(), [[0], [0]], epoch=0)], flush=True)
        for batch in loader.batches(Slow(), [[1]] * 100000, epoch=0):
            pass
"""


def run_script(preparing: ModuleType, tmp_path: Path, method: str) -> tuple[subprocess.Popen[str], list[int]]:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(folder=str(Path(str(preparing.__file__)).parent), method=method)))
    # A group of its own, as a shell makes it: Ctrl-C goes to all of its processes.
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.02)
    return is_so()


def test_batches_arrive_where_shared_memory_is_full(preparing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    expected = [content(preparing.Prepare()(numbers, 0)) for numbers in PLAN]
    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with Loader(workers=2, threads=1) as loader:
        assert [content(batch) for batch in loader.batches(preparing.Prepare(), PLAN, epoch=0)] == expected


def test_no_code_runs_where_a_batch_ends_so_that_no_ctrl_c_is_lost_there(preparing: ModuleType) -> None:
    with Loader(workers=1, threads=1) as loader:
        arrived = list(loader.batches(preparing.Prepare(), PLAN, epoch=0))
        called: list[str] = []
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
        arrived.clear()
        sys.setprofile(None)
    assert called == []


def test_ctrl_c_ends_all_and_only_the_training_process_speaks(preparing: ModuleType, tmp_path: Path) -> None:
    process, pids = run_script(preparing, tmp_path, "forkserver")
    assert len(pids) == 2
    time.sleep(1)  # the workers have fetched their slots: torch's own thread would tell of a transfer that is cut off
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.count("Traceback") == 1
    assert errors.strip().endswith("KeyboardInterrupt")
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_end_when_the_training_process_is_killed(preparing: ModuleType, tmp_path: Path) -> None:
    process, pids = run_script(preparing, tmp_path, "forkserver")
    process.kill()
    process.communicate(timeout=20)
    assert wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.mark.slow
def test_workers_work_when_they_are_spawned(preparing: ModuleType, tmp_path: Path) -> None:
    expected = [content(preparing.Prepare()(numbers, 5)) for numbers in PLAN]
    with Loader(workers=2, threads=1, start_method="spawn") as loader:
        assert [content(batch) for batch in loader.batches(preparing.Prepare(), PLAN, epoch=5)] == expected
        with pytest.raises(ResourceError, match="SIGKILL"):
            list(loader.batches(preparing.Dies(), PLAN, epoch=0))
    process, pids = run_script(preparing, tmp_path, "spawn")
    time.sleep(3)  # as above
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.count("Traceback") == 1
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_workers_start_without_the_locks_of_running_threads(
    preparing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    class Chosen(Exception):  # noqa: N818
        pass

    def choose(method: str) -> None:
        chosen.append(method)
        raise Chosen

    monkeypatch.setattr("multiprocessing.get_context", choose)
    for platform in ("linux", "darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        with pytest.raises(Chosen):
            next(Loader(workers=1, threads=1).batches(preparing.Prepare(), PLAN, epoch=0))
    assert chosen == ["forkserver", "spawn", "spawn"]


def test_joined_batches_keep_the_places_of_problems(preparing: ModuleType) -> None:
    parts = [preparing.Prepare()(numbers, 1) for numbers in ([1, 3], [8, 2, 13])]
    assert content(join_batches(parts)) == content(preparing.Prepare()([1, 3, 8, 2, 13], 1))


@given(st.integers(1, 256), st.booleans(), st.booleans())
def test_workers_leave_a_core_for_the_training_process(cores: int, is_cached: bool, has_gpu: bool) -> None:
    workers, reason = auto_workers(cores=cores, is_cached=is_cached, has_gpu=has_gpu)
    assert 0 <= workers < cores
    assert reason
    if has_gpu and cores > 1:
        assert workers >= 1
    if is_cached and not has_gpu:
        assert workers == 0


UNGUARDED = """
import sys
sys.path.insert(0, {folder!r})
from preparing_of_test_loader import Facts
from fieldmark.data.loader import Loader

print("script runs", flush=True)
with Loader(workers=2, threads=1) as loader:
    print(*[int(batch.numbers[0]) for batch in loader.batches(Facts(), [[0], [0]], epoch=0)], flush=True)
"""


def test_a_script_without_a_guard_runs_once(preparing: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(folder=str(Path(str(preparing.__file__)).parent)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("script runs") == 1
    assert len(done.stdout.splitlines()[1].split()) == 2
