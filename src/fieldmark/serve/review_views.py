"""What the review page shows: ordered lists of photos, a page at a time, so that 100,000 photos cost no more than 60.

A photo's number is its place in the run's index.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fieldmark.errors import DataError, FieldmarkError
from fieldmark.outputs.triage import ConfusedPair, Judged, confused_pairs, highest_losses, label_suspects
from fieldmark.serve.corrections import Corrections

if TYPE_CHECKING:
    from fieldmark.data.index import PhotoIndex

DuplicateSearch = Callable[[], Sequence[tuple[int, int, int]]]


class ReviewViews:
    """Orders the photos of a run by why they deserve a look.

    Args:
        index: All photos of the run.
        judged: Predictions of those that the model was not trained on.
        corrections: Decisions so far.
        find_duplicates: Looks for near-duplicates; called once, on a thread of its own.
    """

    def __init__(
        self, index: PhotoIndex, judged: Judged, corrections: Corrections, *, find_duplicates: DuplicateSearch
    ) -> None:
        self.index = index
        self.judged = judged
        self.corrections = corrections
        self.classes = judged.classes
        self._number_of = {photo.path: number for number, photo in enumerate(index.photos)}
        self._place_of = {path: place for place, path in enumerate(judged.paths)}
        self._number_at = [self._number_of.get(path, -1) for path in judged.paths]
        self._guesses, self._losses = judged.guesses, judged.losses
        self.pairs: list[ConfusedPair] = confused_pairs(judged)
        self._suspects = self._numbers(label_suspects(judged))
        self._highest = self._numbers(highest_losses(judged))
        self._duplicates: list[tuple[int, int, int]] = []
        self.duplicates_state = "searching"
        self._by_class: dict[str, list[int]] = {name: [] for name in self.classes}
        for number, photo in enumerate(index.photos):
            if photo.label in self._by_class:
                self._by_class[photo.label].append(number)
        self._search = threading.Thread(target=self._find, args=(find_duplicates,), daemon=True)
        self._search.start()

    def overview(self) -> dict[str, Any]:
        """Names and sizes of the views."""
        return {
            "classes": [{"name": name, "photos": len(self._by_class[name])} for name in self.classes],
            "photos": len(self.index.photos),
            "judged": len(self.judged.paths),
            "suspects": len(self._suspects),
            "losses": len(self._highest),
            "pairs": [
                {"first": self.classes[pair.first], "second": self.classes[pair.second], "photos": len(pair.places)}
                for pair in self.pairs[:200]
            ],
            "duplicates": len(self._duplicates),
            "duplicates_state": self.duplicates_state,
            "marked": len(self.corrections.paths()),
            "table": self.corrections.file.name,
        }

    def page(self, view: str, *, which: int, offset: int, limit: int) -> dict[str, Any]:
        """Photos of one view from `offset` on.

        Args:
            view: "suspects", "losses", "pair", "class", "duplicates" or "marked".
            which: The pair's place among the pairs, or the class number.
            offset: First row.
            limit: Most rows.

        Raises:
            DataError: There is no such view.
        """
        if view == "duplicates":
            rows = self._duplicates[offset : offset + limit]
            photos = [
                {**self.photo(number), "near": place + offset, "bits": bits}
                for place, (left, right, bits) in enumerate(rows)
                for number in (left, right)
            ]
            return {"total": len(self._duplicates), "next": offset + len(rows), "photos": photos}
        numbers = self._view(view, which)
        chosen = numbers[offset : offset + limit]
        photos = [self.photo(number) for number in chosen]
        return {"total": len(numbers), "next": offset + len(chosen), "photos": photos}

    def photo(self, number: int) -> dict[str, Any]:
        """What the page says of one photo."""
        photo = self.index.photos[number]
        decision = self.corrections.get(photo.path)
        place = self._place_of.get(photo.path)
        known: dict[str, Any] = {"guess": None, "probability": None, "loss": None}
        if place is not None:
            guess = int(self._guesses[place])
            probability = float(self.judged.probabilities[place, guess])
            known = {"guess": self.classes[guess], "probability": probability, "loss": float(self._losses[place])}
        return {
            "number": number,
            "path": photo.path.encode("utf-8", "replace").decode(),
            "label": photo.label,
            "split": photo.split,
            **known,
            "action": decision.action if decision else None,
            "new_label": decision.label if decision else None,
        }

    def decide(self, number: int, action: str, label: str) -> dict[str, Any]:
        """Decide about a photo; the photo afterwards.

        Raises:
            DataError: No such action or class.
        """
        if action == "relabel" and label not in self.classes:
            raise DataError(f"{label!r} is not one of the {len(self.classes)} classes")
        self.corrections.decide(self.index.photos[number].path, action, label)
        return self.photo(number)

    def undo(self) -> dict[str, Any] | None:
        """Take back the latest decision; the photo afterwards, or None."""
        path = self.corrections.undo()
        number = self._number_of.get(path) if path is not None else None
        return None if number is None else self.photo(number)

    def _view(self, view: str, which: int) -> list[int]:
        if view == "suspects":
            return self._suspects
        if view == "losses":
            return self._highest
        if view == "marked":
            found = [self._number_of.get(path, -1) for path in reversed(self.corrections.paths())]
            return [number for number in found if number >= 0]
        if view == "pair" and 0 <= which < len(self.pairs):
            return self._numbers(self.pairs[which].places)
        if view == "class" and 0 <= which < len(self.classes):
            return self._by_class[self.classes[which]]
        raise DataError(f"there is no view {view!r} number {which}")

    def _numbers(self, places: Any) -> list[int]:
        """Numbers in the index of judged photos; photos that are no longer in the index are left out."""
        found = [self._number_at[int(place)] for place in np.asarray(places, np.int64)]
        return [number for number in found if number >= 0]

    def _find(self, find_duplicates: DuplicateSearch) -> None:
        try:
            self._duplicates = list(find_duplicates())
            self.duplicates_state = "done"
        except (FieldmarkError, OSError) as error:
            self.duplicates_state = f"failed: {error}"
