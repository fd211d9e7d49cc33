"""Where weights come from, what they may be used for, and the picture that they expect."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

DATASETS: tuple[tuple[str, str], ...] = (
    # Pattern of one part of timm's tag (or of a free description) -> what the weights have seen.
    (r"inat\w*", "iNaturalist"),
    (r"(in|inw|imagenet-?)1k", "ImageNet-1k"),
    (r"in12k", "ImageNet-12k"),
    (r"(in|inw|imagenet-?)2[12]k", "ImageNet-21k"),
    (r"ig1b|swag", "Instagram photos by hashtag"),
    (r"seer", "Instagram photos"),
    (r"yfcc\w*", "YFCC (Flickr)"),
    (r"jft", "JFT-300M"),
    (r"laion\w*", "LAION"),
    (r"webli", "WebLI"),
    (r"openai", "OpenAI's 400M web photos"),
    (r"datacomp\w*", "DataComp"),
    (r"dfn\w*|dfndr\w*", "DFN (web)"),
    (r"metaclip\w*|mclip\w*", "MetaCLIP (web)"),
    (r"merged2b|m\d+m", "a merged web collection"),
    (r"cc12m", "CC12M (web)"),
    (r"lvd\d+m", "LVD (web, chosen near fine-grained benchmarks)"),
    (r"sa1b", "SA-1B"),
    (r"treeoflife\w*|bioclip\w*", "TreeOfLife (with iNaturalist)"),
)

_SPECIES_SETS = ("iNaturalist", "TreeOfLife")
_WEB_SETS = ("Instagram", "YFCC", "JFT", "LAION", "WebLI", "OpenAI", "DataComp", "DFN", "MetaCLIP", "web")
_NON_COMMERCIAL = re.compile(r"(?<![a-z])nc(?![a-z])|non-?commercial|amlr|research|seer|mobileone", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class InputConfig:
    """The picture that weights expect.

    Args:
        train_size: Side of the square training picture, in pixels.
        test_size: Side that is best for evaluation, in pixels.
        crop_fraction: `test_size` over the resized short side, in (0, 1].
        interpolation: "bilinear" or "bicubic".
        mean: Per-channel mean of the normalization, for values in [0, 1].
        std: Per-channel standard deviation, for values in [0, 1].
        is_size_fixed: The network takes pictures of `train_size` alone.
    """

    train_size: int
    test_size: int
    crop_fraction: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_size_fixed: bool


def input_config(config: Any, *, is_own: bool) -> InputConfig:
    """What a timm pretrained configuration says about the picture.

    Args:
        config: timm's PretrainedCfg.
        is_own: The weights are those of this configuration. If not, its larger test size and the crop that goes with
            it were not found with these weights, so evaluation stays at the training size.
    """
    from timm.data import resolve_data_config

    settings = config.to_dict()
    train = resolve_data_config({}, pretrained_cfg=settings, use_test_size=False)
    test = resolve_data_config({}, pretrained_cfg=settings, use_test_size=True) if is_own else train
    red, green, blue = (float(value) for value in train["mean"])
    red_std, green_std, blue_std = (float(value) for value in train["std"])
    return InputConfig(
        train_size=int(train["input_size"][-1]),
        test_size=int(test["input_size"][-1]),
        crop_fraction=float(test["crop_pct"]),
        interpolation=str(train["interpolation"]),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        is_size_fixed=bool(config.fixed_input_size),
    )


def describe_pretraining(tag: str) -> str:
    """The data sets in a timm tag, oldest first: "in12k_ft_in1k" -> "ImageNet-12k, then ImageNet-1k".

    Returns:
        "unknown" where the tag names no data set that we know.
    """
    found: list[str] = []
    for part in re.split(r"[_\s,;/]+", tag.lower()):
        found += [name for pattern, name in DATASETS if re.fullmatch(pattern, part) and name not in found]
    return ", then ".join(found) or "unknown"


def provenance_warnings(*, name: str, licence: str, pretraining: str) -> list[str]:
    """What somebody who is about to train from these weights should know.

    Args:
        name: The weights, as the user knows them.
        licence: An SPDX-like name, or "unknown".
        pretraining: A timm tag or a free description of the data, or "unknown".

    Returns:
        One sentence per finding; empty where there is nothing to say.
    """
    described = describe_pretraining(pretraining)
    seen = pretraining if described == "unknown" else f"{pretraining} ({described})"
    warnings: list[str] = []
    if _NON_COMMERCIAL.search(licence):
        warnings.append(f"{name}: licence {licence} forbids or limits commercial use of the weights and what you train")
    elif licence == "unknown":
        warnings.append(f"{name}: the licence of the weights is unknown; ask whoever made them before you publish")
    if any(species in f"{described} {pretraining}" for species in _SPECIES_SETS):
        warnings.append(
            f"{name}: pre-trained on {seen}, photos of labelled species: a test set of species photos from "
            "the web may be in it, and accuracy on it would be too high"
        )
    elif any(web in described for web in _WEB_SETS):
        warnings.append(f"{name}: pre-trained on {seen}: photos from the web, possibly those of a public test set")
    return warnings
