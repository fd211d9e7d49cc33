"""Learning: read this first.

`train_epochs` is a generator. It prints nothing, saves nothing and has no hooks: it yields an `EpochReport` after each
epoch, and the caller prints, saves, tracks, changes what is frozen, or stops by leaving the `for`. To stop within an
epoch, the caller's iterator of batches ends early: between two updates the state is whole. The report then says
`is_complete = False`, and the state can be saved and resumed at that very update.

Shape letters: B photos of one update in this process, K classes, S side in pixels, N photos, F features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fieldmark.errors import ConfigError, NonFiniteError, ResourceError
from fieldmark.training.evaluate import Predictions, Validation

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from timm.utils import ModelEmaV3

    from fieldmark.training.replay import Replay

MEMORY_SIGNS = ("can't allocate memory", "out of memory")  # of the processor, and of libraries below torch
PROBE_WEIGHT_DECAY, PROBE_BATCH_SIZE = 1e-2, 256
Chunk = tuple[Tensor, Tensor]  # images and targets of a micro-batch
READ_TOGETHER = 32  # numbers of a GPU that are read at once: it waits for the host so much more seldom


class FiniteWatch:
    """Raises `NonFiniteError` when a watched number is not finite.

    On the CPU at once, before the weights move. On a GPU reading a number would stall it, so some are read together, at
    the latest by `drain`: which is called before anything is evaluated or saved, so no bad weights reach the disk.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def check_finite(self, value: Tensor, *, step: int, numbers: Tensor) -> None:
        """Check a 0-d number of an update with these photos, now or a little later."""
        self._pending.append((step, numbers, value.detach().isfinite()))
        if value.device.type != "cuda" or len(self._pending) == READ_TOGETHER:
            self.drain()

    def drain(self) -> None:
        """Check all numbers that were not read yet."""
        pending, self._pending = self._pending, []
        are_finite = torch.stack([is_finite for *_, is_finite in pending]).tolist() if pending else []
        for (step, numbers, _), is_finite in zip(pending, are_finite, strict=True):
            if not is_finite:
                raise NonFiniteError(step, numbers.tolist())


@dataclass(frozen=True)
class TrainBatch:
    """Holds what one update learns from, on the device."""

    images: Tensor  # (B, 3, S, S) float, normalized and mixed
    targets: Tensor  # (B, K) float, each row a distribution over classes: smoothed and mixed
    labels: Tensor  # (B,) int64 class of the photo itself
    partner_labels: Tensor  # (B,) int64 class of the photo that was mixed in
    own_fraction: float  # λ, the share of the photo itself in [0, 1]; 1 for a batch that was left as it is
    is_mixed: bool
    numbers: Tensor  # (B,) int64 photo numbers, on the CPU, for messages
    global_size: int  # photos of this update over all processes


@dataclass
class EpochTally:
    """Running sums of an epoch, so that it can be left and resumed: one tensor, which processes add up in one call."""

    sums: Tensor  # (6,) float64 on the device: loss, photos, clean hits, clean photos, mixed hits, mixed photos

    @classmethod
    def zeros(cls, device: torch.device) -> EpochTally:
        """Start an epoch."""
        # Apple's MPS has no float64.
        kind = torch.float32 if device.type == "mps" else torch.float64
        return cls(torch.zeros(6, dtype=kind, device=device))

    def add(self, batch: TrainBatch, logits: Tensor, loss: Tensor) -> None:
        """Count one update, without reading anything back from the device."""
        size = len(batch.labels)
        predicted = logits.argmax(1)
        hits = (predicted == batch.labels).sum().to(self.sums.dtype)
        total_loss, photos, clean_hits, clean_photos, mixed_hits, mixed_photos = self.sums.unbind()
        total_loss += loss.to(self.sums.dtype)
        photos += size
        if batch.is_mixed:
            partner_hits = (predicted == batch.partner_labels).sum()
            mixed_hits += batch.own_fraction * hits + (1 - batch.own_fraction) * partner_hits
            mixed_photos += size
        else:
            clean_hits += hits
            clean_photos += size

    def reduce(self, fabric: Fabric) -> list[float]:
        """Add up the sums of all processes; waits for the device."""
        return fabric.all_reduce(self.sums.clone(), reduce_op="sum").tolist()  # type: ignore[union-attr]


@dataclass
class TrainState:
    """All that changes while learning. What is not here can be computed again from the settings."""

    model: nn.Module  # the plain model: weights, buffers, what is frozen
    network: nn.Module  # the same model as Fabric set it up: precision, gradient sync
    optimizer: torch.optim.Optimizer  # as Fabric set it up
    schedule: Callable[[int], float]  # update (0-based) -> its learning rate over the peak rate
    average: ModelEmaV3 | None  # of weights and buffers: with statistics of another model, averaged weights fail
    tally: EpochTally  # of the epoch under way
    micro_batch_size: int  # photos per forward pass; lowered when memory runs out
    epoch: int = 0  # completed
    step: int = 0  # completed updates over the whole run
    step_in_epoch: int = 0  # completed updates of the epoch under way
    lr: float = 0.0  # of the head in the last update
    watch: FiniteWatch = field(default_factory=FiniteWatch)

    def set_rates(self) -> None:
        """Set the rate of every parameter group for the next update: its peak (`base_lr`) times the schedule's factor.

        Resuming needs the number of updates alone: torch's schedulers land in the wrong cycle of warm restarts.
        """
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    @property
    def kept_model(self) -> nn.Module:
        """The model that is evaluated and kept: the running average, where there is one."""
        return self.model if self.average is None else self.average.module

    def check_finite(self) -> None:
        """Wait for the watch, then check the weights that the last update left: nothing else has looked at them."""
        self.watch.drain()
        models = [self.model] if self.average is None else [self.model, self.average.module]
        tensors = [tensor for model in models for tensor in model.state_dict().values() if tensor.is_floating_point()]
        if not torch.isfinite(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf)):
            raise NonFiniteError(self.step - 1, [], what="a weight after")


@dataclass(frozen=True)
class UpdateOptions:
    """Says how an update is done."""

    class_weights: Tensor | None = None  # (K,) float weights of the loss, on the device
    clip_norm: float = 0.0  # largest global gradient norm; 0 is off
    pool: ThreadPoolExecutor | None = None  # threads that compute micro-batches side by side, each on a core of its own
    replay: Replay | None = None  # of the passes of a batch that is computed as one


@dataclass(frozen=True)
class EpochReport:
    """Results of one epoch."""

    epoch: int  # completed
    step: int  # completed updates
    is_complete: bool  # False when the batches ended before the epoch did: then `metrics` is empty
    lr: float  # of the head in the epoch's last update
    train_loss: float  # mean cross-entropy per photo against the targets that were trained on, in nats
    train_top1_clean: float | None  # share of hits on batches that were not mixed; None if all were
    train_top1_mixed: float | None  # λ-weighted, on mixed batches, of at most E[max(λ, 1 - λ)]; None if none was mixed
    clean_fraction: float  # share of photos in batches that were not mixed
    images: int  # trained on in this epoch by all processes since these started
    seconds: float  # wall time of the epoch's training part since this process started
    metrics: dict[str, float] = field(default_factory=dict[str, float])  # of the validation photos
    predictions: Predictions | None = field(default=None, repr=False, compare=False)


class MemoryExhaustedError(ResourceError):
    """A forward or backward pass of so many photos at once did not fit into memory."""

    def __init__(self, micro_batch_size: int, side: int) -> None:
        smaller = max(micro_batch_size // 2, 1)
        super().__init__(
            f"out of memory with {micro_batch_size} photos of {side}x{side} pixels at once. "
            f"Set train.micro_batch_size={smaller} (gradients are accumulated, so the result stays comparable), "
            "or take smaller images or a smaller model"
        )
        self.micro_batch_size = micro_batch_size


def soft_cross_entropy(logits: Tensor, targets: Tensor, class_weights: Tensor | None) -> Tensor:
    """Sum over a batch of the cross-entropy of (B, K) logits against (B, K) distributions, in nats.

    Weights multiply each class's term and are not divided out again, so hard, smoothed and mixed targets have one scale
    (torch's `CrossEntropyLoss` divides by the weights for hard targets only).
    """
    terms = targets * functional.log_softmax(logits.float(), dim=1)
    return -(terms if class_weights is None else terms * class_weights).sum()


def update(fabric: Fabric, state: TrainState, batch: TrainBatch, options: UpdateOptions) -> tuple[Tensor, Tensor]:
    """Update the weights once, in micro-batches of `state.micro_batch_size` that add up to the whole batch's gradient.

    Gives the summed loss of this process's photos (0-d) and logits (B, K), left on the device. After a
    MemoryExhaustedError, and on the CPU after a NonFiniteError, the weights are still those before the update.
    """
    # Gradients are averaged over processes, so each contributes its photos' sum times the number of processes.
    scale = fabric.world_size / batch.global_size
    try:
        total, logits = compute_gradients(
            fabric, state.network, batch.images, batch.targets, state.micro_batch_size, options, scale=scale
        )
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        hint = "BatchNorm learns nothing from one photo a process. Raise it, or set model.freeze_batchnorm=true"
        raise ConfigError(f"train.batch_size is {batch.global_size}: {hint}") from None
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in MEMORY_SIGNS):
            raise
        state.optimizer.zero_grad(set_to_none=True)
        raise MemoryExhaustedError(min(state.micro_batch_size, len(batch.images)), batch.images.shape[-1]) from error
    norm = _clip_gradients(fabric, state, options.clip_norm)
    # Before the optimizer's step, so that on the CPU the weights are still good when this raises.
    state.watch.check_finite(total if norm is None else total + norm, step=state.step, numbers=batch.numbers)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.average is not None:
        state.average.update(state.model, step=state.step)
    state.lr = state.optimizer.param_groups[-1]["lr"]
    state.step += 1
    state.set_rates()
    state.step_in_epoch += 1
    return total, logits


def compute_gradients(
    fabric: Fabric,
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    micro_batch_size: int,
    options: UpdateOptions,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Give each weight the gradient of the batch's summed loss times `scale`; that sum (0-d) and the logits (B, K)."""
    # Parts of equal size: a last part of one photo would have no variance for BatchNorm.
    num_chunks = -(-len(images) // micro_batch_size)
    chunks = list(zip(images.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True))
    if options.pool is not None:
        return _compute_side_by_side(fabric, network, chunks, options, scale=scale)
    logits: list[Tensor] = []
    total = torch.zeros((), device=fabric.device)
    for number, (part, part_targets) in enumerate(chunks, start=1):
        with fabric.no_backward_sync(network, enabled=number < len(chunks)):  # type: ignore[arg-type]
            replayed = options.replay.compute(part) if options.replay is not None and num_chunks == 1 else None
            output = network(part) if replayed is None else replayed
            loss = soft_cross_entropy(output, part_targets, options.class_weights)
            fabric.backward(loss * scale)
        logits.append(output.detach())
        total += loss.detach()
    return total, torch.cat(logits)


def _compute_side_by_side(
    fabric: Fabric, network: nn.Module, chunks: Sequence[Chunk], options: UpdateOptions, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute micro-batches in threads and add their gradients in order.

    On a CPU two threads with half of a batch each are faster than both in each layer, where they wait for each other.
    The sum does not depend on which thread is faster. For networks that draw nothing and gather nothing in a
    pass: no dropout, and BatchNorm frozen.
    """
    assert options.pool is not None
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    plain = getattr(network, "module", network)  # Fabric's wrapper wants a backward pass of its own

    def compute(chunk: Chunk) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with fabric.autocast():
            output = plain(chunk[0])
        loss = soft_cross_entropy(output, chunk[1], options.class_weights)
        return output.detach(), loss.detach(), torch.autograd.grad(loss * scale, learning)

    logits, losses, gradients = zip(*options.pool.map(compute, chunks), strict=True)
    for parameter, *parts in zip(learning, *gradients, strict=True):
        parameter.grad = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    return torch.stack(losses).sum(), torch.cat(logits)


def train_epochs(
    fabric: Fabric,
    state: TrainState,
    *,
    epochs: int,
    steps_per_epoch: int,
    batches: Callable[[int, int], Iterable[TrainBatch]],
    evaluate: Callable[[nn.Module], Validation],
    options: UpdateOptions,
) -> Iterator[EpochReport]:
    """Train from where `state` is, also in the middle of an epoch, until `epochs` epochs are complete.

    Yields a report after each epoch; between two reports the caller may change the model. `batches` gives this
    process's batches of an epoch from a step on, and ends early to stop; `evaluate` takes the model in evaluation mode,
    after each complete epoch. Raises NonFiniteError, and MemoryExhaustedError where memory cannot be fitted.
    """
    while state.epoch < epochs:
        state.model.train()
        started, photos_before = time.perf_counter(), state.tally.reduce(fabric)[1]
        for batch in batches(state.epoch, state.step_in_epoch):
            loss, logits = _update_in_memory(fabric, state, batch, options)
            state.tally.add(batch, logits, loss)
        is_complete = state.step_in_epoch == steps_per_epoch
        # The one place where the host waits for the device; before anything is evaluated or saved.
        state.check_finite()
        loss_sum, photos, clean_hits, clean_photos, mixed_hits, mixed_photos = state.tally.reduce(fabric)
        seconds = time.perf_counter() - started
        images = round(photos - photos_before)  # of all processes
        validation = Validation()
        if is_complete:
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            state.tally = EpochTally.zeros(fabric.device)
            if fabric.world_size > 1:  # each process's batches moved its own statistics
                for buffer in state.kept_model.buffers():
                    torch.distributed.broadcast(buffer, 0)
            validation = evaluate(state.kept_model.eval())
        yield EpochReport(
            epoch=state.epoch,
            step=state.step,
            is_complete=is_complete,
            lr=state.lr,
            train_loss=loss_sum / max(photos, 1),
            train_top1_clean=clean_hits / clean_photos if clean_photos else None,
            train_top1_mixed=mixed_hits / mixed_photos if mixed_photos else None,
            clean_fraction=clean_photos / max(photos, 1),
            images=images,
            seconds=seconds,
            metrics=validation.metrics,
            predictions=validation.predictions,
        )
        if not is_complete:
            return


def _update_in_memory(
    fabric: Fabric, state: TrainState, batch: TrainBatch, options: UpdateOptions
) -> tuple[Tensor, Tensor]:
    while True:
        try:
            return update(fabric, state, batch, options)
        except MemoryExhaustedError as error:
            if options.replay is not None and options.replay.give_up():
                continue
            # Several processes would have to agree on the smaller size while some of them wait in a gradient sync.
            if fabric.world_size > 1 or error.micro_batch_size == 1:
                raise
            state.micro_batch_size = error.micro_batch_size // 2
            if fabric.device.type == "cuda":
                torch.cuda.empty_cache()


def _clip_gradients(fabric: Fabric, state: TrainState, clip_norm: float) -> Tensor | None:
    """Clip the gradient where asked; its norm (0-d, alike on all processes), or None where it may be infinite."""
    norm: Tensor | None
    if clip_norm > 0:
        norm = fabric.clip_gradients(state.network, state.optimizer, max_norm=clip_norm, error_if_nonfinite=False)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    # With fp16 a gradient that overflows is the scaler's business: it skips the update and lowers its scale.
    is_scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    return None if is_scaled else norm


def train_head(
    head: nn.Module,
    features: Tensor,
    targets: Tensor,
    class_weights: Tensor | None = None,
    *,
    epochs: int,
    lr: float,
    generator: torch.Generator,
) -> Iterator[float]:
    """Fit a head in place, on (N, F) float32 features and (N, K) distributions, with AdamW under a cosine to zero.

    Yields the mean loss of each epoch, with (K,) class weights if there are any. All on the CPU; `generator` draws the
    order, once per epoch.

    Source:
        Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
        arXiv:2202.10054, section 3 (probe first, then fine-tune).
    """
    decayed = [parameter for parameter in head.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=PROBE_WEIGHT_DECAY)
    num_steps = epochs * math.ceil(len(features) / PROBE_BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    head.train()
    for _ in range(epochs):
        total = torch.zeros(())
        order = torch.randperm(len(features), generator=generator)
        for rows in order.split(PROBE_BATCH_SIZE):
            loss = functional.cross_entropy(head(features[rows]), targets[rows], class_weights)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(rows)
        yield (total / len(features)).item()
    # What the last update left would be added to the first gradient of the training that follows.
    optimizer.zero_grad(set_to_none=True)
    head.eval()
