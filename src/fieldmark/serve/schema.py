"""What the server answers, as its OpenAPI document shows it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Answer(BaseModel):
    """One class and its probability."""

    label: str
    probability: float


class Group(BaseModel):
    """A name at some level of the taxonomy that the model was calibrated with."""

    level: str
    name: str
    probability: float


class PhotoAnswer(BaseModel):
    """What the model says of one photo."""

    label: str | None
    """The likeliest class; null if it is not sure enough, or the photo could not be read."""

    is_unknown: bool
    """Whether the probability is below the threshold."""

    group: Group | None
    """Where the class is not sure: the finest group of the taxonomy that is; null if there is none."""

    top: list[Answer]
    """The likeliest classes, best first; empty for a photo that could not be read."""

    problem: str | None
    """Why the photo could not be read; null if it could."""

    attention: list[list[float]] | None
    """Rows of a map in 0 to 1: where the model looked for its first answer. Only on request."""

    seen: list[float] | None
    """x, y, width, height, as shares of the photo, of what the model sees and `attention` covers."""


class PhotoAnswers(BaseModel):
    """Answers in the order of the photos."""

    model: str
    threshold: float
    photos: list[PhotoAnswer]


class Health(BaseModel):
    """Whether the server answers, and with what."""

    status: str
    model: str
    classes: int
    waiting: int
    has_attention: bool
    examples: int
    max_photos: int


class Classes(BaseModel):
    """Names of the classes; a class's number is its place."""

    classes: list[str]
    threshold: float


class Problem(BaseModel):
    """Why a request was refused."""

    detail: Any
