"""The run folder of a budget: from the floor on it holds a whole model, whatever happens when.

While the clock runs, the folder is an ensemble, of one member or more: `ensemble.json` alone, which is replaced whole,
says which members answer and at what temperature. At the end a single winner becomes an ordinary run.
Shape letters: M validation photos, K classes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fieldmark.budget.candidates import change
from fieldmark.budget.race import Numbers
from fieldmark.config import Config, dump_config
from fieldmark.errors import RunError
from fieldmark.files import write_whole
from fieldmark.inference.calibration import apply_temperature, calibrate_run, fit_temperature, log_probabilities
from fieldmark.inference.evaluation import align_rows
from fieldmark.inference.predictor import mean_probabilities
from fieldmark.runs import folder
from fieldmark.runs.dataset import Dataset
from fieldmark.runs.writer import write_beginning, write_validation
from fieldmark.training import metrics
from fieldmark.training.checkpoint import digest_weights, load_saved_weights, save_weights
from fieldmark.training.evaluate import softmax

Floats = NDArray[np.float32]
CALIBRATED = 1_000_000  # probabilities of a member, above which its own calibration would take seconds at the end


@dataclass(frozen=True, eq=False)
class Model:
    """One network that may answer."""

    key: str
    config: Config
    description: Mapping[str, Any]  # its model.json
    weights: Mapping[str, Tensor]
    val: Floats  # (M, K) probabilities of the validation photos at temperature 1
    temperature: float
    seconds_per_photo: float = 0.0  # of a prediction, where that was measured

    @cached_property
    def folder_name(self) -> str:
        """Of a member: its name and its weights, since a run that goes on may make others of the same name."""
        return re.sub(r"[/:\\]", "_", self.key) + f"-{digest_weights(self.weights)[:8]}"

    @property
    def parameters(self) -> int:
        """Of backbone and head."""
        return int(self.description["parameters"])

    def balance(self, prior: NDArray[np.float64]) -> Model:
        """The network with the (K,) class shares of training divided out of its answers.

        That gains more macro recall than weights in the loss: docs/uneven.md.
        """
        shift = self.temperature * np.log(prior, where=prior > 0, out=np.zeros_like(prior))
        last = max(name for name in self.weights if name.startswith("head") and name.endswith("bias"))
        weights = {**self.weights, last: self.weights[last] - torch.from_numpy(shift).float()}
        config = change(self.config, {"train": {"class_weights": "balanced"}})
        return replace(self, config=config, weights=weights, val=softmax(log_probabilities(self.val) - shift))


@dataclass(frozen=True, eq=False)
class Answer:
    """One or more networks that answer together, under a name for people."""

    name: str
    members: tuple[Model, ...]

    @property
    def keys(self) -> list[str]:
        """Names of the members."""
        return [member.key for member in self.members]

    @property
    def val(self) -> Floats:
        """(M, K) calibrated probabilities of the validation photos, as an ensemble of these members gives them."""
        temperatures = [member.temperature for member in self.members]
        order = np.arange(self.members[0].val.shape[1])
        return mean_probabilities([member.val for member in self.members], temperatures, [order] * len(temperatures))


def choose_temperature(probabilities: Floats, labels: NDArray[np.int64]) -> float:
    """The temperature that fits held-out probabilities best, or 1 where it would not lower the loss."""
    if not len(labels):
        return 1.0
    logits = log_probabilities(probabilities)
    return min(
        (1.0, fit_temperature(logits, labels)),
        key=lambda temperature: metrics.log_loss(apply_temperature(logits, temperature), labels),
    )


class Shelf:
    """A run folder whose best model is replaced as better ones are found; `train` and `val` are numbers of photos."""

    def __init__(self, path: Path, dataset: Dataset, *, train: Numbers, val: Numbers) -> None:
        self.path = path
        self._dataset = dataset
        self._val = val
        self._labels = dataset.labels[val]
        counts = np.bincount(dataset.labels[train], minlength=len(dataset.index.classes))
        self.prior = counts / counts.sum()  # (K,) share of each class among the training photos

    def open(self, config: Config) -> None:
        """Write what the folder holds from the start, but no model yet."""
        write_beginning(self.path, self._dataset, dump_config(config), None, self.prior.tolist())

    def put(self, answer: Answer) -> None:
        """Let these networks answer from now on; a kill at any moment leaves the old answer or this one."""
        for member in answer.members:
            path = self.path / folder.MEMBERS / member.folder_name
            if len(self._val) and not (path / "predictions" / "val.parquet").is_file():
                write_validation(path, self._dataset, self._val, member.val)
            if not (path / folder.WEIGHTS).is_file():
                folder.write_json(path / folder.CLASSES, list(self._dataset.index.classes))
                _write_model(path, member)
            write_whole(path / folder.RECIPE, dump_config(member.config))
        rows = [{"folder": one.folder_name, "name": one.key, "temperature": one.temperature} for one in answer.members]
        folder.forget_answers(self.path)
        # First what answers: the rest of an ensemble only describes it.
        folder.write_json(self.path / folder.ENSEMBLE, {"members": rows})
        folder.write_json(self.path / folder.MODEL, _describe(answer))
        if len(self._val):
            write_validation(self.path, self._dataset, self._val, answer.val)
        names = [member.folder_name for member in answer.members]
        for entry in (self.path / folder.MEMBERS).iterdir():
            if entry.name not in names:  # of large data, the largest file beside the weights
                (entry / "predictions" / "val.parquet").unlink(missing_ok=True)

    def load(self) -> Answer | None:
        """The answer that an earlier process left; None where there is none, or not all of it can be read."""
        with suppress(RunError):
            run = folder.Run(self.path)
            rows: list[dict[str, Any]] = run.ensemble_info["members"] if run.is_ensemble else [{}]
            members = [self._load(one, **row) for one, row in zip(run.members, rows, strict=True)]
            return Answer(str(run.summary.get("kept", "the model of before")), tuple(members))
        return None

    def _load(self, run: folder.Run, *, name: str = "kept", temperature: float | None = None, **_: Any) -> Model:
        val = np.zeros((0, len(run.classes)), np.float32)
        if len(self._val):
            val = align_rows(run.predictions("val"), self._dataset.index.photos.paths[self._val]).probabilities
        weights = load_saved_weights(run.path / folder.WEIGHTS)
        temperature = temperature or choose_temperature(val, self._labels)
        return Model(name, run.config, run.model_info, weights, val, temperature)

    def settle(self, answer: Answer) -> None:
        """Make a single network an ordinary run, and each of several one inside, and calibrate what answers."""
        self.put(answer)
        is_alone = len(answer.members) == 1
        for member in answer.members:
            path = self.place(answer, member)
            if not is_alone:
                alone = Answer(member.key, (member,))
                folder.write_json(path / folder.SUMMARY, {"status": "finished", "val": self.score(alone)})
                continue
            _write_model(path, member)
            if len(self._val):
                write_validation(path, self._dataset, self._val, member.val)
            (self.path / folder.ENSEMBLE).unlink()
        if len(self._val) > 1:
            own = [self.place(answer, member) for member in answer.members if member.val.size <= CALIBRATED]
            for path in dict.fromkeys([self.path, *own]):
                run = folder.Run(path)
                calibrate_run(run, wanted="none", wanted_value=1.0, confidence_level=0.95, folds=5, seed=0)

    def place(self, answer: Answer, member: Model) -> Path:
        """Where a member's files are once its answer is settled."""
        return self.path if len(answer.members) == 1 else self.path / folder.MEMBERS / member.folder_name

    def clear(self, answer: Answer) -> None:
        """Remove the members that do not answer."""
        names = [member.folder_name for member in answer.members if len(answer.members) > 1]
        for entry in (self.path / folder.MEMBERS).glob("*"):
            if entry.name not in names:
                shutil.rmtree(entry)
        if not names:
            shutil.rmtree(self.path / folder.MEMBERS, ignore_errors=True)

    def score(self, answer: Answer) -> dict[str, Any]:
        """Validation metrics of an answer, with the interval of its accuracy; {} without validation photos."""
        if not len(self._val):
            return {}
        found = metrics.summarize(answer.val, self._labels, self.prior)
        interval = metrics.wilson_interval(round(found["top1"] * len(self._val)), len(self._val))
        return {**found, "top1_interval": list(interval)}


def _write_model(path: Path, model: Model) -> None:
    write_whole(path / folder.RECIPE, dump_config(model.config))
    folder.write_json(path / folder.MODEL, dict(model.description))
    save_weights(path / folder.WEIGHTS, model.weights)


def _describe(answer: Answer) -> dict[str, Any]:
    """Return the model.json of an answer."""
    descriptions = [member.description for member in answer.members]
    if len(descriptions) == 1:
        return dict(descriptions[0])
    weights = {
        key: "; ".join(dict.fromkeys(str(found["weights"].get(key) or "unknown") for found in descriptions))
        for key in ("source", "license", "pretraining")
    }
    return {"parameters": sum(found["parameters"] for found in descriptions), "weights": weights}
