"""The settings of a run: one tree of frozen sections, read from TOML, changed by dotted `key=value` pairs.

A default lives here and nowhere else. Parts (data, augment, models, training) never see these objects: `runs.build`
turns them into plain values.
"""

import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fieldmark.errors import ConfigError
from fieldmark.overrides import describe_problems, parse_pair, read_prob, set_value


def _check_range(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError(f"must be two numbers with 0 < low <= high; got {list(values)}")
    return values


Value = TypeVar("Value")
# TOML has no word for None: where a setting may be None, `none` says so.
OrNone = Annotated[Value | None, pydantic.BeforeValidator(lambda value: None if value == "none" else value)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Range = Annotated[tuple[float, float], pydantic.AfterValidator(_check_range)]
Pool = Literal["average", "covariance"]
Metric = Literal["top1", "macro_recall", "prior_top1", "log_loss"]


class Section(pydantic.BaseModel):
    """One table of the recipe. Unknown keys are errors; values never change after loading."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """Which photos, and how they are divided."""

    path: str = ""
    """Folder of class folders, folder with train/ val/ test/, CSV or Parquet table, or shards; a path or URL."""

    path_column: str = "path"
    """Column of a table that names the photo; relative names are relative to the table's folder."""

    label_column: str = "label"
    """Column of a table, or key of a shard's .json, that names the class."""

    split_column: str = "split"
    """Column of a table that says train, val or test. Optional in the table."""

    group_by: Literal["none", "column", "pattern", "capture_time"] = "none"
    """What must not cross a split: a column's value, a part of the file name, or photos within a minute (EXIF time)."""

    group_column: str = "group"
    """Column of a table that holds the group, for `group_by = "column"`."""

    group_pattern: str = ""
    """Regular expression with one group in parentheses, matched against the path, for `group_by = "pattern"`."""

    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the labeled photos kept for validation where the data do not say."""

    test_fraction: ShareBelowOne = 0.0
    """Share of the labeled photos kept for testing where the data do not say."""

    folds: NonNegativeInt = 0
    """k of k-fold cross-validation over train and val together; 0 is off."""

    fold: NonNegativeInt = 0
    """Which of the `folds` is validation, from 0."""

    split_seed: NonNegativeInt = 0
    """Seed of the split, apart from `train.seed`, so that seeds are compared on the same photos."""

    train_on: Literal["train", "train+val"] = "train"
    """`train+val` folds validation back into training, for the last run before use: then nothing is selected."""

    broken: Literal["refuse", "skip"] = "refuse"
    """Refuse to train on a folder with broken photos, or leave them out and list them in the run folder."""

    background: tuple[int, int, int] = (255, 255, 255)
    """RGB under transparent pixels, 0 to 255."""

    max_pixels: PositiveInt = 178_956_970
    """Photos with more pixels than this are refused as decompression bombs (Pillow's own limit)."""

    corrections: str = ""
    """Table from `fieldmark review` (path, action, label): photos to relabel or drop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.folds == 1 or (self.folds and self.fold >= self.folds):
            raise ValueError(f"fold {self.fold} of {self.folds} folds does not exist; folds is 0 or at least 2")
        if self.group_by == "pattern":
            try:
                num_groups = re.compile(self.group_pattern).groups
            except re.error as error:
                raise ValueError(f"group_pattern {self.group_pattern!r} is not a regular expression: {error}") from None
            if num_groups != 1:
                raise ValueError(f"group_pattern {self.group_pattern!r} needs exactly one group in parentheses")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction leave nothing to train on")
        return self


class CacheConfig(Section):
    """Decoded photos kept between epochs and runs."""

    mode: Literal["auto", "uint8", "jpeg", "off"] = "auto"
    """`uint8`: pixels, fastest. `jpeg`: quality 90, a ninth of that. `auto`: the first that fits the disk, or off."""

    short_side: Literal[256, 320, 384, 448] = 320
    """Pixels of the short side of a cached photo; photos are never enlarged."""

    folder: str = ""
    """Where the cache is; empty is the user's cache folder."""

    disk_gigabytes: PositiveFloat = 20.0
    """The most that one data set's cache may take on disk. Never more than half of what is free."""


class LoaderConfig(Section):
    """How photos reach the model."""

    workers: Literal["auto"] | NonNegativeInt = "auto"
    """Processes that prepare batches. 0 prepares them in the training process."""


class AugmentConfig(Section):
    """Random changes of a training photo."""

    size: OrNone[PositiveInt] = None
    """Side of the training image in pixels; None is the size that the weights were trained at."""

    executor: Literal["fast", "reference"] = "fast"
    """`reference`: torchvision's transforms one after another. `fast`: the same random numbers in one warp."""

    crop: Literal["random_resized", "zoom", "squash", "pretrained"] = "random_resized"
    """`random_resized`: torchvision's RandomResizedCrop, including its fallback to a center crop. `zoom`: the same
    without the fallback, so a scale over 1 really zooms out over `fill`. `squash`: the whole photo, aspect lost.
    `pretrained`: the evaluation transform of the weights."""

    crop_scale: Range = (0.35, 1.0)
    """Area of the crop over the area of the photo."""

    crop_ratio: Range = (0.75, 4 / 3)
    """Width over height of the crop."""

    horizontal_flip: Fraction = 0.5
    """Probability of a mirror image."""

    vertical_flip: Fraction = 0.0
    """Probability of an upside-down image."""

    degrees: NonNegativeFloat = 0.0
    """Rotation is drawn from ± this many degrees; only `competition` uses it."""

    translate: tuple[Fraction, Fraction] = (0.0, 0.0)
    """Shift is drawn from ± this share of width and height; only `competition` uses it."""

    shear: NonNegativeFloat = 0.0
    """Shear along x is drawn from ± this many degrees; only `competition` uses it."""

    affine_interpolation: Literal["nearest", "bilinear"] = "bilinear"
    """How the reference executor resamples the affine stage (fast always filters); only `competition` uses it."""

    fill: tuple[int, int, int] = (124, 116, 104)
    """RGB outside the photo, 0 to 255. The default is ImageNet's mean; only `competition` uses it."""

    brightness: NonNegativeFloat = 0.0
    """Factor is drawn from 1 ± this."""

    contrast: NonNegativeFloat = 0.0
    """Factor is drawn from 1 ± this."""

    saturation: NonNegativeFloat = 0.0
    """Factor is drawn from 1 ± this."""

    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Shift is drawn from ± this share of the color circle; only `competition` uses it."""

    policy: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugmentWide (arXiv:2103.10158) or RandAugment (arXiv:1909.13719) after crop and flips."""

    rand_ops: PositiveInt = 2
    """RandAugment: operations per photo."""

    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """RandAugment: strength of each operation, 0 to 30."""

    erase: Fraction = 0.0
    """Probability of RandomErasing (arXiv:1708.04896)."""

    erase_scale: Range = (0.02, 0.15)
    """Area of the erased rectangle over the image's."""

    erase_ratio: Range = (0.3, 3.3)
    """Height over width of the erased rectangle."""

    erase_value: Literal["random", "zero"] = "random"
    """`random`: normal noise per pixel, after normalization. `zero`: the mean color; only `competition` uses it."""


class MixConfig(Section):
    """Batches blended from two photos each."""

    share: Fraction = 0.0
    """Share of the batches that are mixed; the others stay as they are."""

    cutmix_share: Fraction = 0.5
    """Share of the mixed batches that get CutMix (arXiv:1905.04899); the others get MixUp (arXiv:1710.09412)."""

    mixup_alpha: Range = (0.4, 0.6)
    """α of MixUp's Beta(α, α) is drawn from this range for each batch; two equal numbers fix it."""

    cutmix_alpha: Range = (0.8, 1.2)
    """α of CutMix's Beta(α, α) is drawn from this range for each batch; two equal numbers fix it."""

    off_epochs: NonNegativeInt = 0
    """The last epochs are trained without mixing."""


class EvalConfig(Section):
    """The picture that a photo is evaluated on."""

    transform: Literal["pretrained", "squash"] = "pretrained"
    """`pretrained`: resize and center-crop as the weights ask for. `squash`: to a square, aspect lost."""

    size: OrNone[PositiveInt] = None
    """Side in pixels; None is the weights' test size for `pretrained`, else `augment.size`."""

    crop_fraction: OrNone[Annotated[float, Field(gt=0, le=1)]] = None
    """`size` over the resized short side; None is the weights' own."""

    interpolation: OrNone[Literal["bilinear", "bicubic"]] = None
    """None is the weights' own; `squash` defaults to bilinear."""

    batch_size: PositiveInt = 64
    """Photos at once in evaluation and prediction."""


class ModelConfig(Section):
    """Backbone, weights and head."""

    name: str = "resnet50"
    """A timm model, or one of the competition's aliases (`fieldmark models`)."""

    weights: str = "pretrained"
    """`pretrained` (timm's hub), `random`, a .safetensors or .pth file, or `package:efficientnet-lite0` (to lite2)."""

    pool: Pool = "average"
    """How a feature map becomes features: `covariance` also tells what appears together (`models.classifier`)."""

    head: Literal["linear", "mlp"] = "linear"
    """`mlp` is the competition's Linear-Dropout-ReLU-Linear."""

    head_hidden: PositiveInt = 1024
    """Width of the `mlp` head; only `competition` uses it."""

    head_dropout: ShareBelowOne = 0.3
    """Dropout before the ReLU of an `mlp` head; only `competition` uses it. A `linear` head takes `feature_dropout`."""

    feature_dropout: ShareBelowOne = 0.0
    """Dropout of the pooled features before the head."""

    drop_path: ShareBelowOne = 0.0
    """Stochastic depth (arXiv:1603.09382), for backbones that have it."""

    stride_in_1x1: bool = False
    """ResNets only: the original v1 layout, where the 1x1 convolution of a block has the stride (Keras' weights)."""

    max_parameters_millions: OrNone[PositiveFloat] = None
    """Refuse to train a larger model."""

    min_photos_per_second: OrNone[PositiveFloat] = None
    """Within a time budget: how many photos the model, or all networks that answer together, must answer here."""

    freeze: NonNegativeInt | Literal["all"] = 0
    """Frozen stages, counted from the input; `all` freezes the backbone. BatchNorm of a frozen stage stays frozen."""

    freeze_batchnorm: bool = False
    """BatchNorm keeps its pre-trained statistics while its weights learn: for small batches, and after a probe."""


class OptimConfig(Section):
    """How the weights move."""

    name: str = "adamw"
    """`adamw`, `sgd` (Nesterov momentum 0.9), or any optimizer of timm.optim."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate of the head, for one update of `train.batch_size` photos."""

    backbone_lr_scale: PositiveFloat = 0.1
    """Learning rate of the backbone's last stage over the head's."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a stage over that of the next stage toward the head."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay per update (AdamW, arXiv:1711.05101)."""

    decay_norms_and_biases: bool = False
    """Decay normalization weights and biases too, as plain AdamW does; only `competition` uses it."""

    clip_norm: NonNegativeFloat = 0.0
    """Largest global gradient norm; 0 is off."""


class ScheduleConfig(Section):
    """Learning rate over time, as a factor of `optim.lr`."""

    name: Literal["cosine", "warm_restarts", "constant"] = "cosine"
    """`cosine`: warm-up, then a cosine to zero. `constant`: warm-up, then level. `warm_restarts`: the competition's."""

    warmup_epochs: NonNegativeFloat = 1.0
    """Length of the linear warm-up, for `cosine` and `constant`."""

    restart_epochs: OrNone[PositiveInt] = None
    """T_0 of `warm_restarts`; None is all of `train.epochs`, one cycle; only `competition` uses it."""

    restart_factor: PositiveInt = 2
    """T_mult of `warm_restarts`; only `competition` uses it."""


class ProbeConfig(Section):
    """The head alone on frozen features, before fine-tuning (LP-FT, arXiv:2202.10054)."""

    epochs: NonNegativeInt = 0
    """Passes over the cached features; 0 is off."""

    lr: PositiveFloat = 3e-3
    """Learning rate of the probe (AdamW, cosine to zero)."""


class TrainConfig(Section):
    """The run itself."""

    epochs: NonNegativeInt = 10
    """Passes over the training photos; 0 trains the probe alone."""

    batch_size: PositiveInt = 32
    """Photos per update, over all devices and micro-batches."""

    micro_batch_size: OrNone[PositiveInt] = None
    """Photos per forward pass on one device; None is as many as `batch_size` and memory allow. Gradients add up."""

    seed: NonNegativeInt = 0
    """Seed of weights, order, augmentation and mixing."""

    label_smoothing: ShareBelowOne = 0.0
    """Share of every target spread over all classes (arXiv:1512.00567, section 7)."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs each class by the inverse of its count; the mean weight over the photos is 1. Within a time
    budget, the class shares are divided out of the answers instead."""

    ema_decay: ShareBelowOne = 0.0
    """Running average of weights and buffers per update; 0 is off. The average is what is evaluated and kept."""

    metric: Metric = "top1"
    """What "best" means; `--minutes` goes by log loss. `prior_top1` weighs classes as training has them."""

    select: Literal["best", "last"] = "best"
    """Which epoch's weights the run ends with. `last` is fixed-length training: validation chooses nothing."""

    patience_epochs: NonNegativeInt = 0
    """Stop after so many epochs without a better `metric`; 0 is off. No shorter than a cycle of the schedule."""

    resolution_steps: tuple[tuple[Fraction, PositiveInt], ...] = ()
    """Progressive resolution: (from this share of the epochs on, side in pixels), rising. Empty is `augment.size`."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""

    devices: PositiveInt = 1
    """Processes, one for each device, on each node."""

    nodes: PositiveInt = 1
    """Machines; start the same command on each with torchrun."""

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """`auto`: bf16 where the hardware computes in it, else 32 bit."""

    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout of convolutions; `auto` is on."""

    compile: Literal["auto", "on", "off"] = "auto"
    """`auto`: on one GPU, passes of a batch that is computed as one are recorded and replayed (CUDA graphs). `on`:
    torch.compile. `off`: neither."""

    threads: NonNegativeInt = 0
    """Compute threads of a CPU run; 0 leaves room for the loader's workers."""

    deterministic: bool = True
    """Same seed, same device, same run, to the bit."""

    save_minutes: NonNegativeFloat = 10.0
    """Save `last` within an epoch each so many minutes, besides after each epoch; 0 is off."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Besides metrics.jsonl, which is always written."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        starts = [start for start, _ in self.resolution_steps]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ValueError(f"resolution_steps must start at 0 and rise; got starts {starts}")
        return self


class Config(Section):
    """Holds all settings of a run, checked; they never change. `load_config` makes one.

    Examples:
        >>> fieldmark.load_config("laptop").train.epochs
        10
    """

    description: str = ""
    """What the recipe is for, and the result to expect."""

    data: DataConfig = DataConfig()
    cache: CacheConfig = CacheConfig()
    loader: LoaderConfig = LoaderConfig()
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    eval: EvalConfig = EvalConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    probe: ProbeConfig = ProbeConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        train, schedule = self.train, self.schedule
        is_restarting = schedule.name == "warm_restarts"
        cycle = (schedule.restart_epochs or train.epochs) if is_restarting else 0
        if not train.epochs and not self.probe.epochs:
            raise ValueError("train.epochs and probe.epochs are both 0: nothing would be trained")
        if not is_restarting and schedule.warmup_epochs > max(train.epochs, 1):
            warmup = schedule.warmup_epochs
            raise ValueError(f"schedule.warmup_epochs {warmup:g} is longer than train.epochs {train.epochs}")
        if 0 < train.patience_epochs < cycle:
            raise ValueError(
                f"train.patience_epochs {train.patience_epochs} is shorter than a cycle of {cycle} epochs: "
                "the rate is high when patience ends. Give at least the cycle, or 0"
            )
        if self.data.train_on == "train+val" and train.select == "best":
            raise ValueError('data.train_on = "train+val" leaves nothing to select on: set train.select = "last"')
        return self


RECIPES: Any = resources.files("fieldmark") / "recipes"
OTHER_NAMES = {"report": "competition"}  # the recipe is that of the competition's report


def recipe_names(folder: Any = RECIPES) -> list[str]:
    """Names of the recipes, or of the grids, that are shipped, sorted."""
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


def load_config(
    recipe: str | Path | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    data: str | Path | None = None,
) -> Config:
    """Read a recipe and apply overrides.

    Args:
        recipe: Name of a shipped recipe, path of a TOML file, or None for the defaults.
        overrides: A mapping, or `key=value` pairs whose values are TOML or bare words, applied in order. Keys are
            dotted; a last part that is unique, and the usual names of other tools, are understood.
        data: The photos, in place of `data.path`.

    Raises:
        ConfigError: No such recipe, not TOML, an unknown key, or a value out of range. Names every problem.

    Examples:
        >>> fieldmark.load_config("laptop", {"train.epochs": 3, "lr": 1e-4}).optim.lr
        0.0001
    """
    name, settings = read_recipe(recipe)
    apply_overrides(settings, overrides)
    if data is not None and isinstance(settings.get("data", {}), dict):  # no override: a folder "1" must stay text
        settings["data"] = {**settings.get("data", {}), "path": str(data)}
    return parse_config(settings, name)


def apply_overrides(settings: dict[str, Any], overrides: Iterable[str] | Mapping[str, Any]) -> None:
    """Change nested settings in place, by `key=value` pairs or by a mapping of dotted keys."""
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(parse_pair, overrides)
    for key, value in pairs:
        set_value(settings, Config, key, value)


def parse_config(settings: Mapping[str, Any], name: str = "settings") -> Config:
    """Check a nested mapping of settings; the ConfigError says by `name` where an unknown key or a wrong value is."""
    try:
        return Config.model_validate(settings)
    except pydantic.ValidationError as error:
        lines = describe_problems(Config, list(error.errors()))
        raise ConfigError(f"{name} is not a valid recipe:\n  " + "\n  ".join(lines)) from None


def dump_config(config: Config, *, with_comments: bool = False) -> str:
    """The whole tree as TOML, every default filled in, with the meaning of each setting above it where asked for."""
    import tomlkit

    return tomlkit.dumps(_fill_table(tomlkit.document(), config, with_comments=with_comments))


def _fill_table(table: Any, section: Section, *, with_comments: bool) -> Any:
    import tomlkit

    for name, value in section.model_dump(mode="json").items():
        inner = getattr(section, name)
        if isinstance(inner, Section):
            table.add(name, _fill_table(tomlkit.table(), inner, with_comments=with_comments))
            continue
        meaning = (type(section).model_fields[name].description or "") if with_comments else ""
        for line in textwrap.wrap(" ".join(meaning.split()), 100):
            table.add(tomlkit.comment(line))
        table.add(name, "none" if value is None else value)
        if meaning:
            table.add(tomlkit.nl())
    return table


def read_recipe(recipe: str | Path | None) -> tuple[str, dict[str, Any]]:
    """Read a recipe's name and its own settings, without defaults."""
    if recipe is None:
        return "settings", {}
    name = str(recipe)
    settings = read_toml(name, RECIPES / f"{OTHER_NAMES.get(name, name)}.toml", "recipe", recipe_names())
    read_prob(settings)
    return Path(recipe).name if Path(recipe).is_file() else name, settings


def read_toml(name: str, shipped: Any, kind: str, names: Sequence[str], hint: str = "") -> dict[str, Any]:
    """Read a TOML file by its path, or else one that is shipped; the ConfigError lists the `names` of its kind."""
    path = Path(name)
    try:
        file = path if path.is_file() else shipped
        if not file.is_file():
            there = ", ".join(names)
            raise ConfigError(f"no {kind} {name!r}: it is neither a file nor a shipped {kind} ({there}){hint}")
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
