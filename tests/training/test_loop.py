"""The laws of learning: it learns, repeats itself, resumes as if unbroken, and adds up micro-batches."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional

from fieldmark.augment.mixing import Mix, apply_mix, one_hot
from fieldmark.training.evaluate import Validation
from fieldmark.training.loop import (
    EpochTally,
    MemoryExhaustedError,
    NonFiniteError,
    TrainBatch,
    TrainState,
    UpdateOptions,
    soft_cross_entropy,
    train_epochs,
    update,
)
from fieldmark.training.optim import ScheduleSpec

CLASSES = 3
STEPS = 5


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


def make_model(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, CLASSES))


def make_state(
    fabric: Fabric, model: nn.Module, *, micro: int = 64, epochs: int = 4, ema: float = 0.0, kind=torch.optim.AdamW
) -> TrainState:
    groups = [{"params": list(model.parameters()), "lr": 0.01, "base_lr": 0.01, "weight_decay": 0.01}]
    plain = kind(groups)
    network, optimizer = fabric.setup(model, plain)
    spec = ScheduleSpec("cosine", epochs, 1.0, None, 2)
    average = ModelEmaV3(model, decay=ema) if ema else None
    schedule = partial(spec.factor, steps_per_epoch=STEPS)
    state = TrainState(model, network, optimizer, schedule, average, EpochTally.zeros(fabric.device), micro)
    state.set_rates()
    return state


def make_batch(seed: int, *, size: int = 8, is_mixed: bool = False) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    images = torch.randn(size, 3, 4, 4, generator=generator) + labels[:, None, None, None]
    targets = one_hot(labels, CLASSES, 0.0)
    partners, fraction = labels, 1.0
    if is_mixed:
        mix = Mix("mixup", 0.7, (0, 0, 0, 0), np.arange(size)[::-1].copy())
        images, targets = apply_mix(images, targets, mix)
        partners, fraction = labels.flip(0), 0.7
    return TrainBatch(images, targets, labels, partners, fraction, is_mixed, torch.arange(size), size)


def batches(epoch: int, first: int):
    for step in range(first, STEPS):
        yield make_batch(100 * epoch + step, is_mixed=step % 2 == 1)


def run(fabric, state, *, epochs=4, source=batches, evaluate=lambda model: Validation({"top1": 0.5})):
    return list(
        train_epochs(
            fabric,
            state,
            epochs=epochs,
            steps_per_epoch=STEPS,
            batches=source,
            evaluate=evaluate,
            options=UpdateOptions(),
        )
    )


def weights_of(state: TrainState) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.model.parameters()]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_overfits_one_batch(fabric):
    state = make_state(fabric, make_model(), epochs=30)
    reports = run(fabric, state, epochs=30, source=lambda epoch, first: (make_batch(0) for _ in range(STEPS)))
    assert reports[-1].train_loss < 0.05
    assert reports[-1].train_top1_clean == 1.0


def test_the_same_seed_gives_the_same_run(fabric):
    first, second = (make_state(fabric, make_model(dropout=0.3)) for _ in range(2))
    for state in (first, second):
        torch.manual_seed(1)
        run(fabric, state)
    assert_equal(weights_of(first), weights_of(second))


# AdamW would hide a gradient of the wrong scale: these laws are held to plain SGD.
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_four_micro_batches_equal_one_batch(fabric, clip_norm):
    whole, parts = (make_state(fabric, make_model(), micro=micro, kind=torch.optim.SGD) for micro in (64, 2))
    for state in (whole, parts):
        update(fabric, state, make_batch(0), UpdateOptions(clip_norm=clip_norm))
    for a, b in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(a, b)


def test_unequal_micro_batches_equal_one_batch_too(fabric):
    whole, parts = (make_state(fabric, make_model(), micro=micro, kind=torch.optim.SGD) for micro in (64, 3))
    for state in (whole, parts):
        update(fabric, state, make_batch(0, size=8), UpdateOptions())
    for a, b in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(a, b)


def test_an_update_follows_the_mean_gradient_of_its_photos(fabric):
    state, model = make_state(fabric, make_model(), kind=torch.optim.SGD), make_model()
    batch = make_batch(0)
    functional.cross_entropy(model(batch.images), batch.labels).backward()
    group = state.optimizer.param_groups[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= group["lr"] * (parameter.grad + group["weight_decay"] * parameter)
    update(fabric, state, batch, UpdateOptions())
    for own, expected in zip(weights_of(state), model.parameters(), strict=True):
        torch.testing.assert_close(own, expected.detach())


def test_the_schedule_counts_updates_and_not_micro_batches(fabric):
    state = make_state(fabric, make_model(), micro=2)
    run(fabric, state, epochs=2)
    assert state.step == 2 * STEPS
    assert state.optimizer.param_groups[0]["lr"] == 0.01 * state.schedule(2 * STEPS)


@pytest.mark.parametrize("stop_after", [1, 3, 7, 10, 13])
def test_a_run_left_at_any_update_and_taken_up_again_equals_an_unbroken_one(fabric, stop_after):
    torch.manual_seed(5)
    unbroken = make_state(fabric, make_model(), ema=0.9)
    expected = run(fabric, unbroken)

    torch.manual_seed(5)
    broken = make_state(fabric, make_model(), ema=0.9)
    left = itertools.count()

    def leaving(epoch, first):
        for batch in batches(epoch, first):
            if next(left) == stop_after:
                return
            yield batch

    before = run(fabric, broken, source=leaving)
    assert broken.step == stop_after
    if before and not before[-1].is_complete:
        before.pop()
    after = run(fabric, broken)
    assert_equal(weights_of(broken), weights_of(unbroken))
    own, other = broken.average.module.state_dict(), unbroken.average.module.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    losses = [report.train_loss for report in [*before, *after]]
    assert losses == [report.train_loss for report in expected]


def test_an_epoch_left_early_says_so_and_is_not_evaluated(fabric):
    state = make_state(fabric, make_model())
    reports = run(fabric, state, source=lambda epoch, first: itertools.islice(batches(epoch, first), 2))
    assert [report.is_complete for report in reports] == [False]
    assert reports[0].metrics == {}
    assert (state.epoch, state.step_in_epoch) == (0, 2)


def test_clean_and_mixed_accuracy_are_kept_apart(fabric):
    state = make_state(fabric, make_model())
    report = run(fabric, state, epochs=1)[0]
    assert report.clean_fraction == pytest.approx(3 / 5)
    assert report.train_top1_clean is not None
    assert report.train_top1_mixed is not None
    clean_only = run(
        fabric,
        make_state(fabric, make_model()),
        epochs=1,
        source=lambda epoch, first: (make_batch(n) for n in range(STEPS)),
    )[0]
    assert clean_only.train_top1_mixed is None
    assert clean_only.clean_fraction == 1.0


def test_mixed_accuracy_weighs_both_labels_by_lambda():
    tally = EpochTally.zeros(torch.device("cpu"))
    batch = make_batch(0, size=3, is_mixed=True)  # labels 0 1 2, partners 2 1 0, λ = 0.7
    tally.add(batch, 10 * functional.one_hot(torch.tensor([2, 1, 1]), CLASSES).float(), torch.tensor(1.0))
    assert tally.sums.tolist() == pytest.approx([1.0, 3, 0, 0, 0.3 + 1.0 + 0.0, 3])


def test_soft_cross_entropy_equals_torchs_for_hard_and_soft_targets():
    logits, labels = torch.randn(6, CLASSES), torch.arange(6) % CLASSES
    soft = torch.softmax(torch.randn(6, CLASSES), 1)
    expected = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot(labels, CLASSES, 0.1), None), expected)
    torch.testing.assert_close(
        soft_cross_entropy(logits, soft, None), functional.cross_entropy(logits, soft, reduction="sum")
    )


def test_class_weights_have_one_scale_for_hard_and_soft_targets():
    logits, weights = torch.randn(6, CLASSES), torch.tensor([0.5, 1.0, 4.0])
    labels = torch.full((6,), 2)
    hard = soft_cross_entropy(logits, one_hot(labels, CLASSES, 0.0), weights)
    almost_hard = soft_cross_entropy(logits, one_hot(labels, CLASSES, 1e-6), weights)
    torch.testing.assert_close(hard, almost_hard, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hard, 4 * functional.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stops_before_the_weights_move_and_names_the_photos(fabric, poison):
    state = make_state(fabric, make_model())
    update(fabric, state, make_batch(0), UpdateOptions())
    before = weights_of(state)
    batch = make_batch(1)
    batch.images[3, 0, 0, 0] = poison
    with pytest.raises(NonFiniteError, match="update 1 is not finite") as caught:
        update(fabric, state, batch, UpdateOptions())
    assert caught.value.numbers == list(range(8))
    assert_equal(weights_of(state), before)


@pytest.mark.parametrize("has_average", [False, True])
def test_a_weight_that_the_last_update_ruined_stops_before_it_is_evaluated(fabric, has_average):
    state = make_state(fabric, make_model(), ema=0.5 if has_average else 0.0, kind=torch.optim.SGD)

    def ruining(epoch, first):
        for step in range(STEPS):
            if step == STEPS - 1:
                state.optimizer.param_groups[0]["lr"] = math.inf
            yield make_batch(step)

    evaluated = []
    with pytest.raises(NonFiniteError, match=f"a weight after update {STEPS - 1} is not finite"):
        run(fabric, state, source=ruining, evaluate=lambda model: evaluated.append(model) or Validation())
    assert not evaluated


class Greedy(nn.Module):
    """Runs out of memory with more than `most` photos at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner = make_model()
        self.most = most

    def forward(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(images)


def test_out_of_memory_says_which_size_to_try(fabric):
    state = make_state(fabric, Greedy(most=3))
    with pytest.raises(MemoryExhaustedError, match=r"8 photos of 4x4 pixels.*train.micro_batch_size=4"):
        update(fabric, state, make_batch(0), UpdateOptions())


def test_out_of_memory_is_answered_by_smaller_micro_batches_with_the_same_result(fabric):
    state, roomy = make_state(fabric, Greedy(most=3)), make_state(fabric, Greedy(most=99))
    reports = run(fabric, state, epochs=1)
    run(fabric, roomy, epochs=1)
    assert state.micro_batch_size == 2
    assert reports[0].is_complete
    for a, b in zip(weights_of(state), weights_of(roomy), strict=True):
        torch.testing.assert_close(a, b)


def test_a_photo_that_does_not_fit_alone_is_an_error_and_not_an_endless_loop(fabric):
    with pytest.raises(MemoryExhaustedError):
        run(fabric, make_state(fabric, Greedy(most=0)))


def test_frozen_weights_and_their_statistics_do_not_move(fabric):
    model = make_model()
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    run(fabric, make_state(fabric, model))
    assert torch.equal(model[1].weight, before)


def test_the_average_is_what_is_evaluated(fabric):
    state = make_state(fabric, make_model(), ema=0.9)
    seen = []
    run(fabric, state, epochs=1, evaluate=lambda model: seen.append(model) or Validation())
    assert seen == [state.average.module]
