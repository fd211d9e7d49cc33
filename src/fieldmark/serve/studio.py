"""The page of `fieldmark app`: choose photos, look at them, train, and use what comes of it.

All state is in folders below a root, so that another server finds it again. For a training, `fieldmark-runs` holds
NAME.json (what was asked, and which process does it), NAME.txt (what that printed), and NAME, an ordinary run folder.
"""

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
import time
import zipfile
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.background import BackgroundTask
from starlette.types import Receive, Scope, Send

from fieldmark.budget.candidates import find_backbones
from fieldmark.budget.plan import PLAN
from fieldmark.budget.run import FLOOR_SHARE, PROBE_SHARE, RACE_SHARE
from fieldmark.budget.tune import LEAST_EPOCHS
from fieldmark.config import Config, load_config
from fieldmark.data.folders import is_photo_path, is_skipped, natural_key
from fieldmark.errors import DataError, FieldmarkError, RunError
from fieldmark.export.export import KINDS
from fieldmark.files import exclusive_lock, write_whole
from fieldmark.inference import triage
from fieldmark.plots import thumbnail
from fieldmark.runs import folder
from fieldmark.runs.check import NEAR_DISTANCE_BITS
from fieldmark.runs.dataset import decode_spec, find_photos
from fieldmark.runs.environment import start_module, usable_cores
from fieldmark.runs.folder import Run
from fieldmark.runs.writer import LOCK
from fieldmark.serve.limits import Access, Limits
from fieldmark.serve.review import open_review, require_json
from fieldmark.serve.server import finish_app, open_app
from fieldmark.serve.service import ServerMetrics
from fieldmark.training.metrics import wilson_interval

RUNS, PHOTOS = "fieldmark-runs", "fieldmark-photos"
_LIMITS = Limits(max_held_bytes=2**28, body_seconds=60.0, answer_seconds=60.0)
_MOST_LISTED = 2000  # entries of a folder
_SHOWN = 8  # photos, lines
_MOST_ENTRIES, _MOST_UNPACKED = 200_000, 20 * 10**9  # photos of a zip, and their bytes
_LONGEST_NAME = 200  # bytes


class Asked(BaseModel):
    """What a training was asked for, as NAME.json holds it."""

    data: str  # folder of the photos, relative to the root
    minutes: float
    asked: float  # seconds since 1970
    settings: list[str] = []  # as `key=value`, besides those of all trainings
    pid: int | None = None  # None while it waits for its turn
    started: float = 0.0


class Studio:
    """Photos and trainings below a root; nothing outside it is read or written, wherever links lead."""

    def __init__(self, root: Path, overrides: Sequence[str]) -> None:
        self.root = root.resolve()
        self.overrides = ("data.broken=skip", *overrides)  # settings of all checks and trainings
        if not self.root.is_dir():
            raise DataError(f"{root} is not a folder: give --root the folder that holds your photos")
        self.runs = self.inside(RUNS)
        self._checked: tuple[str, subprocess.Popen[bytes] | None] = "", None
        self._children: list[subprocess.Popen[bytes]] = []  # kept so that the system forgets them when they end

    def inside(self, path: str) -> Path:
        """The real place of a path below the root; a DataError where it is hidden, or elsewhere by a link or .."""
        with suppress(OSError, ValueError, RuntimeError):
            real = (self.root / path).resolve()
            if real == self.root or (real.is_relative_to(self.root) and not is_skipped(self.shown(real))):
                return real
        raise DataError(f"{path!r} is hidden, or leads out of {self.root}: put the photos themselves there")

    def shown(self, path: Path) -> str:
        """A path as the page knows it: relative to the root."""
        return path.relative_to(self.root).as_posix()

    def list_folder(self, path: str = "") -> dict[str, Any]:
        """Folders in a folder with the number of photos in each, and the first photo of some of them."""
        here = self.inside(path)
        photos, folders = self._list(here)
        inner = {self.shown(one): self._list(one)[0] for one in folders}
        return {
            "root": str(self.root),
            "path": self.shown(here),
            "folders": [{"path": one, "photos": len(within)} for one, within in inner.items()],
            "samples": [each[0] for each in (photos, *inner.values()) if each][:_SHOWN],
        }

    def _list(self, here: Path) -> tuple[list[str], list[Path]]:
        """The first photos, as the page knows them, and folders in a folder: none where it may not be read."""
        photos: list[str] = []
        folders: list[Path] = []
        key = natural_key()
        with suppress(OSError):
            for place in sorted(islice(here.iterdir(), _MOST_LISTED), key=lambda one: key(one.name)):
                with suppress(DataError):  # is not offered
                    real = self.inside(self.shown(place))
                    if real.is_dir() and real != self.runs and place.name.isprintable():
                        folders.append(real)
                    elif is_photo_path(place.name) and place.name.isprintable():
                        photos.append(self.shown(place))
        return photos, folders

    def open_data(self, path: str) -> Path:
        """A folder of photos without a link that leads out of the root: checks and trainings follow links."""
        data = self.inside(path)
        seen, waiting = {data}, [data]
        while waiting:
            for entry in waiting.pop().iterdir():
                real = self.inside(self.shown(entry)) if entry.is_symlink() else entry
                if real.is_dir() and real not in seen and not is_skipped(entry.name):
                    seen.add(real)
                    waiting.append(real)
        return data

    def read_photo(self, path: str, side: Annotated[int, Query(ge=32, le=1600)] = 240) -> Response:
        """A photo below the root as a JPEG of at most so many pixels a side."""
        place = self.inside(path)
        if not is_photo_path(place.name):
            raise DataError(f"{path!r} is no photo")
        content = thumbnail(place, side, decode_spec(Config().data))
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    def check(self, path: str, is_new: bool = False) -> dict[str, Any]:
        """How far the check of a folder is, and what it found; a new one begins where it is asked for.

        It is a process of its own: what it measures must not be disturbed by a model that answers here.
        """
        if is_new or self._checked[0] != path:
            data = str(self.open_data(path))
            if not is_new and self._checked[1]:
                said = ["Another check has begun since: look at the photos again."]
                return {"is_done": True, "said": said, "found": None}
            self.runs.mkdir(exist_ok=True)
            if self._checked[1]:
                self._checked[1].kill()
            self._checked = path, self._spawn(".check", "check", data, "--json", *self._settings())
        is_done = self._checked[1] is not None and self._checked[1].poll() is not None
        text = (self.runs / ".check.txt").read_text(encoding="utf-8", errors="replace")
        said, _, found = text.partition("\n{\n")
        state: dict[str, Any] = {"is_done": is_done, "said": said.split("\n"), "found": None}
        if is_done and found:
            config = load_config(None, [*self.overrides, f"data.path={self.inside(path)}"])
            samples: dict[str, list[str]] = {}
            for photo in find_photos(config.data).photos:
                samples.setdefault(photo.label or "", []).append(photo.path)
            firsts = {label: paths[:3] for label, paths in samples.items()}
            plan = {"floor": FLOOR_SHARE, "race": RACE_SHARE, "probe": PROBE_SHARE, "least_epochs": LEAST_EPOCHS}
            state["found"] = {**json.loads("{" + found), "samples": firsts, "plan": plan}
        return state

    def _settings(self, more: Sequence[str] = ()) -> list[str]:
        return [word for setting in (*self.overrides, *more) for word in ("--set", setting)]

    def ask(
        self, path: str, minutes: Annotated[float, Query(ge=0.1, le=10_080)], mended: str = "", is_single: bool = False
    ) -> dict[str, str]:
        """Put a training at the end of the queue, and give its name.

        The labels that were `mended` in another one may count, and the answer may be of one network, for an export.
        """
        data = self.open_data(path)
        settings = [f"data.corrections={self.table(mended)}"] if mended else []
        if is_single:  # any two have more parameters together
            smallest = find_backbones(load_config(None, self.overrides))[0].parameters / 1e6
            settings.append(f"model.max_parameters_millions={1.9 * smallest:.2f}")
        stem = re.sub(r"[^\w-]+", "-", data.name).strip("-")[:60] or "photos"
        self.runs.mkdir(exist_ok=True)
        with self._alone():
            taken = {entry.name.partition(".")[0] for entry in self.runs.iterdir()}
            name = next(name for number in count(1) if (name := f"{stem}-{number}") not in taken)
            asked = Asked(data=self.shown(data), minutes=minutes, asked=time.time(), settings=settings)
            self._write(name, asked)
        self.advance()
        return {"name": name}

    def stop(self, name: str) -> None:
        """Ask a training to stop, which keeps its best model so far; one that waits is forgotten."""
        with self._alone():
            asked = self._read(name)
            if asked.pid is None:
                (self.runs / f"{name}.json").unlink()
            elif process := self._process(name, asked):
                # With the effect of SIGINT, to which a program that was begun in the background may be deaf.
                process.terminate()

    def advance(self) -> None:
        """Begin the training that waits longest, unless one is running."""
        self._children = [child for child in self._children if child.poll() is None]
        if not self.runs.is_dir():
            return
        with self._alone():
            known = self._known()
            waiting = [name for name, asked in known.items() if asked.pid is None]
            if waiting and not any(self._process(name, asked) for name, asked in known.items()):
                name = min(waiting, key=lambda one: known[one].asked)
                asked = known[name]
                words = [str(self.root / asked.data), "--out", str(self.runs / name), "--minutes", f"{asked.minutes:g}"]
                child = self._spawn(name, "train", *words, *self._settings(asked.settings))
                self._write(name, asked.model_copy(update={"pid": child.pid, "started": time.time()}))

    def _spawn(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command of ours that outlives this server, with what it prints in NAME.txt."""
        with (self.runs / f"{name}.txt").open("wb") as output:
            child = start_module("fieldmark", *words, output=output)
        self._children.append(child)
        return child

    def list_runs(self) -> list[dict[str, Any]]:
        """All trainings, the newest first."""
        rows = [self._describe(name, asked) for name, asked in self._known().items()]
        return sorted(rows, key=lambda row: -row["asked"])

    def describe(self, name: str) -> dict[str, Any]:
        """What there is to know of one training: its log, and what its model says of validation photos."""
        row, path = self._describe(name, self._read(name)), self.runs / name
        row |= {"doing": _last_lines(path / PLAN, 1), "log": _last_lines(path / folder.LOG, _SHOWN)}
        row["exports"] = [
            {"to": to, "is_there": self._export(name, to).is_dir(), "said": _last_lines(said, 1)}
            for to in KINDS
            if (said := self.runs / f"{name}.{to}.txt").is_file()
        ]
        with suppress(RunError):  # there is no model yet, or for a moment its files are of two
            run = Run(path)
            found = triage.join_held_out([run])
            total, right = len(found.labels), int((found.guesses == found.labels).sum())
            some = np.linspace(0, total - 1, min(_SHOWN, total)).round().astype(int).tolist()
            row["accuracy"] = [right / total, *wilson_interval(right, total)]
            row["num_val"] = total
            row["examples"] = [
                {
                    "path": f"{row['data']}/{found.paths[number]}",
                    "label": run.classes[found.labels[number]],
                    "guess": run.classes[found.guesses[number]],
                    "probability": float(found.probabilities[number].max()),
                }
                for number in some
            ]
        return row

    def _describe(self, name: str, asked: Asked) -> dict[str, Any]:
        path = self.runs / name
        status = folder.run_status(path)
        ended = {"finished": "finished", "missing": "failed"}.get(status, "stopped")
        return {
            "name": name,
            **asked.model_dump(),
            "state": "queued" if asked.pid is None else "running" if self._process(name, asked) else ended,
            "left": asked.started + 60 * asked.minutes - time.time(),
            "has_model": status != "missing",
            "is_ensemble": (path / folder.ENSEMBLE).is_file(),
            "is_mended": (self.runs / f"{name}.corrections.csv").is_file(),
            "summary": Run(path).summary if status != "missing" else {},
            "printed": _last_lines(self.runs / f"{name}.txt", 3),
        }

    def find_run(self, name: str) -> Path:
        """The run folder of a training that has a model."""
        self._read(name)
        path = self.inside(f"{RUNS}/{name}")
        if folder.run_status(path) == "missing":
            raise RunError(f"{name!r} has no model yet: wait until it has")
        return path

    def open_predictor(self, run: Path) -> FastAPI:
        """The page of `fieldmark serve` for a training; it also offers photos of validation."""
        self.open_data(self._read(run.name).data)
        return open_app(run, usable_cores(), limits=_LIMITS, access=Access())

    def open_review(self, run: Path) -> FastAPI:
        """The page of `fieldmark review` for a training."""
        asked, table = self._read(run.name), self.table(run.name)
        self.open_data(asked.data)
        old = [one.partition("=")[2] for one in asked.settings if one.startswith("data.corrections=")]
        if old and not table.is_file():  # what was mended before counts on
            shutil.copyfile(old[0], table)
        return open_review([Run(run)], table, max_distance=NEAR_DISTANCE_BITS)

    def table(self, name: str) -> Path:
        """The table of labels that were mended in the review of a training."""
        self._read(name)
        return self.runs / f"{name}.corrections.csv"

    def export(self, name: str, to: str) -> None:
        """Begin to write the model of a training for elsewhere."""
        out = self._export(name, to)
        self._spawn(out.name, "export", str(self.find_run(name)), "--to", to, "--out", str(out))

    def _export(self, name: str, to: str) -> Path:
        if to not in KINDS:
            raise DataError(f"there is no form {to!r}: give one of {', '.join(KINDS)}")
        return self.runs / f"{name}.{to}"

    def download(self, name: str, to: str = "") -> Response:
        """A run folder, or an export of it, as a zip."""
        run = self.find_run(name)
        place = self._export(name, to) if to else run
        if not place.is_dir():
            raise RunError(f"{name!r} is not there as {to}: export it first")
        archive = shutil.make_archive(str(self.runs / f".{place.name}"), "zip", self.runs, place.name)
        return FileResponse(archive, filename=f"{place.name}.zip", background=BackgroundTask(Path(archive).unlink))

    async def add(self, request: Request, to: str, path: str, offset: int, is_last: bool) -> dict[str, str]:
        """Keep the next piece of a file that was dropped: of a photo, as CLASS/NAME, or of a zip with such photos."""
        place = self.inside(f"{PHOTOS}/{_split_name(to)[0]}")
        part = place.with_name(f"{place.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}.part")
        part.parent.mkdir(exist_ok=True)
        with part.open("ab" if offset else "wb") as file:
            if file.tell() != offset:
                raise DataError("the pieces did not come in order: drop the file again")
            file.write(await request.body())
        if is_last:
            try:
                await asyncio.to_thread(self._take, place, path, part)
            finally:
                part.unlink()
        return {"path": self.shown(place)}

    def _take(self, place: Path, path: str, part: Path) -> None:
        if not path.lower().endswith(".zip"):
            self._keep(place, path, part.read_bytes())
            return
        try:
            with zipfile.ZipFile(part) as archive:
                entries = {one.filename: one for one in archive.infolist() if is_photo_path(one.filename)}
                total = sum(one.file_size for one in entries.values())
                if total > _MOST_UNPACKED or len(entries) > _MOST_ENTRIES:
                    raise DataError(f"{path!r} holds {len(entries)} photos of {total / 1e9:.1f} GB: drop smaller zips")
                list(map(_split_name, entries))  # all of them, before anything is written
                for name, entry in entries.items():
                    self._keep(place, name, archive.read(entry))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, zlib.error) as error:
            raise DataError(f"{path!r} cannot be read: {error}. Make it anew, without a password") from None

    def _keep(self, place: Path, path: str, content: bytes) -> None:
        """Write a photo under its name and a digest: another one of that name stays."""
        *folders, name = _split_name(path)
        if not is_photo_path(name):
            raise DataError(f"{path!r} is no photo: drop photos, or a zip with a folder of photos for each class")
        stem, _, extension = name.rpartition(".")
        parent = self.inside(self.shown(place.joinpath(*folders)))
        parent.mkdir(parents=True, exist_ok=True)
        write_whole(parent / f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}.{extension}", content)

    def _process(self, name: str, asked: Asked) -> psutil.Process | None:
        """The process of a training, while it lives; another one may have its number by now."""
        with suppress(psutil.Error):
            process = psutil.Process(asked.pid or 0)
            if process.status() != psutil.STATUS_ZOMBIE and str(self.runs / name) in process.cmdline():
                return process
        return None

    def _known(self) -> dict[str, Asked]:
        known: dict[str, Asked] = {}
        for file in self.runs.glob("*.json"):
            if re.fullmatch(r"[\w-]+", file.stem) and not file.is_symlink():
                with suppress(OSError, ValidationError):
                    known[file.stem] = Asked.model_validate_json(file.read_bytes())
        return known

    def _read(self, name: str) -> Asked:
        asked = self._known().get(name)
        if asked is None:
            raise RunError(f"there is no training {name!r} in {self.runs}")
        return asked

    def _write(self, name: str, asked: Asked) -> None:
        folder.write_json(self.runs / f"{name}.json", asked.model_dump())

    def _alone(self) -> AbstractContextManager[None]:
        """Keep other requests, and other servers over the same folder, from the queue."""
        return exclusive_lock(self.runs / LOCK, busy="the queue is being changed: try again", wait_seconds=10)

    @asynccontextmanager
    async def keep_advancing(self, _: object) -> AsyncGenerator[None]:
        """Begin trainings as their turns come, to the end of the block."""

        async def advance_each_second() -> None:
            while True:
                with suppress(FieldmarkError, OSError):
                    await asyncio.to_thread(self.advance)
                await asyncio.sleep(1)

        task = asyncio.create_task(advance_each_second())
        yield
        task.cancel()


class OneRun:
    """An ASGI app for one run at a time: opened when its run is asked for, closed when another one is."""

    def __init__(self, find: Callable[[str], Path], open_app: Callable[[Path], FastAPI]) -> None:
        self._find, self._open_app = find, open_app
        self._lock, self._stack = asyncio.Lock(), AsyncExitStack()
        self._opened: tuple[str, float] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        path = await asyncio.to_thread(self._find, scope["path_params"]["name"])
        wanted = path.name, (path / folder.SUMMARY).stat().st_mtime  # while it trains, its model is replaced
        async with self._lock:
            if wanted != self._opened:
                self._opened = None
                await self._stack.aclose()
                self._app = await asyncio.to_thread(self._open_app, path)
                await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))
                self._opened = wanted
            app = self._app
        await app(scope, receive, send)


class _Json(JSONResponse):
    """JSON that may hold names which are not valid Unicode."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def create_studio_app(root: Path, overrides: Sequence[str]) -> FastAPI:
    """The ASGI app over the photos and trainings below a root; `overrides` are settings, as `key=value`."""
    studio = Studio(root, overrides)
    app = FastAPI(title="Fieldmark", docs_url=None, redoc_url=None, lifespan=studio.keep_advancing)

    async def refuse(_: Request, error: Exception) -> Response:
        return _Json({"detail": str(error)}, status_code=422)

    app.add_exception_handler(FieldmarkError, refuse)
    app.add_exception_handler(OSError, refuse)  # a folder that is gone, or may not be read or written
    app.state.studio = studio
    for method in (studio.list_folder, studio.list_runs, studio.describe):
        app.add_api_route(f"/api/{method.__name__}", method, response_model=None, response_class=_Json)
    for method in (studio.check, studio.ask, studio.stop, studio.export):
        app.add_api_route(f"/api/{method.__name__}", method, methods=["POST"], response_model=None,
                          response_class=_Json, dependencies=[Depends(require_json)])  # fmt: skip
    own = [Depends(_require_own_page)]
    app.add_api_route("/api/add", studio.add, methods=["POST"], dependencies=own)
    app.add_api_route("/download/{name}", studio.download, response_model=None, dependencies=own)
    app.add_api_route("/photo", studio.read_photo, response_model=None)
    app.mount("/try/{name}", OneRun(studio.find_run, studio.open_predictor))
    app.mount("/review/{name}", OneRun(studio.find_run, studio.open_review))
    finish_app(app, {"/": "studio.html"}, ServerMetrics(), limits=_LIMITS, access=Access())
    return app


async def _require_own_page(request: Request) -> None:
    """Refuse a form or a link on a page of another site, by what every browser says of its requests."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise HTTPException(403, "pages of other sites may not ask")


def _split_name(path: str) -> list[str]:
    """The folders and the name in a path from outside, which must be possible on every system."""
    names = [name.strip() for name in path.split("/")]
    for name in names:
        is_plain = name.isprintable() and not is_skipped(name) and not re.search(r'[\\:*?"<>|]', name)
        if not name or not is_plain or len(name.encode()) > _LONGEST_NAME:
            raise DataError(f"{path!r} cannot be a name here: use letters, digits, blanks and -, and not too many")
    return names


def _last_lines(path: Path, most: int) -> list[str]:
    """The last whole lines of a text file, if there is one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[-most - 1 : -1]
    except OSError:
        return []
