"""Photos of none of the classes: how well they are told from those that are, by what a head learns and by which score.

    python -m experiments.unseen birds100 clothing10 --out docs/unseen.md --features features

Of the first data set 20 classes at a time are held out: photos of 10 of them may be shown as `_none`, those of the
other 10 are never seen. The second is far away from the first. What was computed is kept in the folder given by
--features.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from experiments.pages import make_parser, write_results
from fieldmark.budget.candidates import Backbone, Candidate, find_backbones
from fieldmark.budget.heads import CURVATURE, FINE, STRENGTHS, _Basis
from fieldmark.budget.plan import Plan
from fieldmark.budget.race import Course, stratified_order
from fieldmark.budget.team import Team
from fieldmark.config import load_config
from fieldmark.progress import Quiet
from fieldmark.runs.build import BuiltModel
from fieldmark.runs.dataset import prepare_dataset
from fieldmark.runs.session import setup_fabric
from fieldmark.runs.train import StopRequest

Floats = NDArray[np.floating]
Numbers = NDArray[np.int64]
Models = dict[Backbone, BuiltModel]
Photos = tuple[Floats, Numbers, NDArray[np.str_]]

HELD_OUT, NETWORK, NEIGHBORS, CHUNK, AXES = 20, "tf_efficientnet_lite0", 10, 500, 500
NEAR, FAR, BOTH = "10 other classes of the first", "the second", "both"


def collect(data: Path, folder: Path, models: Models) -> Photos:
    """Return (N, F) features, (N,) labels and (N,) splits of the labeled photos, by `models` if there are some.

    The first data set chooses the directions of the pooling. Of one that has labeled test photos, train is left out.
    """
    config = load_config(None, [f'data.path="{data.resolve().as_posix()}"', 'model.pool="covariance"'])
    team = Team(setup_fabric(config)[0], StopRequest())
    dataset = prepare_dataset(config.data, progress=Quiet())
    splits = np.asarray([photo.split for photo in dataset.index.photos])
    train = np.flatnonzero((splits == "train") & (dataset.labels >= 0))
    order = train[stratified_order(dataset.labels[train], seed=0)]
    own = folder / data.stem
    own.mkdir(parents=True, exist_ok=True)
    plan = Plan(own / "plan.jsonl", 1e9)
    course = Course(config, own, plan, Quiet(), team, dataset, order, order[:0], models)
    (backbone,) = (one for one in find_backbones(config) if one.name == NETWORK)
    candidate = Candidate(backbone, backbone.picture.test_size, "whole")
    course.load_model(candidate)
    wanted = dataset.labels >= 0
    if (splits[wanted] == "test").any():
        wanted &= splits != "train"
    numbers = np.flatnonzero(wanted)
    for start in range(0, len(numbers), CHUNK):  # each is kept
        course.collect_features(candidate, numbers[start : start + CHUNK])
    return course.collect_features(candidate, numbers).select(numbers), dataset.labels[numbers], splits[numbers]


def fit(basis: _Basis, rows: NDArray[np.bool_], targets: Floats, l2: float) -> tuple[Floats, Floats]:
    """Return (F, K) weights and (K,) bias of a head as `budget.heads` fits it, on some rows of the basis' photos.

    The (N, K) targets are distributions.
    """
    rotated, wanted = basis.rotated[torch.from_numpy(rows)], torch.from_numpy(targets.astype(np.float32))
    scale = 1 / (CURVATURE * basis.variances + l2).sqrt()
    scale = torch.cat([scale, torch.full((1,), CURVATURE**-0.5)])[:, None]
    scaled = torch.zeros(len(basis.variances) + 1, targets.shape[1])
    search = torch.optim.LBFGS([scaled], max_iter=FINE, history_size=10, line_search_fn="strong_wolfe")

    def evaluate() -> torch.Tensor:
        weights = scaled * scale
        log_probabilities = basis.logits(rotated, weights).log_softmax(1)
        error = (log_probabilities.exp() - wanted) / len(wanted)
        scaled.grad = torch.cat([rotated.T @ error + l2 * weights[:-1], error.sum(0, keepdim=True)]) * scale
        return l2 / 2 * weights[:-1].square().sum() - (log_probabilities * wanted).sum() / len(wanted)

    search.step(evaluate)
    weight, bias = basis.unrotate(scaled * scale)
    return weight.numpy().T, bias.numpy()


def choose_strength(basis: _Basis, one_hot: Floats) -> float:
    """Return the penalty that predicts every fifth of the first photos best from the others."""
    is_held = np.arange(len(one_hot)) % 5 == 0
    rows = np.zeros(len(basis.rotated), np.bool_)
    rows[: len(one_hot)] = ~is_held
    losses: dict[float, float] = {}
    for l2 in STRENGTHS:
        weight, bias = fit(basis, rows, one_hot[~is_held], l2)
        photos = (basis.rotated[: len(one_hot)][is_held] @ basis.axes.T * basis.std + basis.mean).numpy()
        losses[l2] = float(-(log_softmax(photos @ weight + bias, axis=1) * one_hot[is_held]).sum(1).mean())
    return min(losses, key=losses.__getitem__)


def tell_apart(known: Floats, others: Floats) -> tuple[float, float]:
    """Return AUROC, and the share of `others` that pass where 95 % of the known do; known photos score high."""
    is_known = np.concatenate([np.ones(len(known)), np.zeros(len(others))])
    auroc = roc_auc_score(is_known, np.concatenate([known, others]))
    return float(auroc), float((others >= np.quantile(known, 0.05)).mean())


def neighbor_score(features: Floats, among: Floats) -> Floats:
    """Return minus the distance to the k-th nearest of `among`, all scaled to length 1 (arXiv:2204.06507)."""
    own, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, among))
    return np.partition(own @ others.T, -NEIGHBORS, axis=1)[:, -NEIGHBORS]


def measure(draw: int, birds: Photos, far: Photos) -> list[dict[str, object]]:
    """Return a row for each kind of `_none` photos, head and score, of one draw of held-out classes."""
    features, labels, splits = birds
    order = np.random.default_rng(draw).permutation(labels.max() + 1)
    shown, unseen, classes = order[: HELD_OUT // 2], order[HELD_OUT // 2 : HELD_OUT], np.sort(order[HELD_OUT:])
    number = np.searchsorted(classes, labels)
    is_known = np.isin(labels, classes)
    train, val = is_known & (splits == "train"), is_known & (splits == "val")
    tests = {"known": features[val], NEAR: features[np.isin(labels, unseen)], FAR: far[0][far[2] == "test"]}
    nothing = features[:0]
    kinds = {"": nothing, NEAR: features[np.isin(labels, shown)], FAR: far[0][far[2] == "val"]}
    kinds[BOTH] = np.concatenate([kinds[NEAR], kinds[FAR]])
    basis = _Basis.of(torch.from_numpy(np.concatenate([features[train], kinds[BOTH]])))
    basis = replace(
        basis, axes=basis.axes[:, -AXES:], variances=basis.variances[-AXES:], rotated=basis.rotated[:, -AXES:]
    )
    origin = np.repeat(["", NEAR, FAR], [train.sum(), len(kinds[NEAR]), len(kinds[FAR])])
    one_hot = np.eye(len(classes))[number[train]]
    l2 = choose_strength(basis, one_hot)
    found_rows: list[dict[str, object]] = []

    def note(none: str, head: str, score: str, scores: dict[str, Floats], right: float) -> None:
        row: dict[str, object] = {"draw": draw, "none": none, "head": head, "score": score, "top1": right}
        for name in (NEAR, FAR):
            auroc, passed = tell_apart(scores["known"], scores[name])
            row |= {f"auroc {name}": auroc, f"fpr95 {name}": passed}
        found_rows.append(row)

    for none, photos in kinds.items():
        rows = np.isin(origin, ["", none] if none != BOTH else ["", NEAR, FAR])
        count, num_classes = len(photos), len(classes)
        heads = {"uniform targets": np.concatenate([one_hot, np.full((count, num_classes), 1 / num_classes)])}
        extra = np.zeros((len(one_hot) + count, num_classes + 1))
        extra[: len(one_hot), :num_classes], extra[len(one_hot) :, num_classes] = one_hot, 1
        heads = {**heads, "a class of its own": extra} if count else {"plain": one_hot}
        for head, targets in heads.items():
            weight, bias = fit(basis, rows, targets, l2)
            logits = {name: photos_ @ weight + bias for name, photos_ in tests.items()}
            sure = {name: softmax(found, axis=1)[:, :num_classes].max(1) for name, found in logits.items()}
            right = float((logits["known"].argmax(1) == number[val]).mean())
            note(none, head, "probability", sure, right)
            energy = {name: logsumexp(found[:, :num_classes], axis=1) for name, found in logits.items()}
            if head == "a class of its own":
                energy = {name: energy[name] - found[:, num_classes] for name, found in logits.items()}
            note(none, head, "energy", energy, right)
        if not count:
            near = {name: neighbor_score(found, features[train]) for name, found in tests.items()}
            note(none, "plain", "nearest neighbors", near, right)
            mixed = {name: near[name] * np.maximum(sure[name], 1e-12) for name in near}
            note(none, "plain", "probability x neighbors", mixed, right)
    return found_rows


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return mean and 95 % interval over the draws."""
    mean, half = np.mean(values), student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(mean), float(mean - half), float(mean + half)


def write_page(rows: list[dict[str, object]], names: tuple[str, str]) -> str:
    """Return the rows as a page."""
    groups: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((str(row["none"]), str(row["head"]), str(row["score"])), []).append(row)
    draws = len({row["draw"] for row in rows})
    labels = {"": "no photos", NEAR: f"10 other classes of {names[0]}", FAR: names[1], BOTH: "both"}
    lines = [
        "# Photos that show none of the classes",
        "",
        f"Converged heads on {AXES} principal axes of EfficientNet-Lite0's frozen features. {draws} times {HELD_OUT}",
        f"classes of {names[0]} are held out, of which 10 may be shown as `_none` and 10 are never seen; {names[1]} is",
        "far away. Means and 95 % intervals over the draws (Student's t).",
        "`python -m experiments.unseen` writes this page.",
        "",
        "- **AUROC**: how often a photo of a class has a higher score than one of none; 0.5 is chance.",
        "- **Uniform targets** are outlier exposure (arXiv:1812.04606); **energy** is arXiv:2010.03759, and **nearest",
        f"  neighbors** the similarity to the {NEIGHBORS}th nearest photo of a class (arXiv:2204.06507).",
        "- **FPR95**: the share of photos of none that pass where 95 % of the photos of classes do.",
        "",
        f"| Shown as `_none` | Head | Score | Top-1 | AUROC, unseen {names[0]} | FPR95 | AUROC, {names[1]} | FPR95 |",
        "| --- | --- | --- | ---: | --- | --- | --- | --- |",
    ]
    for (none, head, score), found in groups.items():
        cells = [f"{np.mean([float(str(row['top1'])) for row in found]):.3f}"]
        for name in (NEAR, FAR):
            for key in (f"auroc {name}", f"fpr95 {name}"):
                mean, low, high = interval([float(str(row[key])) for row in found])
                cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(f"| {labels[none]} | {head} | {score} | {' | '.join(cells)} |")
    lines += [
        "",
        "Differences in points of AUROC by the probability, in pairs of draws, with 95 % intervals:",
        "",
        f"| Compared | Unseen of {names[0]} | {names[1]} |",
        "| --- | --- | --- |",
    ]
    for first, second in (("plain", "a class of its own"), ("uniform targets", "a class of its own")):
        none = NEAR if first != "plain" else ""
        pair = groups[none, first, "probability"], groups[NEAR, second, "probability"]
        cells: list[str] = []
        for key in (f"auroc {NEAR}", f"auroc {FAR}"):
            gains = [100 * (float(str(two[key])) - float(str(one[key]))) for one, two in zip(*pair, strict=True)]
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(gains)))
        lines.append(f"| {labels[NEAR]} as {second}, less {first} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the page and its rows."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs=2, type=Path, help="a data set, and one that is far away from it")
    parser.add_argument("--draws", type=int, default=5)
    settings = parser.parse_args()
    models: Models = {}
    birds, far = (collect(data, settings.features, models) for data in settings.data)
    rows: list[dict[str, object]] = []
    for draw in range(settings.draws):
        print("draw", draw, flush=True)
        kept = settings.features / f"unseen-{draw}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(measure(draw, birds, far)), encoding="utf-8")
        rows += json.loads(kept.read_text(encoding="utf-8"))
    names = (settings.data[0].name, settings.data[1].name)
    write_results(settings.out, rows, write_page(rows, names))


if __name__ == "__main__":
    main()
