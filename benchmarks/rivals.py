"""A peer as a process that learns from labeled photos and writes a prediction file for others: see `budget`.

    python -m benchmarks.rivals TASK_AS_JSON

All start from the same weights, as a rule those of the package of EfficientNet-Lite0. The settings are what each
project's own documentation gives for fine-tuning, with channels_last everywhere and bf16 where the processor computes
in it.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.contender import has_bf16
from benchmarks.labeled import list_photos

MODEL, TEST_SIZE, BATCH_SIZE = "tf_efficientnet_lite0", 224, 32

C_VALUES = (0.0001, 0.001, 0.01, 0.1)
FOLDS = 3

TIMM_FLAGS = (
    f"--train-split train --val-split val --pretrained -b {BATCH_SIZE} --opt adamw --lr 1e-3 "
    "--weight-decay 0.05 --layer-decay 0.75 --sched cosine --sched-on-updates --warmup-epochs 0 --min-lr 1e-6 "
    "--scale 0.35 1.0 --hflip 0.5 --smoothing 0.1 --checkpoint-hist 1 --log-interval 1000000 --channels-last"
)


@dataclass(frozen=True)
class Task:
    """What a peer does.

    Attributes:
        kind: A key of `KINDS`.
        folder: Holds train/ and val/.
        photos: Folder of the photos to predict.
        out: Prediction file to write.
        scratch: A folder for whatever else it writes.
        weights: File of a state_dict in timm's names.
        model: timm's name of the network that timm's script trains; the other peers take EfficientNet-Lite0.
        stride_in_1x1: The weights are of a ResNet as Keras builds it, with strides in first convolutions.
        size: Side of the images, in pixels.
        epochs: Of training; those of fastai are counted without its frozen one.
        updates: Of an epoch; 0 is as many as the photos make.
        seed: Of everything drawn.
        workers: Loader processes.
        device: `cpu` or `cuda`.
        timm_script: timm's train.py.
        seconds: Time limit of training, for a peer that keeps one by itself.
    """

    kind: str
    folder: str
    photos: str
    out: str
    scratch: str
    weights: str
    model: str = MODEL
    stride_in_1x1: bool = False
    size: int = TEST_SIZE
    epochs: int = 1
    updates: int = 0
    seed: int = 0
    workers: int = 1
    device: str = "cpu"
    timm_script: str = ""
    seconds: float = 0.0

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted."""
        return sorted(path.name for path in (Path(self.folder) / "train").iterdir())


@dataclass
class Timings:
    """Where the time of training went, for whoever plans how much of it fits.

    Attributes:
        frozen: Seconds of an update while the backbone was frozen, one for each epoch.
        updates: Seconds of an update otherwise, one for each epoch.
        validations: Seconds of each validation.
        counted: All of these together, in seconds.
    """

    frozen: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    counted: float = 0.0

    def save(self, folder: str) -> None:
        """Write them where the parent looks."""
        (Path(folder) / "timings.json").write_text(json.dumps(vars(self)), encoding="utf-8")


def logistic_regression(task: Task) -> None:
    """What a careful user does by hand: features, standardized, and a C chosen by cross-validation.

    Cross-validation chooses, so the photos to validate on are learned from, too.
    """
    import timm
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = timm.create_model(MODEL, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": task.weights})
    folder, classes = Path(task.folder), task.classes
    files = [file for split in ("train", "val") for file in list_photos(folder / split, classes)]
    features = forward(model, files, task)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": C_VALUES},
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=task.seed),
        n_jobs=task.workers + 1,
    )
    search.fit(features, [file.parent.name for file in files])
    tests = list_photos(Path(task.photos))
    write_predictions(task, tests, search.predict(forward(model, tests, task)))


def timm_script(task: Task) -> None:
    """timm's own train.py; its model then names the photos, in the same process, by timm's own transform."""
    import importlib.util

    specification = importlib.util.spec_from_file_location("timm_train", task.timm_script)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    train_one_epoch, timings, trained = script.train_one_epoch, Timings(), {}

    def timed(epoch: int, model: Any, batches: Any, *args: Any, **settings: Any) -> Any:
        began = time.perf_counter()
        result = train_one_epoch(epoch, model, batches, *args, **settings)
        seconds = time.perf_counter() - began
        trained["model"] = model
        timings.updates.append(seconds / len(batches))
        timings.counted += seconds
        return result

    script.train_one_epoch = timed
    if task.stride_in_1x1:
        script.create_model = partial(_create_strided, script.create_model)
    sys.argv = [task.timm_script, *timm_flags(task)]
    script.main()
    timings.save(task.scratch)
    tests = list_photos(Path(task.photos))
    answers = forward(trained["model"], tests, task).argmax(axis=1)
    write_predictions(task, tests, [task.classes[answer] for answer in answers])


def _create_strided(create: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    from fieldmark.models.classifier import move_stride_to_1x1

    model = create(*args, **settings)
    move_stride_to_1x1(model, str(args[0]))
    return model


def timm_flags(task: Task) -> list[str]:
    """The flags of timm's script: those of speed, and fine-tuning with layer-wise rates."""
    more = (
        f"--model {task.model} --num-classes {len(task.classes)} --input-size 3 {task.size} {task.size} "
        f"--epochs {task.epochs} --val-interval {task.epochs} --seed {task.seed} "
        f"--workers {task.workers} --device {task.device}"
    )
    updates = ["--train-batches-per-epoch", str(task.updates)] if task.updates else []
    amp = ["--amp", "--amp-dtype", "bfloat16"] if has_bf16(task.device) else []
    files = ["--pretrained-path", task.weights, "--output", task.scratch]
    return [task.folder, *TIMM_FLAGS.split(), *more.split(), *updates, *amp, *files]


def fastai_fine_tune(task: Task) -> None:
    """fastai's vision_learner with its usual augmentation: one frozen epoch, then all layers, at its own rates.

    Where not all photos fit into the time, a part of them, drawn by chance, is learned from.
    """
    import random

    import fastai.callback.schedule  # noqa: F401  (it gives learners their fine_tune)
    from fastai.callback.channelslast import ChannelsLast
    from fastai.data.block import CategoryBlock, DataBlock
    from fastai.data.transforms import FuncSplitter, parent_label
    from fastai.torch_core import set_seed
    from fastai.vision.augment import Resize, aug_transforms
    from fastai.vision.data import ImageBlock
    from fastai.vision.learner import vision_learner

    set_seed(task.seed)
    folder, classes = Path(task.folder), task.classes
    train = list_photos(folder / "train", classes)
    if task.updates:
        train = random.Random(task.seed).sample(train, min(task.updates * BATCH_SIZE, len(train)))
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock(vocab=classes)),
        get_items=lambda _: [*train, *list_photos(folder / "val", classes)],
        get_y=parent_label,
        splitter=FuncSplitter(lambda file: file.parent.parent.name == "val"),
        item_tfms=Resize(task.size),
        batch_tfms=aug_transforms(),
    )
    # Fewer photos than a batch are one batch: an incomplete one is dropped.
    batch_size = min(BATCH_SIZE, len(train))
    loaders = block.dataloaders(folder, bs=batch_size, num_workers=task.workers, device=_torch_device(task))
    overlay = {"pretrained_cfg_overlay": {"file": task.weights}}
    learner = vision_learner(loaders, MODEL, cbs=[ChannelsLast()], path=Path(task.scratch), **overlay)
    if task.device == "cuda" and has_bf16(task.device):
        learner = learner.to_bf16()
    timings = _time_epochs(learner, updates=len(loaders.train))
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(task.epochs)
        timings.save(task.scratch)
        tests = list_photos(Path(task.photos))
        answers = learner.get_preds(dl=loaders.test_dl(tests))[0].argmax(dim=1).tolist()
    write_predictions(task, tests, [classes[answer] for answer in answers])


def _time_epochs(learner: Any, *, updates: int) -> Timings:
    """Note how long each epoch of a fastai learner takes; its first is the frozen one."""
    timings = Timings()
    train, validate = learner._do_epoch_train, learner._do_epoch_validate

    def timed_train() -> None:
        began = time.perf_counter()
        train()
        seconds = time.perf_counter() - began
        (timings.updates if timings.frozen else timings.frozen).append(seconds / updates)
        timings.counted += seconds

    def timed_validate(*args: Any, **settings: Any) -> None:
        began = time.perf_counter()
        validate(*args, **settings)
        if len(timings.validations) < len(timings.frozen) + len(timings.updates):  # get_preds comes here, too
            timings.validations.append(time.perf_counter() - began)
            timings.counted += timings.validations[-1]

    learner._do_epoch_train, learner._do_epoch_validate = timed_train, timed_validate
    return timings


def autogluon_multimodal(task: Task) -> None:
    """AutoGluon's MultiModalPredictor, which keeps a time limit by itself, by its preset for small backbones.

    Its default preset has a quarter of that learning rate, for backbones with 20 times the weights.
    """
    import pandas as pd
    from autogluon.multimodal import MultiModalPredictor

    folder = Path(task.folder)
    sets: dict[str, Any] = {}
    for split in ("train", "val"):
        files = list_photos(folder / split, task.classes)
        sets[split] = pd.DataFrame({"image": [*map(str, files)], "label": [file.parent.name for file in files]})
    predictor = MultiModalPredictor(
        label="label", path=str(Path(task.scratch) / "autogluon"), enable_progress_bar=False
    )
    checkpoint = write_autogluon_checkpoint(Path(task.weights), Path(task.scratch) / "lite0")
    settings = {"model.names": ["timm_image"], "model.timm_image.checkpoint_name": str(checkpoint)}
    predictor.fit(
        sets["train"],
        presets="medium_quality",
        tuning_data=sets["val"],
        time_limit=task.seconds,
        seed=task.seed,
        hyperparameters=settings,
    )
    Timings(counted=task.seconds).save(task.scratch)
    tests = list_photos(Path(task.photos))
    write_predictions(task, tests, list(predictor.predict(pd.DataFrame({"image": [*map(str, tests)]}))))


def write_autogluon_checkpoint(weights: Path, folder: Path) -> Path:
    """Write weights as the folder that AutoGluon reads instead of asking a hub; it adds a classifier of its own."""
    import timm
    import torch

    tensors = torch.load(weights, weights_only=True)
    folder.mkdir()
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    torch.save(body, folder / "pytorch_model.bin")
    config = timm.get_pretrained_cfg(MODEL)
    assert config is not None
    about = {"architecture": MODEL, "num_features": tensors["classifier.weight"].shape[1]}
    about["pretrained_cfg"] = config.to_dict()
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def forward(model: Any, files: Sequence[Path], task: Task) -> Any:
    """What a timm model says of photos under its own test transform, one row each."""
    import numpy as np
    import torch
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    from torch.utils.data import DataLoader, Dataset

    config = resolve_data_config({"input_size": (3, task.size, task.size)}, model=model)
    transform: Any = create_transform(**config)

    class Photos(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, place: int) -> Any:
            with Image.open(files[place]) as photo:
                return transform(photo.convert("RGB"))

    model = model.to(task.device, memory_format=torch.channels_last).eval()
    is_bf16 = has_bf16(task.device)
    rows: list[Any] = []
    with torch.inference_mode(), torch.autocast(task.device, torch.bfloat16, enabled=is_bf16):
        for images in DataLoader(Photos(), batch_size=2 * BATCH_SIZE, num_workers=task.workers):
            images = images.to(task.device, memory_format=torch.channels_last)
            rows.append(model(images).float().cpu().numpy())
    return np.concatenate(rows)


def write_predictions(task: Task, files: Sequence[Path], labels: Sequence[str]) -> None:
    """The prediction file: whole when it is there."""
    part = Path(task.out).with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label"))
        writer.writerows((path.name, label) for path, label in zip(files, labels, strict=True))
    part.replace(task.out)


def save_weights(path: Path) -> None:
    """Write the package's weights under timm's names, as a file that every peer reads.

    Raises:
        WeightsError: The package is not installed.
    """
    import timm
    import torch

    from fieldmark.models.catalog import find_package, package_file
    from fieldmark.models.weights import match_by_position, read_tensors

    file = package_file(find_package("package:efficientnet-lite0", MODEL))
    with torch.device("meta"):
        layout = timm.create_model(MODEL).state_dict()
    torch.save(match_by_position(read_tensors(file)[0], layout, file.name), path)


def _torch_device(task: Task) -> Any:
    import torch

    return torch.device(task.device)


KINDS: dict[str, Callable[[Task], None]] = {
    "scikit-learn": logistic_regression,
    "timm": timm_script,
    "fastai": fastai_fine_tune,
    "autogluon": autogluon_multimodal,
}


def main() -> None:
    """Learn and predict as told."""
    task = Task(**json.loads(sys.argv[1]))
    KINDS[task.kind](task)


if __name__ == "__main__":
    main()
