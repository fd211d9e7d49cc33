"""BatchNorm folded into the convolution before it: the same function with fewer passes over memory.

The folding itself is torch's `fuse_conv_bn_eval`. What is ours is finding the pairs: torch.fx.experimental.optimization
matches the exact class BatchNorm2d, so it misses timm's norm layers that carry their activation, and it returns a graph
in place of the model, which loses the model's other methods.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_batch_norm(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy of a model for inference, each BatchNorm folded into its convolution, and the number of those.

    The copy is of the same class and in evaluation mode. Models whose forward pass cannot be traced are copied as they
    are.

    Source:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        arXiv:1712.05877, section 3.2 (folding of batch normalization).
    """
    fused = copy.deepcopy(model).eval()
    pairs = _pairs(fused)
    for conv_name, norm_name in pairs:
        conv, norm = fused.get_submodule(conv_name), fused.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        _replace(fused, conv_name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d applies its (inference: idle) dropout and its activation after the norm.
        activation = getattr(norm, "act", None)
        _replace(fused, norm_name, activation if isinstance(activation, nn.Module) else nn.Identity())
    return fused, len(pairs)


class _LeafTracer(Tracer):
    """Stops at convolutions and norms, also at timm's subclasses of them, which fx would trace into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) module names where the norm is all that reads the convolution, each used once."""
    try:
        graph: Graph = _LeafTracer().trace(model)
    except Exception:  # fx raises whatever the traced code runs into
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    pairs: list[tuple[str, str]] = []
    for node in calls:
        source: Any = node.args[0] if node.args else None
        if not (isinstance(source, Node) and source.op == "call_module" and len(source.users) == 1):
            continue
        conv, norm = str(source.target), str(node.target)
        if not (isinstance(modules[conv], nn.Conv2d) and isinstance(modules[norm], nn.BatchNorm2d)):
            continue
        if modules[norm].track_running_stats and targets.count(conv) == targets.count(norm) == 1:
            pairs.append((conv, norm))
    return pairs


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
