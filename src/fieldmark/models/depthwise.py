"""Gradients of depthwise convolutions on the CPU, where torch's own are many times slower than its forward pass.

oneDNN, which computes torch's convolutions on x86, falls back to plain loops for two gradients of depthwise
convolutions: that of the weights of kernels wider than 3, and, in bf16 above all, that of the input at a stride. For
EfficientNet-Lite0 at 160 pixels they were four fifths of an update. The same sums, vectorized over the channels, which
are side by side in channels_last, are about ten times faster.

Written by hand because no library has them: torch's inductor calls the same kernels of oneDNN.

Shape letters: N photos, H, W of the input, h, w of the output, C channels, K side of the kernel.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import float32, int64, types, uint16, void
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fieldmark.augment.kernels import compiled

WIDEST_GOOD_KERNEL = 3  # oneDNN's gradients of the weights are good up to this side


class DepthwiseGradients(TorchFunctionMode):
    """Within it, depthwise convolutions whose gradients torch computes slowly get theirs from this module.

    The forward pass stays torch's own. So do all other convolutions, and those that are not square, are dilated, are in
    float16 or are not in channels_last. Gradients are summed in 32 bit, whatever the precision, in an order that
    depends on `torch.get_num_threads()` alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A module's call has all seven arguments.
        found = _depthwise(*args) if func is torch.conv2d and len(args) == 7 else None
        return func(*args, **(kwargs or {})) if found is None else found


def _depthwise(
    images: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor | None:
    """The convolution, or None where torch's own is as good."""
    is_depthwise = images.ndim == 4 and 1 < groups == images.shape[1] == weight.shape[0]
    if not is_depthwise or not torch.is_grad_enabled() or not (images.requires_grad or weight.requires_grad):
        return None
    step, margin, spread = (_same_in_both(value) for value in (stride, padding, dilation))
    side = weight.shape[2]
    if None in (step, margin) or spread != 1 or side != weight.shape[3]:
        return None
    if step == 1 and side <= WIDEST_GOOD_KERNEL:
        return None
    if torch.is_autocast_enabled("cpu"):
        precision = torch.get_autocast_dtype("cpu")
        images, weight, bias = images.to(precision), weight.to(precision), None if bias is None else bias.to(precision)
    is_known = images.dtype in (torch.float32, torch.bfloat16) and weight.dtype == images.dtype
    if not is_known or not images.is_contiguous(memory_format=torch.channels_last):
        return None
    return _Convolution.apply(images, weight, bias, step, margin)  # type: ignore[no-any-return]


def _same_in_both(value: Any) -> int | None:
    """The number of pixels of both directions; None where they differ, or are named ("same")."""
    numbers = {value} if isinstance(value, int | str) else set(value)
    number = numbers.pop()
    return number if isinstance(number, int) and not numbers else None


class _Convolution(torch.autograd.Function):
    """torch's depthwise convolution with gradients of our own."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(images, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        images, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        wants_images, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        ours_images = wants_images and stride > 1
        ours_weight = wants_weight and weight.shape[2] > WIDEST_GOOD_KERNEL
        mask = [wants_images and not ours_images, wants_weight and not ours_weight, False]
        for_images, for_weight = None, None
        if any(mask):
            for_images, for_weight, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(weight), mask
            )
        if ours_images:
            for_images = input_gradient(gradient, weight, images.shape, stride=stride, padding=padding)
        if ours_weight:
            for_weight = weight_gradient(gradient, images, weight.shape[2], stride=stride, padding=padding)
        return for_images, for_weight, gradient.sum((0, 2, 3)) if wants_bias else None, None, None


def input_gradient(gradient: Tensor, weight: Tensor, shape: Sequence[int], *, stride: int, padding: int) -> Tensor:
    """(N, C, H, W) from the output's gradient (N, C, h, w) and weights (C, 1, K, K); tensors are in channels_last."""
    result = torch.empty(tuple(shape), dtype=gradient.dtype, memory_format=torch.channels_last)
    taps = weight.detach().float().squeeze(1).permute(1, 2, 0).contiguous().numpy()
    below, out = _rows(gradient), _rows(result)
    _share(len(result), lambda first, end, part: spread_gradient(below, taps, stride, padding, first, end, out))
    return result


def weight_gradient(gradient: Tensor, images: Tensor, side: int, *, stride: int, padding: int) -> Tensor:
    """(C, 1, K, K) from the output's gradient (N, C, h, w) and the input (N, C, H, W), both in channels_last."""
    sums = np.zeros((torch.get_num_threads(), side, side, images.shape[1]), np.float32)
    above, below = _rows(images), _rows(gradient)
    _share(len(images), lambda first, end, part: gather_gradient(above, below, stride, padding, first, end, sums[part]))
    return torch.from_numpy(sums.sum(0)).permute(2, 0, 1).unsqueeze(1).to(gradient.dtype)


def _rows(tensor: Tensor) -> NDArray[Any]:
    """(N, H, W, C) the same memory; bf16, which NumPy does not know, as its bits."""
    rows = tensor.detach().permute(0, 2, 3, 1)
    return rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype == torch.bfloat16 else rows.numpy()


def _share(total: int, work: Callable[[int, int, int], None]) -> None:
    """Call `work(first, end, part)` for as many equal parts of `total` as torch has threads, side by side."""
    count = min(torch.get_num_threads(), total)
    if count < 2:
        work(0, total, 0)
        return
    edges = [total * part // count for part in range(count + 1)]
    list(_pool(os.getpid()).map(work, edges[:-1], edges[1:], range(count)))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads for the parts of all callers; those of a parent do not live on in a forked process."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="depthwise")


def as_float(value: Any) -> Any:
    """A number from its bits: of bf16 if they are unsigned 16 bit, else as it is."""
    raise NotImplementedError("only in compiled code")


@overload(as_float, inline="always")
def _as_float(value: Any) -> Callable[[Any], Any]:
    def same(value: Any) -> Any:
        return value

    def from_bits(value: Any) -> Any:
        return np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    return same if isinstance(value, types.Float) else from_bits


def as_stored(value: Any, like: Any) -> Any:
    """A 32-bit float in the form of `like`: bits of bf16, rounded to nearest even, if that is unsigned 16 bit."""
    raise NotImplementedError("only in compiled code")


@overload(as_stored, inline="always")
def _as_stored(value: Any, like: Any) -> Callable[[Any, Any], Any]:
    def same(value: Any, like: Any) -> Any:
        return value

    def round_to_even(value: Any, like: Any) -> Any:
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return same if isinstance(like, types.Float) else round_to_even


_STORED = {True: types.Array(uint16, 4, "C"), False: types.Array(float32, 4, "C")}


@compiled([void(stored, float32[:, :, ::1], int64, int64, int64, int64, stored) for stored in _STORED.values()])
def spread_gradient(below: Any, taps: Any, stride: int, padding: int, first: int, end: int, out: Any) -> None:
    """Write input gradients of photos `first` to `end` from (N, h, w, C) `below` and (K, K, C) taps to (N, H, W, C)."""
    side, channels = taps.shape[0], taps.shape[2]
    total = np.empty(channels, np.float32)
    for n in range(first, end):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                total[:] = 0
                for i in range((y + padding) % stride, side, stride):
                    row = (y + padding - i) // stride
                    if row < 0 or row >= below.shape[1]:
                        continue
                    for j in range((x + padding) % stride, side, stride):
                        column = (x + padding - j) // stride
                        if column < 0 or column >= below.shape[2]:
                            continue
                        pixel, tap = below[n, row, column], taps[i, j]
                        for c in range(channels):
                            total[c] += as_float(pixel[c]) * tap[c]
                written = out[n, y, x]
                for c in range(channels):
                    written[c] = as_stored(total[c], written[c])


@compiled([void(stored, stored, int64, int64, int64, int64, float32[:, :, ::1]) for stored in _STORED.values()])
def gather_gradient(above: Any, below: Any, stride: int, padding: int, first: int, end: int, sums: Any) -> None:
    """Add the weight gradients of photos `first` to `end` of (N, H, W, C) input and (N, h, w, C) gradient to (K, K, C).

    Four pixels at a time, so that the sums are read and written a quarter as often.
    """
    side, width, channels = sums.shape[0], above.shape[2], above.shape[3]
    for n in range(first, end):
        for row in range(below.shape[1]):
            for i in range(side):
                y = row * stride + i - padding
                if y < 0 or y >= above.shape[1]:
                    continue
                for j in range(side):
                    total = sums[i, j]
                    column = max(0, (padding - j + stride - 1) // stride)
                    stop = min(below.shape[2], (width - 1 + padding - j) // stride + 1)
                    while column + 4 <= stop:
                        x = column * stride + j - padding
                        a, b = above[n, y, x], above[n, y, x + stride]
                        c, d = above[n, y, x + 2 * stride], above[n, y, x + 3 * stride]
                        p, q = below[n, row, column], below[n, row, column + 1]
                        r, s = below[n, row, column + 2], below[n, row, column + 3]
                        for k in range(channels):
                            left = as_float(a[k]) * as_float(p[k]) + as_float(b[k]) * as_float(q[k])
                            right = as_float(c[k]) * as_float(r[k]) + as_float(d[k]) * as_float(s[k])
                            total[k] += left + right
                        column += 4
                    while column < stop:
                        a, p = above[n, y, column * stride + j - padding], below[n, row, column]
                        for k in range(channels):
                            total[k] += as_float(a[k]) * as_float(p[k])
                        column += 1
