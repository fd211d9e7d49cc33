"""Accuracy that minutes of this machine buy: ours beside scikit-learn, timm's own script, fastai and AutoGluon.

    python -m benchmarks.budget [--quick] [--json FILE] [--minutes 1,3,10] [--data birds100,clothing10,signs10,elpv]
                                [--seeds N] [--timm-script PATH/TO/timm/train.py] [--autogluon-python PATH/TO/python]

Peers start from the same weights, those of EfficientNet-Lite0; ours takes what its installation brings, and a second
row takes Lite0 alone. Time counts from the start of a command to a prediction file for the test photos. How many epochs
of a peer fit is found by a short trial that does not count. Results that FILE holds already are not measured again.
AutoGluon asks for other versions of torch and timm, so it runs under the interpreter of an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.labeled import NAMES, QUICK_CLASSES, DataError, DataSet, open_data, score
from benchmarks.record import PHOTOS, add_timm_script, finish, load_average, make_parser, make_record
from benchmarks.rivals import BATCH_SIZE, MODEL, TEST_SIZE, Task, save_weights
from benchmarks.scoreboard import HAND, OURS, OURS_ALONE, Row, describe, format_table, make_row

SIZES = (TEST_SIZE // 2, TEST_SIZE)

FILL = 0.95
"""Share of the budget that a peer's plan fills: the rest is for what the trial did not foresee."""

LEAST_FILL = 0.8
"""A peer whose run took a smaller share of the budget, or more than all of it, plans and runs once more."""

RUN_LIMIT_SECONDS = 3 * 3600.0
"""A peer that is not at its end by then is stuck."""

ALONE = (f"model.name={MODEL}", "model.weights=package:efficientnet-lite0")
"""Settings of ours with EfficientNet-Lite0 alone."""

TRIAL_UPDATES = 8

TRIAL_SECONDS = 15.0
"""Time limit of AutoGluon's trial: its start and its end come on top, and a budget must leave room for them."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    data: tuple[str, ...]
    minutes: tuple[float, ...]
    seeds: int
    """Of every budget; 0 is three up to three minutes, and one above."""
    contenders: tuple[str, ...]
    is_small: bool


@dataclass(frozen=True)
class Cost:
    """What a trial found a peer's training to cost, in seconds.

    Attributes:
        fixed: Starting, reading weights, predicting, writing: all but training.
        update: Of one update.
        frozen: Of one update of the frozen epoch that comes first; 0 for a peer without one.
        validation: After each epoch.
    """

    fixed: float
    update: float
    frozen: float = 0.0
    validation: float = 0.0


class FailedError(Exception):
    """A command died or did not end; the message holds the end of what it said."""


def make_plan(*, is_quick: bool, minutes: str, data: str, seeds: int, contenders: str) -> Plan:
    """Read the options; the quick plan is a part of birds100 at one minute, by ours and by hand.

    Raises:
        ValueError: A name or number is not one.
    """
    names = tuple(data.split(",")) if data else NAMES[:1] if is_quick else NAMES
    everybody = list_contenders()
    chosen = tuple(contenders.split("+")) if contenders else (OURS, HAND) if is_quick else tuple(everybody)
    for given, known in ((names, NAMES), (chosen, everybody)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"no such name: {', '.join(unknown)}; there are {', '.join(known)}")
    amounts = tuple(float(part) for part in (minutes or ("1" if is_quick else "1,3,10")).split(","))
    if min(amounts) <= 0 or seeds < 0:
        raise ValueError("minutes and seeds must be larger than 0")
    return Plan(names, amounts, seeds or int(is_quick), chosen, is_quick)


def list_contenders() -> dict[str, Task | None]:
    """Everybody by name, with what is the same on all data; ours are run by their own commands."""
    task = Task("", "", "", "", "", "")
    everybody: dict[str, Task | None] = {OURS: None, OURS_ALONE: None, HAND: replace(task, kind="scikit-learn")}
    for kind, name in (("timm", "timm train.py"), ("fastai", "fastai fine_tune")):
        everybody |= {f"{name} @{size}": replace(task, kind=kind, size=size) for size in SIZES}
    return everybody | {"AutoGluon": replace(task, kind="autogluon")}


def list_races(plan: Plan) -> list[tuple[str, float, int, str]]:
    """Data, minutes, seed and contender of each measurement, in order.

    All contenders take their turn before the next seed, in an order that rotates, so that what disturbs the machine
    disturbs all alike. Logistic regression takes the time that it takes: it runs once for each data set, as minutes 0.
    """
    races: list[tuple[str, float, int, str]] = []
    rounds = 0
    for minutes in sorted(set(plan.minutes)):
        for seed in range(plan.seeds or (3 if minutes <= 3 else 1)):
            for data in plan.data:
                turn = rounds % max(len(plan.contenders), 1)
                rounds += 1
                for name in plan.contenders[turn:] + plan.contenders[:turn]:
                    race = (data, 0.0, 0, name) if name == HAND else (data, minutes, seed, name)
                    if race not in races:
                        races.append(race)
    return races


def fit_epochs(cost: Cost, seconds: float, *, updates: int) -> tuple[int, int] | None:
    """Return epochs and updates of each that fill a time; None where not one update fits.

    A peer with a frozen epoch takes whole epochs where one of either kind fits, and else a part of the photos. The
    others may take somewhat shorter epochs, where that fills the time better.

    Args:
        cost: What the trial found.
        seconds: The budget.
        updates: Of an epoch of all photos.
    """
    room = FILL * seconds - cost.fixed
    if not cost.frozen:
        total = int((room - cost.validation) / cost.update)
        if total < 1:
            return None
        longer = math.ceil(total / updates)
        choices = [(longer, total // longer), (total // updates, updates)]
        return max(choices, key=lambda choice: choice[0] * choice[1])
    frozen, tuned = updates * cost.frozen + cost.validation, updates * cost.update + cost.validation
    if room >= frozen + tuned:
        return int((room - frozen) / tuned), updates
    part = int((room - 2 * cost.validation) / (cost.frozen + cost.update))
    return (1, part) if part >= 1 else None


class Measuring:
    """The commands of one session: trials are made once for each peer and data set.

    Args:
        folder: For everything that is written.
        data: Data sets by the names of the plan.
        timm_script: timm's train.py; empty where it is not at hand.
        device: `cpu` or `cuda`, of the peers; ours chooses by itself.
        cores: Of this machine.
        autogluon_python: Interpreter of the environment that has AutoGluon.
    """

    def __init__(
        self,
        folder: Path,
        data: Mapping[str, DataSet],
        *,
        timm_script: str,
        device: str,
        cores: int,
        autogluon_python: str = sys.executable,
    ) -> None:
        self._folder = folder
        self._data = data
        self._timm_script = timm_script
        self._autogluon_python = autogluon_python
        self._device = device
        self._workers = max(cores - 1, 1)
        self._costs: dict[tuple[str, str], Cost] = {}
        self._runs = 0
        self._weights = folder / "lite0.pth"

    def race(self, data_name: str, minutes: float, seed: int, contender: str) -> Row | None:
        """Measure one contender once; None where not one update fits into the time.

        Raises:
            FailedError: It died.
        """
        data, task = self._data[data_name], list_contenders()[contender]
        if task is None:
            settings = ALONE if contender == OURS_ALONE else ()
            parts, place, given = self.run_ours(data, minutes, seed, settings=settings)
            seconds = sum(parts)
            plan: dict[str, Any] = {"minutes": given, "seconds": [round(part, 2) for part in parts]}
        else:
            fitted = self._fit(contender, task, data, minutes)
            if fitted is None:
                return None
            chosen, plan = fitted
            seconds, place = self.run_peer(replace(chosen, seed=seed), data)
            # Other work during the trial makes a bad plan: what the run itself cost then makes a second one.
            # AutoGluon stops by itself when its epochs are over, so that it ran for too short a time says nothing.
            least = 0 if task.kind == "autogluon" else LEAST_FILL
            if plan and not least <= seconds / (60 * minutes) <= 1:
                self._costs[contender, data.name] = read_cost(seconds, place)
                again = self._fit(contender, task, data, minutes)
                if again is not None and again[0] != chosen:
                    plan = again[1]
                    seconds, place = self.run_peer(replace(again[0], seed=seed), data)
        right = score(data, place / "prediction.csv")
        return make_row(contender, data, minutes, seed, seconds=seconds, right=right, plan=plan)

    def run_ours(
        self, data: DataSet, minutes: float, seed: int, *, settings: Sequence[str]
    ) -> tuple[list[float], Path, float]:
        """Train and predict by the two commands of a user, with nothing kept from earlier runs.

        Returns:
            Seconds of both commands, their folder, and the minutes that training was given.
        """
        place = self._new_place()
        given = round(minutes - reserve_seconds(60 * minutes, len(data.truth)) / 60, 3)
        program = [sys.executable, "-m", "fieldmark"]
        train = ["train", str(data.folder), "--minutes", str(given), "--out", str(place / "run"), "--seed", str(seed)]
        predict = ["predict", str(place / "run"), str(data.photos), "--out", str(place / "prediction.csv")]
        options = [word for setting in settings for word in ("--set", setting)]
        commands = [[*program, *train, *options], [*program, *predict]]
        return run_commands(commands, place, limit_seconds=240 * minutes + 300), place, given

    def _fit(self, contender: str, task: Task, data: DataSet, minutes: float) -> tuple[Task, dict[str, Any]] | None:
        if task.kind == "scikit-learn":
            return task, {}
        key = (contender, data.name)
        if key not in self._costs:
            self._costs[key] = self._try_out(task, data)
        cost = self._costs[key]
        if task.kind == "autogluon":
            limit = round(FILL * 60 * minutes - cost.fixed, 2)
            plan = {"time_limit": limit, "trial": {"fixed": round(cost.fixed, 3)}}
            return (replace(task, seconds=limit), plan) if limit > 0 else None
        whole = max(data.count("train") // BATCH_SIZE, 1)
        fitted = fit_epochs(cost, 60 * minutes, updates=whole)
        if fitted is None:
            return None
        epochs, updates = fitted
        rounded = {name: round(value, 3) for name, value in asdict(cost).items()}
        chosen = replace(task, epochs=epochs, updates=0 if updates == whole else updates)
        return chosen, {"epochs": epochs, "updates": updates, "trial": rounded}

    def _try_out(self, task: Task, data: DataSet) -> Cost:
        """Two short epochs, or a short time limit, with everything else that a whole run does."""
        updates = min(TRIAL_UPDATES, max(data.count("train") // BATCH_SIZE, 1))
        seconds, place = self.run_peer(replace(task, epochs=2, updates=updates, seconds=TRIAL_SECONDS), data)
        return read_cost(seconds, place)

    def run_peer(self, task: Task, data: DataSet) -> tuple[float, Path]:
        """Let a peer do a task on a data set; return its seconds and the folder of its prediction file."""
        place = self._new_place()
        if not task.weights and not self._weights.is_file():
            save_weights(self._weights)
        whole = replace(
            task,
            folder=str(data.folder),
            photos=str(data.photos),
            out=str(place / "prediction.csv"),
            scratch=str(place),
            weights=task.weights or str(self._weights),
            workers=self._workers,
            device=self._device,
            timm_script=self._timm_script,
        )
        python = self._autogluon_python if task.kind == "autogluon" else sys.executable
        command = [python, "-m", "benchmarks.rivals", json.dumps(asdict(whole))]
        return sum(run_commands([command], place, limit_seconds=RUN_LIMIT_SECONDS)), place

    def _new_place(self) -> Path:
        self._runs += 1
        place = self._folder / f"run{self._runs:04d}"
        place.mkdir(parents=True)
        return place


def read_cost(seconds: float, place: Path) -> Cost:
    """What a run cost, by the clock and by the timings that it left in its folder; its first epoch warms up."""
    timings = json.loads((place / "timings.json").read_text(encoding="utf-8"))
    return Cost(
        fixed=max(seconds - timings["counted"], 0),
        update=statistics.median(timings["updates"][1:] or timings["updates"] or [0.0]),
        frozen=min(timings["frozen"], default=0.0),
        validation=min(timings["validations"], default=0.0),
    )


def reserve_seconds(seconds: float, photos: int) -> float:
    """What of our budget `train --minutes` is not given: both programs start, and up to three networks predict."""
    return min(0.25 * seconds, 10 + 0.05 * photos)


def run_commands(commands: Sequence[Sequence[str]], place: Path, *, limit_seconds: float) -> list[float]:
    """Run commands one after another, and return the seconds that each took by the clock.

    Raises:
        FailedError: One failed, or all together took longer than the limit.
    """
    home = Path(__file__).resolve().parents[1]
    paths = [str(home), str(home / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XDG_CACHE_HOME": str(place / "cache"),  # what an earlier run kept must not help
        "MPLCONFIGDIR": str(place.parent / "matplotlib"),  # its list of fonts is made once, in nobody's time
        "HF_HUB_OFFLINE": "1",
    }
    log, began = place / "log.txt", time.perf_counter()
    ends: list[float] = []
    for command in commands:
        with log.open("ab") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout=max(limit_seconds - (time.perf_counter() - began), 0.1))
            except subprocess.TimeoutExpired:
                raise FailedError(f"not at its end after {limit_seconds:.0f} s") from None
            finally:
                if process.poll() is None:  # also where Ctrl-C ends the wait
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise FailedError(" ".join(last) or f"exit code {code}")
        ends.append(time.perf_counter() - began)
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def measure(
    races: Sequence[tuple[str, float, int, str]],
    rows: list[Row],
    names: Mapping[str, str],
    race: Callable[[str, float, int, str], Row | None],
    save: Callable[[], None],
) -> list[str]:
    """Run what `rows` does not hold yet, in order, and add each result as it comes.

    Args:
        races: What to measure.
        rows: Results so far.
        names: What results call each data set of the races.
        race: Measures one.
        save: Called after each result, so that nothing is lost.

    Returns:
        What could not be measured, and why.
    """
    problems: list[str] = []
    for place, (data, minutes, seed, contender) in enumerate(races, start=1):
        done = {(row["contender"], row["data"], row["minutes"], row["seed"]) for row in rows}
        if (contender, names[data], minutes, seed) in done:
            continue
        title = (
            f"{names[data]}, {minutes:g} min, seed {seed}: {contender}" if minutes else f"{names[data]}: {contender}"
        )
        try:
            row = race(data, minutes, seed, contender)
        except FailedError as error:
            problems.append(f"{title} failed: {error}")
            row = None
        else:
            if row is None:
                problems.append(f"{title}: not one update fits into the time")
        if row is None:
            print(f"{place}/{len(races)}  {problems[-1]}", flush=True)
            continue
        rows.append(row)
        print(f"{place}/{len(races)}  {title}: {row['top1']:.4f} in {row['seconds']:.0f} s", flush=True)
        save()
    return problems


def find_missing(contenders: Sequence[str], *, timm_script: str, autogluon: str) -> dict[str, str]:
    """Contenders that cannot run here, and why; `autogluon` is what `ask_autogluon` said."""
    reasons = {
        "timm": "" if timm_script else "give the path of its script with --timm-script",
        "fastai": "" if importlib.util.find_spec("fastai") else "it is not installed (the extra is called bench)",
        "autogluon": ""
        if autogluon
        else "its releases ask for other versions of torch and timm than ours; install autogluon.multimodal into an "
        "environment of its own, and give the path of its interpreter with --autogluon-python",
    }
    everybody = list_contenders()
    kinds = {name: task.kind for name in contenders if (task := everybody[name]) is not None}
    return {name: reasons[kind] for name, kind in kinds.items() if reasons.get(kind)}


def ask_autogluon(python: str) -> str:
    """Versions of AutoGluon and what it stands on, by an interpreter; empty where it has none."""
    question = (
        "from importlib.metadata import version\n"
        "print(', '.join(f'{name} {version(name)}' for name in ('autogluon.multimodal', 'torch', 'timm')))"
    )
    try:
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def load_rows(path: Path | None, *, is_quick: bool) -> tuple[list[Row], list[str]]:
    """Results and notes of an earlier session with the same file; none without one.

    Raises:
        ValueError: They are of another machine or another kind of plan, or the file is not one of this benchmark.
    """
    if path is None or not path.is_file():
        return [], []
    from benchmarks.record import hardware

    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("benchmark") != "budget" or record["is_quick"] != is_quick:
        raise ValueError(f"{path} holds other results than those of this plan; give another file with --json")
    here = hardware()
    if [record["hardware"].get(key) for key in ("cores", "processor")] != [here["cores"], here["processor"]]:
        raise ValueError(f"{path} was measured on another machine; give another file with --json")
    return record["rows"], record["notes"]


def sign(rows: Sequence[Row], notes: Sequence[str], *, is_quick: bool, load_before: Sequence[float]) -> dict[str, Any]:
    """The content of the JSON file: the rows, and what they come to."""
    findings = describe(rows)
    findings.notes = list(dict.fromkeys(notes))
    return make_record("budget", findings, is_quick=is_quick, load_before=load_before) | {"rows": list(rows)}


NOTES = (
    "time counts everything from the start of the command to the prediction file; a result that is late by more than "
    "2 % and 5 s does not count, and the chart shows each at the time that it took",
    "ours chooses among all weights that its installation brings (EfficientNet-Lite0, -Lite1 and -Lite2), and its time "
    "is that of train --minutes, given less by what predict will need, and predict together; the peers, and the row "
    "for Lite0 alone, have EfficientNet-Lite0",
    "epochs of timm's script and fastai fill 95 % of the budget by a trial that does not count; timm's script may take "
    "shorter epochs, and fastai a part of the photos, where less than whole epochs fit; a run that took less than 80 % "
    "of the budget, or more than all of it, is repeated once by what it cost",
    "scikit-learn learns from training and validation photos, as cross-validation chooses its C, and takes the time "
    "that it takes, once for each data set",
)


AUTOGLUON_NOTE = (
    "AutoGluon runs in an environment of its own, by its preset medium_quality, from a folder with the same weights in "
    "its own form, and without a GPU in 32 bits, as it forces; its time_limit is what a trial found that its start, "
    "its averaging of checkpoints and its prediction leave of 95 % of the budget, set once more where it was late"
)


def main() -> None:
    """Measure and report."""
    import torch

    from fieldmark.runs.environment import usable_cores

    parser = make_parser(__doc__ or "")
    _add_options(parser)
    arguments = parser.parse_args()
    chosen = {name: getattr(arguments, name) for name in ("minutes", "data", "seeds", "contenders")}
    try:
        plan = make_plan(is_quick=arguments.quick, **chosen)
        rows, earlier = load_rows(arguments.json, is_quick=arguments.quick)
    except ValueError as error:
        parser.error(str(error))
    autogluon = ask_autogluon(arguments.autogluon_python) if "AutoGluon" in plan.contenders else ""
    missing = find_missing(plan.contenders, timm_script=arguments.timm_script, autogluon=autogluon)
    notes = [*NOTES, *(f"{name} was left out: {why}" for name, why in missing.items())]
    notes += [f"{AUTOGLUON_NOTE} ({autogluon})"] if autogluon else []
    plan = replace(plan, contenders=tuple(name for name in plan.contenders if name not in missing))
    before = load_average()
    with tempfile.TemporaryDirectory(prefix="fieldmark-bench-") as temporary:
        folder = Path(temporary)
        data: dict[str, DataSet] = {}
        for name in plan.data:
            try:
                data[name] = open_data(name, arguments.photos, folder / name, classes=QUICK_CLASSES * plan.is_small)
            except DataError as error:
                notes.append(f"{name} was left out: {error}")
        notes += [found.note for found in data.values()]
        plan = replace(plan, data=tuple(data))
        # A note of an earlier session stays where it tells of data that this one does not take part in.
        notes += [note for note in earlier if "left out" not in note and " failed: " not in note]

        def make() -> dict[str, Any]:
            return sign(rows, notes, is_quick=arguments.quick, load_before=before)

        def save() -> None:
            if arguments.json is not None:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                part = arguments.json.with_suffix(".part")
                part.write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")
                part.replace(arguments.json)

        measuring = Measuring(
            folder,
            data,
            timm_script=arguments.timm_script and str(Path(arguments.timm_script).resolve()),
            device="cuda" if torch.cuda.is_available() else "cpu",
            cores=usable_cores(),
            autogluon_python=arguments.autogluon_python,
        )
        names = {name: found.name for name, found in data.items()}
        notes += measure(list_races(plan), rows, names, measuring.race, save)
    finish(make(), arguments.json, list(format_table(rows)))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", default="", metavar="LIST", help="budgets; default 1,3,10, quick: 1")
    parser.add_argument(
        "--data", default="", metavar="LIST", help=f"of {', '.join(NAMES)}; default all, quick: birds100"
    )
    parser.add_argument("--seeds", type=int, default=0, help="of every budget; default 3 up to 3 minutes, else 1")
    parser.add_argument("--contenders", default="", metavar="A+B", help="some, with a plus between them; default all")
    add_timm_script(parser)
    parser.add_argument(
        "--autogluon-python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter with AutoGluon; default this one",
    )
    parser.add_argument(
        "--photos", type=Path, default=PHOTOS.parent, metavar="FOLDER", help="in which the data sets lie"
    )


if __name__ == "__main__":
    main()
