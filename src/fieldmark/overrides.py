"""Settings as people type them: `key=value` pairs, short and foreign names, and the names of earlier versions."""

from __future__ import annotations

import difflib
import logging
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from fieldmark.errors import ConfigError

# Names from other tools, and last parts that several sections have: the one that is usually meant.
SYNONYMS = {
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "peak_lr", "lr0"), "optim.lr"),
    **dict.fromkeys(("batch_size", "bs", "batch", "train_batch_size"), "train.batch_size"),
    **dict.fromkeys(("arch", "architecture", "backbone", "model_name"), "model.name"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "max_epochs", "n_epochs"), "train.epochs"),
    **dict.fromkeys(("size", "image_size", "img_size", "imgsz", "resolution", "input_size"), "augment.size"),
    **dict.fromkeys(("seed", "random_seed", "random_state"), "train.seed"),
    **dict.fromkeys(("weight_decay", "wd"), "optim.weight_decay"),
    **dict.fromkeys(("optimizer", "optimiser", "opt"), "optim.name"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "sched"), "schedule.name"),
    **dict.fromkeys(("num_workers", "n_workers"), "loader.workers"),
    **dict.fromkeys(("amp", "dtype"), "train.precision"),
    **dict.fromkeys(("warmup", "num_warmup_epochs"), "schedule.warmup_epochs"),
    **dict.fromkeys(("smoothing", "label_smooth"), "train.label_smoothing"),
    **dict.fromkeys(("patience", "early_stopping"), "train.patience_epochs"),
    **dict.fromkeys(("track", "tracker", "logger", "report_to"), "train.trackers"),
    **dict.fromkeys(("clip", "grad_clip", "clip_grad", "max_grad_norm", "clip_grad_norm"), "optim.clip_norm"),
    **dict.fromkeys(("gpus", "num_gpus"), "train.devices"),
    **dict.fromkeys(("ema", "model_ema_decay"), "train.ema_decay"),
    **dict.fromkeys(("frozen_stages", "freeze_stages"), "model.freeze"),
}

RENAMED_RECIPES = {"report": "competition"}
RENAMED_VALUES = {("eval", "transform"): {"weights": "pretrained"}, ("augment", "crop"): {"weights": "pretrained"}}


def parse_pair(pair: str) -> tuple[str, str]:
    """Split `key=value` at the first `=`.

    Raises:
        ConfigError: There is no `=`, or no key before it.
    """
    key, equals, text = pair.partition("=")
    key = key.strip().lstrip("-")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set takes key=value, such as train.epochs=20; got {pair!r}")
    return key, text.strip()


def parse_value(text: str) -> Any:
    """Read one TOML value; what is not TOML is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def setting_keys(model: type[BaseModel]) -> list[str]:
    """List every setting as a dotted key, in the order of the sections."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        keys += [f"{name}.{key}" for key in inner.model_fields] if inner else [name]
    return keys


def setting_words(model: type[BaseModel], key: str) -> list[str]:
    """List the words that a setting takes, for completion; none for numbers and free text."""
    try:
        section, _, name = find_setting(model, key).rpartition(".")
    except ConfigError:
        return []
    kinds = _kinds(_annotation(model, section, name))
    if bool in kinds:
        return ["true", "false"]
    inner = [kind for outer in kinds for kind in (get_args(outer) if get_origin(outer) is tuple else (outer,))]
    words = [word for kind in inner if get_origin(kind) is Literal for word in get_args(kind)]
    return [*map(str, words), *(["none"] if NoneType in kinds else [])]


def find_setting(model: type[BaseModel], key: str) -> str:
    """Return the dotted key that is meant: `epochs`, `lr`, `learning_rate` and `model` are understood.

    Raises:
        ConfigError: No setting is called so, or several are. Names the likely ones.
    """
    keys = setting_keys(model)
    asked = key.lower().replace("-", "_")
    if asked in keys or asked in OLD_KEYS:
        return asked
    section, _, last = asked.rpartition(".")
    if not section and f"{asked}.name" in keys:
        return f"{asked}.name"
    inside = [name for name in keys if name.startswith(f"{asked}.")]
    if inside:
        raise ConfigError(f"{key} is a group of settings; give one of them, such as {inside[0]}")
    wanted = SYNONYMS.get(last, "")
    local = f"{section}.{wanted.rpartition('.')[2]}"
    if wanted and local in keys:
        return local  # probe.learning_rate is probe.lr
    close = difflib.get_close_matches(
        last, [name.rpartition(".")[2] for name in keys if name.startswith(f"{section}.")]
    )
    if close and section:
        raise ConfigError(f"{key}: no such setting; did you mean {section}.{close[0]}?")
    if wanted:
        return wanted
    found = [name for name in (*keys, *OLD_KEYS) if name.rpartition(".")[2] == last]
    if len(found) == 1:
        return found[0]
    raise ConfigError(f"{key}: no such setting{_suggest(last, found, keys)}")


def suggest_setting(model: type[BaseModel], key: str) -> str:
    """Return `; did you mean optim.lr?` for a key that is none, or nothing if none is like it."""
    try:
        return f"; did you mean {find_setting(model, key)}?"
    except ConfigError as error:
        _, mark, hint = str(error).partition("; did you mean ")
        return f"{mark}{hint}"


def set_value(settings: dict[str, Any], model: type[BaseModel], key: str, value: Any) -> None:
    """Put a value into nested settings under the key that is meant, and read old names as new ones.

    Args:
        settings: Section to setting to value; changed in place.
        model: The tree that they are settings of.
        key: As typed.
        value: Parsed, or text as typed.

    Raises:
        ConfigError: No such setting.
    """
    found = find_setting(model, key)
    section, _, name = found.rpartition(".")
    table: Any = settings.setdefault(section, {}) if section else settings
    if not isinstance(table, dict):
        raise ConfigError(f"{key}: {section} is a group of settings, but has the value {table!r}")
    table[name] = _fit(_annotation(model, section, name), value) if isinstance(value, str) else value
    read_old_names(settings)


def read_old_names(settings: dict[str, Any]) -> None:
    """Replace the names of earlier versions by those of today, in place, with one note each.

    `mix.prob` and `mix.methods`: the probability was of each method, so 0.4 of two methods mixed 80 % of the batches.
    """
    for (section, name), values in RENAMED_VALUES.items():
        table = settings.get(section)
        if isinstance(table, dict) and isinstance(old := table.get(name), str) and old in values:
            table[name] = values[old]
            note(f'{section}.{name} = "{old}" is now called "{values[old]}"')
    mix = settings.get("mix")
    if not isinstance(mix, dict) or not {"prob", "methods"} & mix.keys():
        return
    share, cutmix_share = mix.get("share", 0.0), mix.get("cutmix_share", 0.5)
    before = 1 if cutmix_share in (0, 1) else 2
    methods = mix.pop("methods", None)
    given = {key: value for key, value in (("prob", mix.get("prob")), ("methods", methods)) if value is not None}
    prob = mix.pop("prob", share / before)
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(prob, int | float) or any(method not in ("mixup", "cutmix") for method in methods or ()):
        wanted = "mix.share (share of the batches that are mixed) and mix.cutmix_share (share of those that get CutMix)"
        raise ConfigError(
            f"mix.prob is a number and mix.methods a list of mixup and cutmix; got {given}. Give {wanted}"
        )
    count = before if methods is None else len(methods)
    if prob * count > 1:
        raise ConfigError(f"mix.prob is per method: of {count} methods at most {1 / count:g}; got {prob:g}. Give "
                          "mix.share, the share of all batches that are mixed")  # fmt: skip
    mix["share"] = prob * count
    if methods:
        mix["cutmix_share"] = list(methods).count("cutmix") / count
    changed = " and ".join(f"mix.{key} = {value}" for key, value in given.items())
    share_text = f"mix.share = {mix['share']:g} and mix.cutmix_share = {mix.get('cutmix_share', 0.5):g}"
    note(f"{changed} of earlier versions is read as {share_text}: shares of the batches, not per method")


OLD_KEYS = ("mix.prob", "mix.methods")


@cache
def note(text: str) -> None:
    """Say once in a process what a user should know of a setting's name."""
    logging.getLogger("fieldmark").warning("note: %s", text)


def _fit(annotation: Any, text: str) -> Any:
    """Read text by what the setting takes: a word for a list of one, digits as a name, `true` for `on`."""
    value = parse_value(text)
    kinds = _kinds(annotation)
    if any(get_origin(kind) is tuple for kind in kinds) and not isinstance(value, list):
        several = parse_value(f"[{text}]")
        return several if isinstance(several, list) else [part.strip() for part in text.split(",")]
    if str in kinds and not isinstance(value, str):
        return text
    words = {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}
    if isinstance(value, bool) and "on" in words:
        return "on" if value else "off"
    return value


def _kinds(annotation: Any) -> list[Any]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return [kind for part in get_args(annotation) for kind in _kinds(part)] if is_union else [annotation]


def _annotation(model: type[BaseModel], section: str, name: str) -> Any:
    inner = _section(model.model_fields[section].annotation) if section else model
    field = inner.model_fields.get(name) if inner else None
    return field.annotation if field else None


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _suggest(last: str, found: list[str], keys: list[str]) -> str:
    by_last: dict[str, str] = {}
    for key in (*keys, *SYNONYMS):
        by_last.setdefault(key.rpartition(".")[2], SYNONYMS.get(key, key))
    close = found or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=2)]
    close = list(dict.fromkeys(close))[:4]
    return f"; did you mean {' or '.join(close)}?" if close else "; `fieldmark config show` lists them all"


# What pydantic found, in words that name what to give.
_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), lambda _: "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), lambda _: "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), lambda _: "true or false"),
    "string_type": lambda _: "text",
    "greater_than_equal": lambda limits: f"at least {limits['ge']:g}",
    "greater_than": lambda limits: f"more than {limits['gt']:g}",
    "less_than_equal": lambda limits: f"at most {limits['le']:g}",
    "less_than": lambda limits: f"less than {limits['lt']:g}",
    "literal_error": lambda limits: f"{limits['expected']}",
    **dict.fromkeys(("tuple_type", "list_type"), lambda _: "a list, such as [a, b]"),
}


def describe_problems(model: type[BaseModel], problems: list[Mapping[str, Any]]) -> list[str]:
    """Return a line for each setting that pydantic refused: which, what it takes, what was given."""
    refused: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        # A union's branches stand in pydantic's location too; the dotted key ends before them.
        depth = None if problem["type"] == "extra_forbidden" else 2
        refused.setdefault(".".join(map(str, problem["loc"][:depth])) or "recipe", []).append(problem)
    return [f"{key}: {_describe(model, key, found)}" for key, found in refused.items()]


def _describe(model: type[BaseModel], key: str, problems: list[Mapping[str, Any]]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return f"no such setting{suggest_setting(model, key)}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "model_type":
        inside = next((name for name in setting_keys(model) if name.startswith(f"{key}.")), key)
        return f"is a group of settings; give one of them, such as {inside}; got {first['input']!r}"
    section, _, name = key.rpartition(".")
    if first["type"] in ("missing", "too_short", "too_long"):  # in a list: pairs are all that have a length
        return f"must be a list of {len(get_args(_annotation(model, section, name)))} values; got {first['input']!r}"
    words = [_WORDS[p["type"]](p.get("ctx", {})) if p["type"] in _WORDS else str(p["msg"]) for p in problems]
    return f"must be {' or '.join(dict.fromkeys(words))}; got {first['input']!r}"
