"""What a contrastive term, soft targets and distillation earn in fine-tuning, one at a time, on several data sets.

    python -m experiments.ingredients birds100 clothing10 signs10 elpv.csv --out docs/ingredients.md --features features

Each data set is a folder of photos or a table. Test photos are left out: of the others some learn and some judge, and
nothing is chosen on these. All ways begin with the same probed head and train for as many epochs. What was computed
before is kept in the folder given by --features, so that an interrupted run goes on.

The loop of `fieldmark.training` has one loss, so the updates are written here, on its loader, settings and schedule.

Shape letters: N photos that learn, M photos that judge, B photos of a batch, F features, D embedding, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from experiments.pages import METRICS, begin_gains, make_parser, show_gains, write_results
from fieldmark.budget.candidates import Candidate, find_backbones
from fieldmark.budget.heads import Head, _Basis
from fieldmark.budget.plan import Plan, Shape
from fieldmark.budget.race import Course, Entry, stratified_order
from fieldmark.budget.team import Team
from fieldmark.budget.tune import Option, _open_session, soften
from fieldmark.config import load_config
from fieldmark.inference.calibration import fit_temperature, log_probabilities
from fieldmark.progress import Quiet
from fieldmark.runs.dataset import Dataset, prepare_dataset
from fieldmark.runs.environment import processor_name
from fieldmark.runs.session import Session, setup_fabric
from fieldmark.runs.train import StopRequest
from fieldmark.study.statistics import paired_difference
from fieldmark.training.checkpoint import load_saved_weights, save_weights
from fieldmark.training.evaluate import softmax
from fieldmark.training.loop import TrainBatch, TrainState, soft_cross_entropy

LEARN, JUDGE = 960, 1500  # photos of a data set, at most
SIZE, TRAIN_SIZE = 128, 96  # sides of the pictures that heads and judges see, and of those that train
EPOCHS = 6
TEMPERATURE, EMBEDDING = 0.1, 128  # of the contrastive term

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Way:
    """A way to fine-tune."""

    name: str
    teacher: float = 0.0  # share of each target that is the ensemble's answer
    contrast: float = 0.0  # weight of the contrastive term


PROBE, ENSEMBLE = "head on one backbone", "average of heads on three backbones"
PLAIN = Way("fine-tuned")
HALF = Way("half of each target from the ensemble", teacher=0.5)
WHOLE = Way("each target wholly from the ensemble", teacher=1.0)
SLIGHT = Way("contrastive term of weight 0.1", contrast=0.1)
FULL = Way("contrastive term of weight 1", contrast=1.0)
WAYS = (PLAIN, HALF, WHOLE, FULL, SLIGHT)

QUESTIONS = (
    (FULL.name, PLAIN.name, FULL.name),
    (SLIGHT.name, PLAIN.name, SLIGHT.name),
    (HALF.name, PLAIN.name, HALF.name),
    (f"{WHOLE.name} (distillation)", PLAIN.name, WHOLE.name),
    ("the ensemble, beside the distilled network", WHOLE.name, ENSEMBLE),
    ("the ensemble, beside the fine-tuned network", PLAIN.name, ENSEMBLE),
    ("fine-tuning, beside the head that it begins with", PROBE, PLAIN.name),
)

INTRODUCTION = """\
{backbone} is fine-tuned as a time budget does it: from a converged head, with frozen BatchNorm, at {train_size}
pixels and shown {size}, for {epochs} epochs of up to {learn} photos, the last weights taken. Up to {judge} other photos
judge, none of the test set, and nothing is chosen on them. One seed, one core of an {processor} beside other work.
Differences on the same photos with 95 % intervals, which cover the choice of photos and not the chance of training; the
mean counts each data set alike. Log loss is measured at the temperature that fits each network's answers best, as a
budget calibrates what it keeps. All ways get **equal epochs**; what each costs in processor time is in the last table.
`python -m experiments.ingredients` writes this page and ingredients.json.

- *Contrastive term*: beside the cross-entropy, photos of one class are drawn together and others apart (supervised
  contrastive loss, arXiv:2004.11362, in place of the heavier Bi-Tuning, arXiv:2011.06182), in an embedding of
  {embedding} dimensions that begins as principal axes of the probe's features. A photo is compared with the latest
  embedding of every photo that learns (a memory as in arXiv:1912.06798), so batches need not hold a class twice, and no
  second network is run. Temperature {temperature}.
- *Targets from the ensemble*: the average of converged heads on {count} backbones ({names}), each answer by heads that
  were fitted without that photo's fold, so that no label reaches its own soft target (distillation, arXiv:1503.02531).
"""

READING = """\
## What a time budget takes from it

**Soft targets and distillation: nothing.** The network that learns from the teacher alone loses to the one that learns
from labels on all four. The likely reason: a teacher that must not have seen a photo's label names no more of the
photos that learn rightly than the column *Teacher* says. An ensemble that fits is better kept than distilled. The
teacher answers each photo once, not each crop of it; one that does was not tried: three networks' passes a crop.

**A contrastive term: not by default.** At weight 1, which the sources take, it gains two points on birds and clothes,
nothing on signs that are nearly solved, and loses two on solar cells (perhaps since defects have many looks, which it
draws together). At weight 0.1 top-1 does not change, and the log loss follows the same pattern. It costs no time that
could be measured. As long as nothing says beforehand which data it hurts, only validation photos could choose it, for
the price of a second training.

Differences of processor seconds between ways are noise of the machine: soft targets add a sum over 32 rows to an
update, and the contrastive term products of less than a hundredth of the network's.
"""


def draw_photos(dataset: Dataset) -> Dataset:
    """Draw the photos that learn, as `train`, and those that judge, as `val`, alike by class; none of the test set."""
    photos, labels = dataset.index.photos, dataset.labels
    free = np.flatnonzero((np.asarray([photo.split for photo in photos]) != "test") & (labels >= 0))
    drawn = free[stratified_order(labels[free], seed=0)][: LEARN + JUDGE]
    split = {int(number): "train" if place < LEARN else "val" for place, number in enumerate(drawn)}
    kept = sorted(split)
    index = replace(dataset.index, photos=tuple(replace(photos[number], split=split[number]) for number in kept))
    return Dataset(index, tuple(dataset.facts[number] for number in kept), ())


def open_course(data: Path, folder: Path) -> Course:
    """Find a data set's photos, and say where what is computed of them is kept."""
    config = load_config(None, [f'data.path="{data.resolve().as_posix()}"', "train.ema_decay=0"])
    dataset = draw_photos(prepare_dataset(config.data, progress=Quiet()))
    team = Team(setup_fabric(config)[0], StopRequest())
    own = folder / f"{data.stem}-ingredients"
    own.mkdir(parents=True, exist_ok=True)
    train, val = dataset.index.numbers("train"), dataset.index.numbers("val")
    order = train[stratified_order(dataset.labels[train], seed=0)]
    return Course(config, own, Plan(own / "plan.jsonl", 1e9), Quiet(), team, dataset, order, val)


def keep(file: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read what was computed, or compute it, with the processor seconds that it took."""
    if not file.is_file():
        save_weights(file, compute())
    return load_saved_weights(file)


@dataclass(frozen=True, eq=False)
class Probe:
    """A converged head on one backbone's features."""

    entry: Entry
    answers: Floats  # (M, K) of the photos that judge
    seconds: float  # of the processor, for the features of the photos that learn, and the head


def fit_probe(course: Course, candidate: Candidate) -> Probe:
    """Fit and cross-validate a head as the race does, and answer the photos that judge."""

    def compute() -> dict[str, Tensor]:
        began = time.process_time()
        entry = course.score(candidate, course.order)
        seconds = time.process_time() - began
        features = course.collect_features(candidate, np.concatenate([course.order, course.val])).select(course.val)
        head = entry.head
        found = {"weight": head.weight, "bias": head.bias, "out_of_fold": torch.from_numpy(head.out_of_fold)}
        found["answers"] = torch.from_numpy(head.answer(features))
        return found | {"l2": torch.tensor(head.l2), "seconds": torch.tensor(seconds)}

    found = keep(course.path / f"{candidate.key}-head.safetensors", compute)
    head = Head(found["weight"], found["bias"], float(found["l2"]), found["out_of_fold"].numpy())
    entry = Entry(candidate, course.order, head, 0.0, 0.0, 0.0, 0.0)  # how it did is of no use here
    return Probe(entry, found["answers"].numpy(), float(found["seconds"]))


@dataclass(eq=False)
class Contrast:
    """Holds the latest embedding of each photo that learns, and what embeds them.

    Source:
        Khosla et al., "Supervised Contrastive Learning", arXiv:2004.11362, equation 2; Wang et al., "Cross-Batch Memory
        for Embedding Learning", arXiv:1912.06798, section 3.2.
    """

    projector: nn.Linear  # (B, F) to (B, D)
    memory: Tensor  # (N, D) of length 1
    labels: Tensor  # (N,)

    @classmethod
    def of(cls, features: Floats, labels: Numbers) -> Contrast:
        """Begin with the principal axes of (N, F) features."""
        basis = _Basis.of(torch.from_numpy(features))
        axes = basis.axes[:, -EMBEDDING:] / basis.std[:, None]
        projector = nn.Linear(*axes.shape)
        with torch.no_grad():
            projector.weight.copy_(axes.T)
            projector.bias.copy_(-basis.mean @ axes)
            memory = functional.normalize(projector(torch.from_numpy(features)))
        return cls(projector, memory, torch.from_numpy(labels))

    def embed(self, features: Tensor) -> Tensor:
        """(B, D) of length 1."""
        return functional.normalize(self.projector(features.float()))

    def loss(self, embedded: Tensor, rows: Tensor) -> Tensor:
        """Sum over a batch (0-d): how little of each photo's likeness is to its own class, in nats."""
        likeness = (embedded @ self.memory.T / TEMPERATURE).log_softmax(1)
        is_same = self.labels[rows][:, None] == self.labels
        return -((likeness * is_same).sum(1) / is_same.sum(1)).sum()


def fine_tune(course: Course, probe: Probe, teacher: Floats, way: Way) -> dict[str, Tensor]:
    """Fine-tune from a probe, and answer the photos that judge; `teacher` are (N, K) answers in the course's order."""
    session = _open_session(course, soften(course, probe.entry), Option(TRAIN_SIZE, 0, 0.0, EPOCHS))
    row = np.zeros(len(course.dataset.labels), np.int64)
    row[course.order] = np.arange(len(course.order))
    place = torch.from_numpy(row)
    with session.loader:
        state = session.start_training()
        contrast = None
        if way.contrast:
            features = course.collect_features(probe.entry.candidate, course.order).select(course.order)
            contrast = Contrast.of(features, course.dataset.labels[course.order])
            lr, parameters = session.config.optim.lr, list(contrast.projector.parameters())
            group = {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": 0.0, "name": "projector"}
            state.optimizer.add_param_group(group)
        shape = Shape.of(EPOCHS * session.plan.steps_per_epoch)
        state.schedule = shape.factor
        state.set_rates()
        began = time.process_time()
        for epoch in range(EPOCHS):
            state.model.train()
            for batch in session.train_batches(epoch, 0):
                rows = place[batch.numbers]
                targets = torch.lerp(batch.targets, torch.from_numpy(teacher)[rows], way.teacher)
                update(session, state, replace(batch, targets=targets), rows, contrast, way.contrast)
        seconds = time.process_time() - began
        found = session.validate(state.model.eval(), step=state.step).predictions
    assert found is not None
    return {"answers": torch.from_numpy(found.probabilities()), "seconds": torch.tensor(seconds)}


def update(
    session: Session, state: TrainState, batch: TrainBatch, rows: Tensor, contrast: Contrast | None, weight: float
) -> None:
    """Update the weights once, in micro-batches as `training.loop` does, by cross-entropy and a contrastive term."""
    model: Any = state.model
    size = len(rows)
    count = -(-size // state.micro_batch_size)
    parts = zip(*(tensor.tensor_split(count) for tensor in (batch.images, batch.targets, rows)), strict=True)
    embeddings: list[Tensor] = []
    for images, targets, places in parts:
        with session.fabric.autocast():
            features = model.features(images)
            logits = model.head(features)
        loss = soft_cross_entropy(logits, targets, None)
        if contrast is not None:
            embedded = contrast.embed(features)
            loss = loss + weight * contrast.loss(embedded, places)
            embeddings.append(embedded.detach())
        (loss / size).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), session.config.optim.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.set_rates()
    if contrast is not None:
        contrast.memory[rows] = torch.cat(embeddings)


@dataclass(eq=False)
class Trial:
    """One data set: its probes, and the answers of what was trained so far."""

    name: str
    course: Course
    probes: list[Probe]
    answers: dict[str, Floats]  # (M, K) probabilities by name
    seconds: dict[str, float]  # of the processor

    @classmethod
    def of(cls, data: Path, folder: Path) -> Trial:
        """Fit a head on each backbone."""
        course = open_course(data, folder)
        probes = [fit_probe(course, Candidate(one, SIZE, "whole")) for one in find_backbones(course.config)]
        answers = {PROBE: probes[0].answers, ENSEMBLE: np.mean([one.answers for one in probes], axis=0)}
        seconds = {PROBE: probes[0].seconds, ENSEMBLE: sum(one.seconds for one in probes)}
        return cls(data.stem, course, probes, answers, seconds)

    @property
    def teacher(self) -> Floats:
        """(N, K) answers of the ensemble on the photos that learn, each by heads fitted without its fold."""
        return np.mean([probe.entry.head.out_of_fold for probe in self.probes], axis=0)

    def run(self, way: Way) -> None:
        """Fine-tune one way, unless that was done before."""
        file = self.course.path / f"{way.name.replace(' ', '-')}.safetensors"
        found = keep(file, lambda: fine_tune(self.course, self.probes[0], self.teacher, way))
        self.answers[way.name], self.seconds[way.name] = found["answers"].numpy(), float(found["seconds"])

    def measure(self) -> dict[str, Any]:
        """Scores and seconds of each answer, and what each question that can be answered comes to."""
        labels = self.course.dataset.labels[self.course.val]
        scores = {name: score_photos(found, labels) for name, found in self.answers.items()}
        means = {name: {metric: float(each.mean()) for metric, each in own.items()} for name, own in scores.items()}
        gains: dict[str, dict[str, list[float]]] = {}
        for question, before, after in QUESTIONS:
            if before in scores and after in scores:
                pairs = {metric: (scores[before][metric], scores[after][metric]) for metric in METRICS}
                found = {name: paired_difference(*pair, level=0.95).interval for name, pair in pairs.items()}
                gains[question] = {name: [one.estimate, one.low, one.high] for name, one in found.items()}
        right = float((self.teacher.argmax(1) == self.course.dataset.labels[self.course.order]).mean())
        row = {"data": self.name, "learned": len(self.course.order), "judged": len(labels), "teacher": right}
        return {**row, "scores": means, "seconds": self.seconds, "gains": gains}


def score_photos(answers: Floats, labels: Numbers) -> dict[str, NDArray[np.float64]]:
    """(1, M) scores by metric, more is better: hits, and log probabilities at the temperature that fits best."""
    logits = log_probabilities(answers)
    calibrated = softmax(logits, temperature=fit_temperature(logits, labels))
    own = log_probabilities(calibrated)[np.arange(len(labels)), labels]
    return {"top1": (answers.argmax(1) == labels).astype(np.float64)[None], "log_loss": own[None]}


def write_page(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Return the measurements of each data set as a page."""
    settings = {"backbone": names[0], "count": len(names), "names": ", ".join(names), "processor": processor_name()}
    settings |= {"size": SIZE, "train_size": TRAIN_SIZE, "epochs": EPOCHS, "learn": LEARN, "judge": JUDGE}
    introduction = INTRODUCTION.format(**settings, embedding=EMBEDDING, temperature=TEMPERATURE)
    lines = ["# What other losses and targets earn in fine-tuning", "", introduction]
    lines += ["| Data | Photos that learn | that judge | Teacher | Head | Fine-tuned | Distilled | Ensemble of heads |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        found = [row["scores"].get(name) for name in (PROBE, PLAIN.name, WHOLE.name, ENSEMBLE)]
        cells = [f"{each['top1']:.3f}" if each else "not run" for each in found]
        counts = f"{row['learned']} | {row['judged']} | {row['teacher']:.3f}"
        lines.append(f"| {row['data']} | {counts} | {' | '.join(cells)} |")
    data = [row["data"] for row in rows]
    for metric in METRICS:
        lines += begin_gains(metric, data)
        for question, _, _ in QUESTIONS:
            gains = [row["gains"].get(question, {}).get(metric) for row in rows]
            lines += [show_gains(question, gains, metric)] if any(gains) else []
    lines += ["", "## Processor seconds", "", f"| What | {' | '.join(data)} |", f"| --- |{' ---: |' * len(rows)}"]
    for name in (PROBE, ENSEMBLE, *(way.name for way in WAYS)):
        cells = [f"{row['seconds'][name]:.0f}" if name in row["seconds"] else "not run" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", READING])


def main() -> None:
    """Measure, and write the page and its rows after each training."""
    parser = make_parser(__doc__)
    parser.add_argument("data", nargs="+", type=Path)
    settings = parser.parse_args()
    names = [one.name for one in find_backbones(load_config(None, []))]
    trials = [Trial.of(data, settings.features) for data in settings.data]
    for way in WAYS:
        for trial in trials:
            trial.run(way)
            rows = [each.measure() for each in trials]
            write_results(settings.out, rows, write_page(rows, names))


if __name__ == "__main__":
    main()
