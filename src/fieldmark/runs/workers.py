"""A training in processes on a Ray cluster. What passes between them and their caller are files that all can see."""

import logging
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from torch import distributed

from fieldmark import errors
from fieldmark.config import Config, parse_config
from fieldmark.data.storage import is_url, resolve
from fieldmark.files import write_whole
from fieldmark.progress import Logged, Progress, open_progress
from fieldmark.runs import folder
from fieldmark.runs.cluster import open_cluster, share_out
from fieldmark.runs.train import STOP_FILE, StopRequest, format_epoch, resume, stop_requests, train
from fieldmark.runs.writer import refuse_used_folder

MAX_LOSSES = 10
TOLD, STOP = "told.txt", "stop"  # files beside the run folder


def train_on_ray(
    config: Config, path: Path, *, address: str, is_new: bool, data: str | None = None, progress: Progress
) -> None:
    """Train, or go on, in as many processes on a Ray cluster as the settings say.

    Where one is lost, as many as there is room for go on from the last save, with the same batches.
    """
    if is_new:
        refuse_used_folder(path)
    else:
        config = folder.Run(path).config
    run, workers = path.resolve(), config.train.devices * config.train.nodes
    run.parent.mkdir(parents=True, exist_ok=True)
    again = errors.command("train", "--resume", path, f"--ray={address}")
    beside = TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent)
    with beside as books, open_cluster(address) as ray, stop_requests() as stop:
        needs = share_out(ray, workers, at_least=workers if is_new else 1)
        run.mkdir(exist_ok=True)
        job = {"settings": config.model_dump(mode="json"), "run": str(run), "data": data and resolve(data)}
        job |= {"books": books, "cwd": str(Path.cwd()), "command": sys.argv}
        for _ in range(MAX_LOSSES):
            error = _attempt(job, workers, needs, stop, progress)
            cause = error and _find_cause(error)
            if error is None or (cause is None and folder.run_status(run) == "finished"):
                return
            if stop and (cause is None or isinstance(cause, errors.InterruptedRunError)):
                raise errors.InterruptedRunError(f"stopped by {stop.signal_name}, all is saved. Go on with: {again}")
            if cause is not None:
                raise cause
            Logged(progress, run / folder.LOG).message(
                "a worker or its machine was lost: training goes on from the last save with the workers that are there"
            )
    raise errors.ResourceError(f"workers were lost {MAX_LOSSES} times. Did they run out of memory? Go on with: {again}")


def _attempt(
    job: dict[str, Any], workers: int, needs: dict[str, float], stop: StopRequest, progress: Progress
) -> BaseException | None:
    """Let Ray's trainer run the processes to their end; pass on what they tell, and to them a request to stop."""
    with errors.needs_extra("ray[train]", "ray"):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    run, books, failed = Path(job["run"]), Path(job["books"]), list[BaseException]()
    trainer = TorchTrainer(
        _work,
        train_loop_config=job,
        torch_config=TorchConfig(timeout_s=6 * 3600),  # the others wait while the first looks at all photos
        # Where machines come back, Ray ends the processes and starts more.
        scaling_config=ScalingConfig(num_workers=(1, workers), use_gpu="GPU" in needs, resources_per_worker=needs),
        run_config=RunConfig(name="ray", storage_path=str(books)),
    )

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    thread, is_running = Thread(target=fit, daemon=True), True  # in a thread, so that signals stay ours
    thread.start()
    with (books / TOLD).open("a+", encoding="utf-8") as told:
        while is_running:
            thread.join(0.5)
            is_running = thread.is_alive()
            for line in told:
                progress.message(line.rstrip("\n"))
            if stop and is_running and not (run / folder.STATE).exists():
                raise errors.InterruptedRunError(f"stopped by {stop.signal_name} before there was anything to save")
            if stop and not (books / STOP).exists():
                write_whole(books / STOP, stop.signal_name)
    return failed[0] if failed else None


def _find_cause(error: BaseException) -> BaseException | None:
    """Give what ended the processes: None where one of them, or its machine, was lost."""
    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    told = [one for _, one in sorted(failures.items()) if not isinstance(one, errors.ReportedElsewhereError)]
    ours = [one for one in told if isinstance(one, errors.FieldmarkError)]
    is_lost = not told or any(type(one).__module__.startswith("ray.") for one in told)
    return ours[0] if ours else None if is_lost else told[0]


def _work(job: dict[str, Any]) -> None:
    """Be one of the processes: begin the run, or go on from its last save."""
    run, books = Path(job["run"]), Path(job["books"])
    with suppress(OSError):
        os.chdir(job["cwd"])  # relative paths of the settings begin there
    sys.argv = job["command"]  # for environment.json
    os.environ[STOP_FILE] = str(books / STOP)
    known = (
        str(folder.Run(run).data_info["root"]) if (run / folder.STATE).is_file() else job["settings"]["data"]["path"]
    )
    for place in (job["run"], job["data"] or known):
        if not is_url(place) and not Path(place).exists():
            raise errors.DataError(
                f"a worker on {platform.node()} does not see {place}: all machines must find the run folder and the "
                "photos at the same path. Share these folders, or name the photos by a URL"
            )
    # A network file system may still show some machines what was there before the last save.
    seen: list[object] = [None, *range(1, distributed.get_world_size())]
    while any(one != seen[0] for one in seen):
        time.sleep(0.1)
        files = [run / name for name in (folder.RECIPE, folder.STATE)]
        distributed.all_gather_object(seen, [file.stat().st_mtime_ns for file in files if file.exists()])
    logging.getLogger("fieldmark").propagate = False  # Ray would take what is to be told
    with (books / TOLD).open("a", encoding="utf-8") as stream, open_progress("train", stream=stream) as progress:
        if (run / folder.RECIPE).is_file():
            reports = resume(run, data=job["data"], progress=progress)
        else:
            reports = train(parse_config(job["settings"]), run, progress=progress)
        for report in reports:
            if distributed.get_rank() == 0:
                progress.message(format_epoch(report))
