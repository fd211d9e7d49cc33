"""Settings as people type them: `key=value` pairs, and short and foreign names."""

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from fieldmark.errors import ConfigError
from fieldmark.progress import note

_NAMES: dict[str, dict[str, Any]] = tomllib.loads((resources.files("fieldmark") / "synonyms.toml").read_text("utf-8"))
SYNONYMS: dict[str, str] = {word: key for key, words in _NAMES["meant"].items() for word in words.split()}

PROB = "mix.prob"  # the competition report's probability of each method, in place of `mix.share`


def parse_pair(pair: str) -> tuple[str, str]:
    """Split `key=value` at the first `=`."""
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


@cache
def list_settings(model: type[BaseModel]) -> dict[str, Any]:
    """Every setting's dotted key, in the order of the sections, with the type that it takes."""
    settings: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            settings |= {f"{name}.{key}": inner.annotation for key, inner in kind.model_fields.items()}
        else:
            settings[name] = kind
    return settings


def setting_words(model: type[BaseModel], key: str) -> list[str]:
    """List the words that a setting takes, for completion; none for numbers and free text."""
    try:
        kinds = _kinds(list_settings(model).get(find_setting(model, key)))
    except ConfigError:
        return []
    if bool in kinds:
        return ["true", "false"]
    return [*map(str, _words(kinds)), *(["none"] if NoneType in kinds else [])]


def find_setting(model: type[BaseModel], key: str) -> str:
    """Return the dotted key that is meant by a short or foreign name; the ConfigError names the likely ones."""
    keys = list_settings(model)
    asked = key.lower().replace("-", "_")
    if asked in keys or asked == PROB:
        return asked
    section, _, last = asked.rpartition(".")
    if not section and f"{asked}.name" in keys:
        return f"{asked}.name"
    if inside := [name for name in keys if name.startswith(f"{asked}.")]:
        raise ConfigError(f"{key} is a group of settings; give one of them, such as {inside[0]}")
    wanted = SYNONYMS.get(last, "")
    local = f"{section}.{_last(wanted)}"
    if wanted and local in keys:
        return local  # probe.learning_rate is probe.lr
    siblings = [_last(name) for name in keys if name.startswith(f"{section}.")]
    if close := difflib.get_close_matches(last, siblings, n=1):
        raise ConfigError(f"{key}: no such setting; did you mean {section}.{close[0]}?")
    found = [wanted] if wanted else [name for name in (*keys, PROB) if _last(name) == last]
    if len(found) == 1:
        return found[0]
    by_last = {_last(word): SYNONYMS.get(word, word) for word in reversed((*keys, *SYNONYMS))}
    found = found or [by_last[word] for word in difflib.get_close_matches(last, by_last, n=2)]
    likely = " or ".join(list(dict.fromkeys(found))[:4])
    hint = f"did you mean {likely}?" if likely else "`fieldmark config show` lists them all"
    raise ConfigError(f"{key}: no such setting; {hint}")


def set_value(settings: dict[str, Any], model: type[BaseModel], key: str, value: Any) -> None:
    """Put a value, parsed or as typed, into nested settings under the key that is meant."""
    found = find_setting(model, key)
    section, _, name = found.rpartition(".")
    table: Any = settings.setdefault(section, {}) if section else settings
    if not isinstance(table, dict):
        raise ConfigError(f"{key}: {section} is a group of settings, but has the value {table!r}")
    table[name] = _fit(list_settings(model).get(found), value) if isinstance(value, str) else value
    read_prob(settings)


def read_prob(settings: Mapping[str, Any]) -> None:
    """Replace `mix.prob`, in place: as it is of each method, 0.4 of MixUp and of CutMix mixes 80 % of the batches."""
    mix = settings.get("mix")
    if not isinstance(mix, dict) or "prob" not in mix:
        return
    prob, methods = mix.pop("prob"), 1 if mix.get("cutmix_share", 0.5) in (0, 1) else 2
    if not isinstance(prob, int | float) or prob * methods > 1:
        raise ConfigError(
            f"mix.prob is per method: of {methods} methods at most {1 / methods:g}; got {prob!r}. Give mix.share, the "
            "share of all batches that are mixed"
        )
    mix["share"] = prob * methods
    note(f"mix.prob = {prob:g} is per method: it is read as mix.share = {mix['share']:g}, the share of all batches")


def _fit(annotation: Any, text: str) -> Any:
    """Read text by what the setting takes: a word for a list of one, digits as a name, `true` for `on`."""
    value, kinds = parse_value(text), _kinds(annotation)
    if any(get_origin(kind) is tuple for kind in kinds) and not isinstance(value, list):
        several = parse_value(f"[{text}]")
        return several if isinstance(several, list) else [part.strip() for part in text.split(",")]
    if str in kinds and not isinstance(value, str):
        return text
    if isinstance(value, bool) and "on" in _words(kinds):
        return "on" if value else "off"
    return value


def _kinds(annotation: Any) -> list[Any]:
    """The branches of a union, or the one type."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return [kind for part in get_args(annotation) for kind in _kinds(part)] if is_union else [annotation]


def _words(kinds: list[Any]) -> list[Any]:
    inner = [kind for outer in kinds for kind in (get_args(outer) if get_origin(outer) is tuple else (outer,))]
    return [word for kind in inner if get_origin(kind) is Literal for word in get_args(kind)]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def describe_problems(model: type[BaseModel], problems: list[Mapping[str, Any]]) -> list[str]:
    """Return a line for each setting that pydantic refused: which, what it takes, what was given."""
    refused: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        # A union's branches stand in pydantic's location too; the dotted key ends before them.
        depth = None if problem["type"] == "extra_forbidden" else 2
        refused.setdefault(".".join(map(str, problem["loc"][:depth])) or "recipe", []).append(problem)
    return [_describe(model, key, found) for key, found in refused.items()]


def _describe(model: type[BaseModel], key: str, problems: list[Mapping[str, Any]]) -> str:
    kind, given = problems[0]["type"], problems[0]["input"]
    if kind == "extra_forbidden":
        try:
            return f"{key}: no such setting; did you mean {find_setting(model, key)}?"
        except ConfigError as error:
            return str(error)
    if kind == "value_error":
        return f"{key}: {str(problems[0]['msg']).removeprefix('Value error, ')}"
    if kind == "model_type":
        inside = next((name for name in list_settings(model) if name.startswith(f"{key}.")), key)
        return f"{key}: is a group of settings; give one of them, such as {inside}; got {given!r}"
    if kind in ("missing", "too_short", "too_long"):  # in a list: pairs are all that have a length
        return f"{key}: must be a list of {len(get_args(list_settings(model)[key]))} values; got {given!r}"
    known = _NAMES["words"]
    words = [known[p["type"]].format(**p.get("ctx", {})) if p["type"] in known else str(p["msg"]) for p in problems]
    return f"{key}: must be {' or '.join(dict.fromkeys(words))}; got {given!r}"
