"""Where a model looked: class activation maps by the grad-cam library.

Letters: B batch, S side in pixels, h and w of the map.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fieldmark.errors import MissingExtraError

if TYPE_CHECKING:
    from torch import nn

MAP_SIDE = 28


class AttentionMaps:
    """Grad-CAM of a classifier. Calls from several threads are safe: they take turns.

    Args:
        model: (B, 3, S, S) -> (B, K), in eval mode, convolutional. A copy is kept: the hooks of the library must not
            slow down the model that predicts.

    Raises:
        MissingExtraError: grad-cam is not installed.

    Source:
        Selvaraju et al., "Grad-CAM", arXiv:1610.02391, section 3.
    """

    def __init__(self, model: nn.Module) -> None:
        import copy

        self._model = copy.deepcopy(model).eval()
        self._lock = threading.Lock()
        layer = last_spatial_layer(self._model)
        self._cam: Any = None
        if layer is not None:
            try:
                from pytorch_grad_cam import GradCAM
            except ImportError:
                raise MissingExtraError("grad-cam", "review") from None
            self._cam = GradCAM(self._model, [layer])

    @property
    def is_available(self) -> bool:
        """Whether the model has a layer with a map; vision transformers have none."""
        return self._cam is not None

    def __call__(self, images: NDArray[np.float32], classes: Sequence[int]) -> NDArray[np.float32]:
        """(B, 28, 28) maps in [0, 1] for one class of each normalised image (B, 3, S, S)."""
        import torch
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
        from torch.nn import functional

        if self._cam is None:
            return np.zeros((len(images), MAP_SIDE, MAP_SIDE), np.float32)
        targets = [ClassifierOutputTarget(number) for number in classes]
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            maps = np.asarray(self._cam(input_tensor=torch.from_numpy(images), targets=targets), np.float32)
        # The library enlarges the map to the input; a page needs no more than this and draws it smoothly.
        small = functional.interpolate(torch.from_numpy(maps)[:, None], (MAP_SIDE, MAP_SIDE), mode="area")
        return np.clip(np.nan_to_num(small[:, 0].numpy()), 0, 1)


def last_spatial_layer(model: nn.Module) -> nn.Module | None:
    """The last module whose output still is a map, (B, C, h, w) with h and w above 1; None if there is none."""
    import torch
    from torch import nn

    found: list[nn.Module] = []

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            found.append(module)

    # Not activations in place: a backward hook on them would see a changed tensor.
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.Sequential
    hooks = [module.register_forward_hook(remember) for module in model.modules() if isinstance(module, kinds)]
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
    except (RuntimeError, AssertionError, ValueError):  # a model of another fixed input size
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found else None
