"""One training program as a process that trains an epoch for each line on its input: see `contest`.

    python -m benchmarks.contender SETUP_AS_JSON FOLDER

All train the same model from random weights by AdamW with the competition's augmentation list; none validates within
the time. Each keeps its own loader, transforms and loop, which are what is compared.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.contest import Setup

LR, WEIGHT_DECAY = 1e-4, 1e-2
ENDLESS = 10**6


class Stage:
    """The contender's end of the line: waits for a word, and tells how long an epoch took."""

    def __init__(self) -> None:
        # What libraries print must not be taken for a result.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """Whether another epoch is wanted."""
        return bool(sys.stdin.readline())

    def tell(self, seconds: float, photos: int) -> None:
        """One epoch is over; also tell the most memory that it took of a GPU."""
        import torch

        memory = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
        self._answers.write(f"{seconds} {photos} {memory}\n")
        self._answers.flush()

    def run(self, epoch: Callable[[], int]) -> None:
        """Time `epoch`, which gives its number of photos, as often as asked."""
        while self.wait():
            began = time.perf_counter()
            photos = epoch()
            self.tell(time.perf_counter() - began, photos)


def _settings(setup: Setup) -> Any:
    from fieldmark.config import load_config

    return load_config(
        "competition",
        [
            f'data.path="{setup.data}"',
            "cache.mode=uint8",
            "augment.executor=fast",
            f"augment.size={setup.size}",
            "mix.share=0",
            f"model.name={setup.model}",
            "model.weights=random",
            "model.head=linear",
            f"optim.lr={LR}",
            f"optim.weight_decay={WEIGHT_DECAY}",
            f"train.epochs={ENDLESS}",
            f"train.batch_size={setup.batch_size}",
            "train.precision=auto",
            "train.save_minutes=0",
            f"train.device={setup.device}",
            *setup.more.split(),
        ],
    )


def ours(setup: Setup, folder: Path, stage: Stage) -> None:
    """Fieldmark as a user runs it, with the fast executor and the uint8 cache."""
    from fieldmark.runs.train import train

    reports = train(_settings(setup), folder / "run")
    while stage.wait():
        report = next(reports)
        stage.tell(report.seconds, report.images)


def ours_model(setup: Setup, folder: Path, stage: Stage) -> None:
    """Fieldmark's own loop on one batch that is ready: the ceiling."""
    from fieldmark.progress import Quiet
    from fieldmark.runs.session import open_session
    from fieldmark.training.evaluate import Validation
    from fieldmark.training.loop import train_epochs

    with open_session(_settings(setup), folder / "run", start="new", progress=Quiet()) as session:
        state = session.start_training()
        batch = next(iter(session.train_batches(0, 0)))
        steps = setup.steps or session.plan.steps_per_epoch
        reports = train_epochs(
            session.fabric,
            state,
            epochs=ENDLESS,
            steps_per_epoch=steps,
            batches=lambda epoch, first: itertools.repeat(batch, steps),
            evaluate=lambda model: Validation(),
            options=session.make_update_options(),
        )
        while stage.wait():
            report = next(reports)
            stage.tell(report.seconds, report.images)


def timm_script(setup: Setup, folder: Path, stage: Stage) -> None:
    """timm's own train.py, its transforms completed to the competition's list."""
    from timm.data import loader
    from torchvision import transforms

    create = loader.create_transform

    def create_transform(*args: Any, **settings: Any) -> Any:
        made = create(*args, **settings)
        if settings.get("is_training"):  # its flags have neither an affine nor a hue
            place = next(n for n, step in enumerate(made.transforms) if isinstance(step, transforms.ColorJitter))
            affine = transforms.RandomAffine(20, translate=(0.1, 0.1), shear=5)
            made.transforms[place : place + 1] = [affine, transforms.ColorJitter(0.2, 0.2, 0.2, 0.1)]
        return made

    loader.create_transform = create_transform
    specification = importlib.util.spec_from_file_location("timm_train", setup.timm_script)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    train_one_epoch = script.train_one_epoch

    def timed(epoch: int, model: Any, batches: Any, *args: Any, **settings: Any) -> Any:
        if not stage.wait():
            os._exit(0)
        began = time.perf_counter()
        result = train_one_epoch(epoch, model, batches, *args, **settings)
        stage.tell(time.perf_counter() - began, len(batches) * setup.batch_size)  # it drops an incomplete last batch
        return result

    script.train_one_epoch = timed
    sys.argv = [setup.timm_script, *timm_flags(setup, folder)]
    script.main()


def timm_flags(setup: Setup, folder: Path) -> list[str]:
    """The flags of timm's script."""
    classes = len(list((Path(setup.data) / "train").iterdir()))
    size = setup.size
    text = (
        f"--train-split train --val-split val --model {setup.model} --num-classes {classes} --device {setup.device} "
        f"--input-size 3 {size} {size} -b {setup.batch_size} --opt adamw --lr {LR} --weight-decay {WEIGHT_DECAY} "
        f"--epochs {ENDLESS} --scale 0.6 1.2 --ratio 0.75 1.33 --hflip 0.5 --vflip 0.5 --color-jitter 0.2 --reprob 0.3 "
        f"--remode pixel --train-interpolation bilinear --val-interval {ENDLESS} --log-interval {ENDLESS}"
    )
    tuned = ["--channels-last"] if setup.is_tuned else []
    if setup.is_tuned and has_bf16(setup.device):
        tuned += ["--amp", "--amp-dtype", "bfloat16"]
    workers = ["--workers", str(setup.workers)] if setup.workers else []
    return [setup.data, *text.split(), "--output", str(folder / "timm"), *tuned, *workers]


def torchvision_loop(setup: Setup, folder: Path, stage: Stage) -> None:
    """The plain loop of torchvision's references: ImageFolder, DataLoader, PIL transforms."""
    import timm
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from benchmarks.pipelines import report_transforms

    is_ready = setup.kind.endswith("-model")
    photos: Any = ImageFolder(Path(setup.data) / "train", report_transforms(setup.size))
    loader = DataLoader(
        photos,
        setup.batch_size,
        shuffle=True,
        num_workers=0 if is_ready else setup.workers,
        persistent_workers=not is_ready,
        pin_memory=setup.device == "cuda",
    )
    model = timm.create_model(setup.model, num_classes=len(photos.classes)).to(setup.device)
    layout: Any = torch.channels_last if setup.is_tuned else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)
    loss_of = torch.nn.CrossEntropyLoss()
    first = next(iter(loader)) if is_ready else None

    def batches() -> Iterator[Any]:
        return itertools.repeat(first, setup.steps or len(loader)) if is_ready else iter(loader)

    def epoch() -> int:
        done = 0
        for images, labels in batches():
            images = images.to(setup.device, non_blocking=True, memory_format=layout)
            with torch.autocast(setup.device, torch.bfloat16, enabled=setup.is_tuned and has_bf16(setup.device)):
                loss = loss_of(model(images), labels.to(setup.device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += len(labels)
        if setup.device == "cuda":
            torch.cuda.synchronize()
        return done

    stage.run(epoch)


def fastai_learner(setup: Setup, folder: Path, stage: Stage) -> None:
    """A fastai Learner over the same ImageFolder."""
    import timm
    import torch
    from fastai.callback.channelslast import ChannelsLast
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.optimizer import Adam
    from torchvision.datasets import ImageFolder

    from benchmarks.pipelines import report_transforms

    photos: Any = ImageFolder(Path(setup.data) / "train", report_transforms(setup.size))
    loaders = [DataLoader(photos, bs=setup.batch_size, shuffle=True, num_workers=setup.workers) for _ in range(2)]
    dls = DataLoaders(*loaders, device=torch.device(setup.device))
    model = timm.create_model(setup.model, num_classes=len(photos.classes))
    callbacks = [ChannelsLast()] if setup.is_tuned else []
    learner = Learner(
        dls, model, loss_func=torch.nn.CrossEntropyLoss(), opt_func=Adam, lr=LR, wd=WEIGHT_DECAY, cbs=callbacks
    )
    if setup.is_tuned and setup.device == "cuda":
        learner = learner.to_bf16()
    times: list[float] = []

    train = learner._do_epoch_train

    def timed() -> None:
        began = time.perf_counter()
        train()
        times.append(time.perf_counter() - began)

    learner._do_epoch_train, learner._do_epoch_validate = timed, lambda *_, **__: None
    while stage.wait():
        with learner.no_bar(), learner.no_logging():
            learner.fit(1)
        stage.tell(times[-1], len(photos))


def has_bf16(device: str) -> bool:
    """Whether the device computes in bf16 rather than imitating it."""
    import torch

    from fieldmark.training.evaluate import has_fast_bf16

    return torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else has_fast_bf16()


KINDS: dict[str, Callable[[Setup, Path, Stage], None]] = {
    "ours": ours,
    "ours-model": ours_model,
    "timm": timm_script,
    "torchvision": torchvision_loop,
    "torchvision-model": torchvision_loop,
    "fastai": fastai_learner,
}


def main() -> None:
    """Train as told."""
    setup = Setup(**json.loads(sys.argv[1]))
    KINDS[setup.kind](setup, Path(sys.argv[2]), Stage())


if __name__ == "__main__":
    main()
