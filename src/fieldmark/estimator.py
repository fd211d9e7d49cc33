"""Train from Python in one call: `fit` for a folder of photos, `Classifier` for lists of files and labels.

`Classifier` follows scikit-learn's conventions, so that `cross_val_score` and pipelines take it.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from fieldmark.config import load_config
from fieldmark.data.tables import write_csv
from fieldmark.errors import DataError, PhotoError
from fieldmark.progress import Progress, open_progress
from fieldmark.runs.folder import Run, flatten


def fit(
    photos: str | Path,
    *,
    minutes: float | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Run:
    """Train a classifier and return its run.

    Args:
        photos: A folder of class folders, or a table with the columns `path` and `label`.
        minutes: Make the best model that this time can make. Without minutes and recipe, a time that suits the machine.
        recipe: A shipped recipe or a TOML file; without minutes, it is trained to its own end.
        out: The run folder; None makes a new one in `runs/`.
        progress: Where to report; None is a bar or lines on stderr.
        settings: As with `--set`: `seed=1`, or a section as a mapping, `optim={"lr": 1e-4}`.

    Returns:
        The finished run: `run.summary`, `fieldmark.Predictor.load(run)`.

    Raises:
        FieldmarkError: Settings, data, weights or machine do not allow it.

    Examples:
        >>> run = fieldmark.fit("photos", recipe="recipe.toml", epochs=1)
        >>> run.classes
        ('jay', 'robin', 'wren')
    """
    from fieldmark.budget.run import require_no_epochs, train_within
    from fieldmark.runs.train import new_run_folder, train

    config = load_config(recipe, flatten(settings), data=photos)
    folder = Path(out) if out is not None else new_run_folder(config, str(recipe or "minutes"))
    with nullcontext(progress) if progress else open_progress("train") as shown:
        if minutes is not None or recipe is None:
            require_no_epochs(config, recipe)
            return train_within(config, folder, minutes=minutes, progress=shown)
        for _ in train(config, folder, progress=shown):
            pass
        return Run(folder)


class Classifier(ClassifierMixin, BaseEstimator):
    """Trains a photo classifier by scikit-learn's interface: photos are paths, labels are anything that sorts.

    Args:
        minutes: As in `fit`.
        recipe: As in `fit`.
        out: The run folder; None keeps it in a temporary folder that goes with the estimator.
        settings: As in `fit`, such as `{"seed": 1}`.

    Attributes:
        classes_: (K,) labels, sorted.
        run_: The finished run.

    Examples:
        >>> files = sorted(Path("photos").rglob("*.png"))
        >>> model = fieldmark.Classifier(recipe="recipe.toml").fit(files, [file.parent.name for file in files])
        >>> model.predict_proba(files[:2]).shape
        (2, 3)
    """

    def __init__(
        self,
        *,
        minutes: float | None = None,
        recipe: str | None = None,
        out: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.minutes, self.recipe, self.out, self.settings = minutes, recipe, out, settings

    def fit(self, X: Sequence[str | Path], y: Sequence[Any]) -> Self:  # noqa: N803
        """Train on (N,) files and their labels, of at least two classes.

        Raises:
            DataError: Not as many labels as photos, or fewer than two classes.
            ValueError: The labels are no classes but measured numbers, or one is missing.
        """
        labels = np.asarray(y)
        check_classification_targets(labels)
        files = _paths(X)
        if labels.shape != (len(files),):
            raise DataError(f"fit needs one label for each photo; got {len(files)} photos and labels {labels.shape}")
        self.classes_, numbers = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"fit needs at least two classes; got {self.classes_.tolist()}")
        out = Path(self.out) if self.out else self._make_temporary()
        table = out.with_name(out.name + "-photos.csv")
        write_csv(table, ("path", "label"), list(zip(files, map(str, numbers), strict=True)))
        self.run_ = fit(table, minutes=self.minutes, recipe=self.recipe, out=out, **(self.settings or {}))
        self.n_features_in_ = 1
        return self

    def _make_temporary(self) -> Path:
        """A place for a run that goes with the estimator."""
        temporary = tempfile.mkdtemp(prefix="fieldmark-")
        weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary) / "run"

    def __getstate__(self) -> dict[str, Any]:
        """What pickles and copies hold: of a run in a temporary folder its files, which go with this estimator."""
        state: dict[str, Any] = {**self.__dict__, **cast(Any, super().__getstate__())}  # never the living one
        if not self.out and isinstance(run := state.get("run_"), Run):
            files = (file for file in sorted(run.path.rglob("*")) if file.is_file())
            state["run_"] = {file.relative_to(run.path).as_posix(): file.read_bytes() for file in files}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(files := state.get("run_"), dict):
            out = self._make_temporary()
            for name, content in files.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_bytes(content)
            state = {**state, "run_": Run(out)}
        super().__setstate__(state)

    def predict_proba(self, X: Sequence[str | Path]) -> NDArray[np.float32]:  # noqa: N803
        """Return (N, K) probabilities, in the order of `classes_`.

        Raises:
            PhotoError: A photo cannot be read.
        """
        from fieldmark.inference.predictor import Predictor

        check_is_fitted(self, "run_")
        predictor = Predictor.load(self.run_)
        answers = list(predictor.predict(_paths(X)))
        for answer in answers:
            if answer.problem:
                raise PhotoError(answer.path, answer.problem)
        order = [predictor.classes.index(str(number)) for number in range(len(self.classes_))]
        return np.stack([answer.probabilities for answer in answers])[:, order]

    def predict(self, X: Sequence[str | Path]) -> NDArray[Any]:  # noqa: N803
        """Return (N,) labels; raises PhotoError as `predict_proba` does."""
        best = self.predict_proba(X).argmax(axis=1)  # first, as it asks whether there are classes
        return self.classes_[best]


def _paths(photos: Sequence[str | Path]) -> list[str]:
    files = [str(Path(photo).resolve()) for photo in np.asarray(photos, dtype=object).reshape(-1)]
    if not files:
        raise DataError("there are no photos: give a list of at least one path")
    return files
