"""Weights for a backbone from the hub, a file, a folder or a package, with a report; and BatchNorm folded into them.

Nothing here unpickles code: files are read as safetensors or with `torch.load(weights_only=True)`.
"""

import copy
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fieldmark.data.folders import quote
from fieldmark.errors import WeightsError, first_line
from fieldmark.files import digest_file, list_findings
from fieldmark.models import catalog
from fieldmark.models.catalog import InputConfig, describe_pretraining
from fieldmark.models.classifier import Classifier

MIN_MATCHED_FRACTION = 0.5  # of the backbone's tensors; below it, the weights are those of another model
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")  # the first is read as safetensors, the others by torch
# Keys of training checkpoints that hold the weights, the average first, as in timm.
NESTS = ("state_dict_ema", "model_ema", "state_dict", "model")
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_COUNTER = "num_batches_tracked"
_SPECIES_SETS = ("iNaturalist", "TreeOfLife")
_WEB_SETS = ("Instagram", "YFCC", "JFT", "LAION", "WebLI", "OpenAI", "DataComp", "DFN", "MetaCLIP", "web")
NON_COMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non-?commercial|amlr|research|seer|mobileone", re.IGNORECASE)


@dataclass(frozen=True)
class WeightsReport:
    """Holds what was loaded, from where, and what of it fitted; model.json holds it."""

    name: str  # timm name of the backbone
    source: str  # "pretrained", "random", "package:..." or the file's name
    matched: int  # tensors of the backbone that were filled; BatchNorm's counters of batches are never counted
    total: int  # tensors of the backbone
    missing: tuple[str, ...] = ()  # names of the backbone's tensors that stayed random
    unexpected: tuple[str, ...] = ()  # names in the source without a counterpart
    mismatched: tuple[str, ...] = ()  # names with another shape than the backbone's, and both shapes
    skipped: tuple[str, ...] = ()  # names in the source of its own classifier, which a new head replaces
    license: str = "unknown"
    pretraining: str = "unknown"  # timm's tag, or a description of the data seen
    sha256: str = ""  # of the file, in hex; "" where there is no single file

    def summary(self) -> str:
        """One line for people."""
        if self.source == "random":
            return f"{self.name}: random weights, nothing pre-trained"
        parts = [f"{self.name} from {self.source}: {self.matched} of {self.total} tensors"]
        left = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.mismatched}
        parts += [f"{len(names)} {what} ({quote(names)})" for what, names in left.items() if names]
        seen = describe_pretraining(self.pretraining, default=self.pretraining)
        parts += [f"license {self.license}", f"pre-trained on {seen}" if seen != "unknown" else "pre-training unknown"]
        parts += [f"sha256 {self.sha256[:12]}"] if self.sha256 else []
        return "; ".join(parts)

    def warnings(self) -> list[str]:
        """License, contamination of a test set, and tensors that stayed random: one sentence each."""
        described = describe_pretraining(self.pretraining)
        values = {
            "report": self,
            "described": described,
            "is_non_commercial": NON_COMMERCIAL.search(self.license) is not None,
            "shows_species": any(species in f"{described} {self.pretraining}" for species in _SPECIES_SETS),
            "is_of_the_web": any(web in described for web in _WEB_SETS),
        }
        return list_findings("weights.md", values) if self.source != "random" else []


def load_weights(model: Classifier, source: str) -> WeightsReport:
    """Fill the backbone, all at once or not at all; the head stays as it is.

    The source is "pretrained" (timm's hub, or an installed package where that is out of reach), "random", a
    .safetensors, .pth, .pt, .bin or .ckpt file, a folder with config.json and a weight file (timm's local-dir form), or
    "package:NAME" with a NAME from `catalog.PACKAGES`. Half-precision tensors become float32. Names may carry
    `module.`, `model.`, `backbone.` or be nested under one of `NESTS`.

    Raises WeightsError where the source cannot be had or read, has code or values that are not finite, or fits less
    than half of the backbone.
    """
    if source == "random":
        return WeightsReport(model.name, "random", 0, len(_tensors(model)), license="none", pretraining="none")
    if source == "pretrained":
        try:
            return _load_from_hub(model)
        except WeightsError:  # without a network: an installed package may hold them
            if package := catalog.installed_packages().get(model.name.partition(".")[0]):
                return _load_package(model, package)
            raise
    if source.startswith("package:"):
        return _load_package(model, source)
    return _load_path(model, Path(source).expanduser())


def data_config(name: str, source: str) -> InputConfig:
    """Return size, crop, interpolation and normalization that the weights expect, without loading them.

    A file or random weights under a bare architecture name get that architecture's configuration at its training
    size. A name with a tag (`resnet101.a1h_in1k`) says that the file holds those weights; a folder says it itself.
    Raises WeightsError for a package or folder that does not exist or does not fit the name.
    """
    is_own = True
    if source.startswith("package:"):
        config = catalog.timm_config(catalog.find_package(source, name).timm_name)
    elif source not in ("pretrained", "random") and (settings := _read_config_beside(Path(source).expanduser(), name)):
        config = catalog.as_config(settings)
    else:
        config = catalog.timm_config(name)
        is_own = source == "pretrained" or "." in name
    return catalog.input_config(config, is_own=is_own)


def _fill(
    model: Classifier, label: str, tensors: Mapping[str, Tensor], terms: str | None, tag: str | None, file: Path | None
) -> WeightsReport:
    state, target = model.backbone.state_dict(), _tensors(model)
    own: Any = getattr(model.backbone, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in (*((own,) if isinstance(own, str) else own), "head", "fc", "classifier"))
    fitting: dict[str, Tensor] = {}
    counters: dict[str, Tensor] = {}
    mismatched: dict[str, str] = {}
    skipped: list[str] = []
    unexpected: list[str] = []
    for given, tensor in tensors.items():
        name = given
        while name not in state and name.startswith(_PREFIXES):  # of wrappers, but never one that the model itself has
            name = name.partition(".")[2]
        if name in target and tensor.shape == target[name].shape:
            fitting[name] = _as_float32(tensor, given, label)
        elif name in target:
            mismatched[name] = f"{name}: {tuple(tensor.shape)} for {tuple(target[name].shape)}"
        elif name.startswith(heads):
            skipped.append(given)
        elif name in state:
            counters[name] = tensor
        elif not name.endswith(_COUNTER):
            unexpected.append(given)
    if len(fitting) < MIN_MATCHED_FRACTION * len(target):
        raise WeightsError(
            f"model.weights: {label} does not hold weights of {model.name}: {len(fitting)} of its {len(target)} "
            f"tensors match, {len(mismatched)} have another shape, {len(unexpected)} are unknown"
            f"{f' ({quote(unexpected)})' if unexpected else ''}. Set model.name to the model that they belong to"
        )
    model.backbone.load_state_dict({**fitting, **counters}, strict=False)
    return WeightsReport(
        name=model.name,
        source=label,
        matched=len(fitting),
        total=len(target),
        missing=tuple(name for name in target if name not in fitting and name not in mismatched),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched.values()),
        skipped=tuple(skipped),
        license=terms or "unknown",
        pretraining=tag or "unknown",
        sha256=digest_file(file) if file else "",
    )


def _tensors(model: Classifier) -> dict[str, Tensor]:
    """Tensors of the backbone without BatchNorm's counters of batches."""
    return {name: tensor for name, tensor in model.backbone.state_dict().items() if not name.endswith(_COUNTER)}


def _as_float32(tensor: Tensor, name: str, label: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise WeightsError(
            f"model.weights: {name} in {label} holds values that are not finite (variances saved in 16 bit overflow, "
            "for one). Get the file again, or save it in 32 bit"
        )
    return tensor


def _load_from_hub(model: Classifier) -> WeightsReport:
    """Load the weights that timm calls pretrained."""
    import timm

    config = catalog.timm_config(model.name)
    path = catalog.pretrained_file(config, model.name)
    overlay = {"file": str(path), "source": "", "hf_hub_filename": None} if path else None
    try:
        # A second model, so that timm's own conversions of the file for this architecture apply.
        loaded = timm.create_model(model.name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"model.weights: the pretrained weights of {model.name} cannot be loaded: {error}") from None
    return _fill(model, "pretrained", loaded.state_dict(), config.license, config.tag, path)


def _load_package(model: Classifier, source: str) -> WeightsReport:
    import timm

    package = catalog.find_package(source, model.name)
    path = catalog.package_file(package)
    with torch.device("meta"):
        layout = timm.create_model(package.timm_name)
    tensors = match_by_position(read_tensors(path)[0], layout.state_dict(), path.name)
    return _fill(model, source, tensors, package.license, package.pretraining, path)


def _load_path(model: Classifier, path: Path) -> WeightsReport:
    """Load a file, whose safetensors metadata may say `license` and `pretraining`, or a folder in timm's form."""
    if not path.is_dir():
        tensors, metadata = read_tensors(path)
        return _fill(model, path.name, tensors, metadata.get("license"), metadata.get("pretraining"), path)
    config = catalog.as_config(_read_config_beside(path, model.name))
    file = next((path / file for file in _FOLDER_FILES if (path / file).is_file()), None)
    if file is None:
        raise WeightsError(f"model.weights: the folder {path} has none of {', '.join(_FOLDER_FILES)}")
    return _fill(model, path.name, read_tensors(file)[0], config.license, config.tag, file)


def _read_config_beside(path: Path, name: str) -> dict[str, Any]:
    """Read timm's config.json in a folder, or beside a file if it describes the same architecture; {} for none."""
    architecture = name.partition(".")[0]
    if not path.is_dir():
        try:
            settings = catalog.read_json(path.parent / "config.json")
        except WeightsError:  # there is none, or it is some other program's
            return {}
        return settings if settings.get("architecture") == architecture else {}
    config_file = path / "config.json"
    if not config_file.is_file():
        raise WeightsError(f"model.weights: the folder {path} has no config.json; give the weight file in it")
    settings = catalog.read_json(config_file)
    if settings.get("architecture") != architecture:
        raise WeightsError(
            f"model.weights: {config_file} describes {settings.get('architecture')!r}; got model.name {name!r}. "
            "Set model.name to what the folder holds"
        )
    return settings


def match_by_position(tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor], file_name: str) -> dict[str, Tensor]:
    """Give tensors the names of a layout with the same order and shapes; raise WeightsError where these differ."""
    if len(tensors) != len(layout):
        raise WeightsError(f"model.weights: {file_name} holds {len(tensors)} tensors, the model {len(layout)}")
    for (theirs, tensor), (ours, expected) in zip(tensors.items(), layout.items(), strict=True):
        if tensor.shape != expected.shape:
            raise WeightsError(
                f"model.weights: {file_name} does not have the model's order: {theirs} is {tuple(tensor.shape)} "
                f"where {ours} is {tuple(expected.shape)}"
            )
    return dict(zip(layout, tensors.values(), strict=True))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a weight file, on the CPU, and the text metadata of safetensors, in the file's order.

    Raises WeightsError where there is no such file, or it is of another kind, damaged, with pickled code, or has no
    tensors.
    """
    if not path.is_file():
        raise WeightsError(
            f"model.weights: there is no file or folder {str(path)!r}. Give pretrained, random, package:NAME, or "
            "the path of a .safetensors or .pth file"
        )
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise WeightsError(f"model.weights: {path.name} is not a weight file; its name must end in {endings}")
    metadata: dict[str, str] = {}
    try:
        if suffix == SUFFIXES[0]:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            tensors = _read_torch(path)
    except SafetensorError as error:
        raise WeightsError(f"model.weights: {path.name} is not a whole safetensors file ({error})") from None
    except OSError as error:
        raise WeightsError(f"model.weights: {path.name} cannot be read: {error.strerror or error}") from None
    if not tensors:
        raise WeightsError(f"model.weights: {path.name} holds no tensors by name. Give a file of a state_dict")
    return tensors, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, which either load or are answered below
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"model.weights: {path.name} holds pickled objects besides tensors, which could run code when read, or "
            "it is damaged; it was not opened. Ask for the state_dict alone (torch.save(model.state_dict(), ...)) or "
            "for a .safetensors file"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WeightsError(f"model.weights: {path.name} is not a whole torch file ({first_line(error)})") from None
    if not isinstance(content, Mapping):
        return {}
    items = cast("Mapping[Any, Any]", content)
    nested = next((items[nest] for nest in NESTS if isinstance(items.get(nest), Mapping)), items)
    return {str(name): value for name, value in nested.items() if isinstance(value, Tensor)}


def fuse_batch_norm(model: nn.Module) -> tuple[nn.Module, int]:
    """Return a copy of a model for inference, each BatchNorm folded into its convolution, and the number of those.

    The copy is of the same class and in evaluation mode. Models whose forward pass cannot be traced are copied as they
    are. The folding itself is torch's; what is ours is finding the pairs: torch.fx.experimental.optimization misses
    timm's norm layers that carry their activation, and returns a graph, without the model's other methods.

    Source:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        arXiv:1712.05877, section 3.2 (folding of batch normalization).
    """
    fused = copy.deepcopy(model).eval()
    pairs = _find_pairs(fused)
    for conv_name, norm_name in pairs:
        conv, norm = fused.get_submodule(conv_name), fused.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        fused.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d applies its (inference: idle) dropout and its activation after the norm.
        activation = getattr(norm, "act", None)
        fused.set_submodule(norm_name, activation if isinstance(activation, nn.Module) else nn.Identity())
    return fused, len(pairs)


class _LeafTracer(Tracer):
    """Stops at convolutions and norms, also at timm's subclasses of them, which fx would trace into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _find_pairs(model: nn.Module) -> list[tuple[str, str]]:
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
