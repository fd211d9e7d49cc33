"""Laws of the audit: each fault is found, named with a photo, and weighed as something to fix or to know."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fieldmark.data.audit import MOST_NEAR_DUPLICATES, Audit, audit, find_doubts, find_gaps_in_training
from fieldmark.data.index import Photo, PhotoIndex
from fieldmark.data.inspection import PhotoFacts

GOOD = PhotoFacts(640, 480, 1000, "RGB", "JPEG", "", "", "", None)


def make_data(num_train: int = 12, num_val: int = 3) -> tuple[list[Photo], list[PhotoFacts]]:
    """Two classes, a and b, with nothing wrong; every hash far from every other."""
    photos, facts = [], []
    for label in "ab":
        for split, count in (("train", num_train), ("val", num_val)):
            for number in range(count):
                photos.append(Photo(f"{split}/{label}/{number}.jpg", label, split, ""))
                digest = f"{len(photos):064x}"
                facts.append(
                    replace(GOOD, sha256=digest, perceptual_hash=f"{len(photos) * 0x9E3779B97F4A7C15 % 2**64:016x}")
                )
    return photos, facts


def find_faults(photos, facts, *, classes=("a", "b"), **changes) -> Audit:
    settings = {"near_distance": 6, "skip_broken": False} | changes
    return audit(PhotoIndex(Path("/data"), tuple(photos), classes, {"hidden": 2}), facts, **settings)


def at(photos: list[Photo], path: str) -> int:
    return next(place for place, photo in enumerate(photos) if photo.path == path)


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


def test_good_data_need_no_fix_and_no_warning():
    found = find_faults(*make_data())
    assert found.must_fix == []
    assert found.warnings == []
    assert found.counts == {name: {"train": 12, "val": 3} for name in "ab"}
    assert (found.num_photos, found.ignored) == (30, {"hidden": 2})
    assert (found.formats, found.modes) == ({"JPEG": 30}, {"RGB": 30})


def test_sizes_are_of_the_photos_that_can_be_used():
    photos, facts = make_data()
    facts[0] = replace(facts[0], problem="is truncated", width=0, height=0)
    facts[1] = replace(facts[1], width=100, height=300)
    sizes = find_faults(photos, facts).sizes
    assert (sizes.min_short_side, sizes.median_short_side, sizes.max_short_side) == (100, 480, 480)
    assert (sizes.smallest, sizes.max_pixels, sizes.num_bytes) == (photos[1].path, 640 * 480, 29_000)
    assert sizes.median_aspect == pytest.approx(4 / 3)
    assert find_faults([], [], classes=()).sizes is None


def test_broken_photos_must_be_fixed_unless_they_are_skipped():
    photos, facts = make_data()
    facts[3] = replace(facts[3], problem="is truncated", sha256="", perceptual_hash="")
    found = find_faults(photos, facts)
    assert [asdict(photo) for photo in found.broken] == [{"path": photos[3].path, "reason": "is truncated"}]
    assert f"1 photo cannot be used, such as '{photos[3].path}': is truncated" in only(found.must_fix)
    skipped = find_faults(photos, facts, skip_broken=True)
    assert skipped.must_fix == []
    assert "1 photo cannot be used and will be left out" in only(skipped.warnings)


def test_a_class_that_only_has_broken_photos_cannot_be_trained_by_skipping_them():
    photos, facts = make_data()
    facts = [
        replace(fact, problem="is empty") if photo.label == "b" and photo.split == "train" else fact
        for photo, fact in zip(photos, facts, strict=True)
    ]
    assert "1 class has no photo in train: 'b'" in only(find_faults(photos, facts, skip_broken=True).must_fix)


def test_the_same_photo_in_two_splits_must_be_fixed():
    photos, facts = make_data()
    place = at(photos, "val/a/0.jpg")
    facts[place] = replace(facts[place], sha256=facts[0].sha256, perceptual_hash=facts[0].perceptual_hash)
    found = find_faults(photos, facts)
    assert found.exact_across_splits == found.exact_duplicates == [["train/a/0.jpg", "val/a/0.jpg"]]
    assert found.near_duplicates == []  # said once is enough
    assert "1 photo lies in more than one split, such as 'train/a/0.jpg', 'val/a/0.jpg'" in only(found.must_fix)


def test_a_copy_in_the_unlabeled_test_is_a_warning_as_nobody_can_fix_it():
    photos, facts = make_data()
    found = find_faults([*photos, Photo("test/x.jpg", None, "test", "")], [*facts, facts[0]])
    assert found.must_fix == []
    assert "1 photo of the unlabeled test also in train or val" in only(found.warnings)
    assert found.num_unlabeled == 1


def test_a_copy_within_a_split_is_a_warning():
    photos, facts = make_data()
    facts[1] = replace(facts[1], sha256=facts[0].sha256)
    found = find_faults(photos, facts)
    assert found.must_fix == []
    assert "1 photo is there more than once in a split" in only(found.warnings)


def test_the_same_photo_under_two_labels_must_be_fixed():
    photos, facts = make_data()
    place = at(photos, "train/b/0.jpg")
    facts[place] = replace(facts[place], sha256=facts[0].sha256)
    found = find_faults(photos, facts)
    assert found.conflicting_labels == [["train/a/0.jpg", "train/b/0.jpg"]]
    assert "1 photo has more than one label, such as 'train/a/0.jpg', 'train/b/0.jpg'" in found.must_fix[0]


def test_empty_files_are_broken_not_duplicates_of_each_other():
    photos, facts = make_data()
    empty = replace(GOOD, num_bytes=0, problem="is empty", sha256="e3b0c442")
    assert find_faults(photos, [empty, empty, *facts[2:]]).exact_duplicates == []


def test_near_duplicates_count_across_splits_only_and_within_the_distance():
    photos, facts = make_data()
    bits = int(facts[0].perceptual_hash, 16)
    for path, flipped in (
        ("val/a/0.jpg", 0b1111),
        ("val/b/1.jpg", 0b11),
        ("train/a/1.jpg", 0b1),
        ("val/a/1.jpg", 0xFF),
    ):
        place = at(photos, path)
        facts[place] = replace(facts[place], perceptual_hash=f"{bits ^ flipped:016x}")
    found = find_faults(photos, facts)
    pairs = [(pair.path, pair.other_path, pair.distance) for pair in found.near_duplicates]
    assert pairs == [
        ("train/a/1.jpg", "val/b/1.jpg", 1),
        ("train/a/0.jpg", "val/b/1.jpg", 2),
        ("train/a/1.jpg", "val/a/0.jpg", 3),
        ("train/a/0.jpg", "val/a/0.jpg", 4),
    ]
    assert found.num_near_duplicates == 4
    assert found.must_fix == []
    assert "4 pairs of photos in different splits look alike, such as 'train/a/1.jpg'" in only(found.warnings)
    assert find_faults(photos, facts, near_distance=2).num_near_duplicates == 2


def test_more_near_duplicates_than_can_be_listed_are_counted():
    photos, facts = make_data(num_train=40, num_val=20)
    facts = [replace(fact, perceptual_hash="0" * 16) for fact in facts]
    found = find_faults(photos, facts)
    assert found.num_near_duplicates == 80 * 40
    assert len(found.near_duplicates) == MOST_NEAR_DUPLICATES


def test_a_class_missing_from_train_must_be_fixed_and_from_val_be_known():
    photos, facts = make_data()
    kept = [place for place, photo in enumerate(photos) if photo.path[:5] not in ("val/b",)]
    found = find_faults([photos[place] for place in kept], [facts[place] for place in kept])
    assert found.gaps == [("b", "val")]
    assert "1 class has no photo in val: 'b'" in only(found.warnings)
    kept = [place for place, photo in enumerate(photos) if photo.path[:7] != "train/b"]
    found = find_faults([photos[place] for place in kept], [facts[place] for place in kept])
    assert found.gaps == [("b", "train")]
    assert "1 class has no photo in train: 'b'" in only(found.must_fix)


def test_one_class_is_not_enough():
    photos, facts = make_data()
    kept = [place for place, photo in enumerate(photos) if photo.label == "a"]
    found = find_faults([photos[place] for place in kept], [facts[place] for place in kept], classes=("a",))
    assert "needs at least 2 classes; there is only 'a'" in only(found.must_fix)


def test_few_photos_and_imbalance_are_pointed_out():
    photos, facts = make_data(num_train=120)
    drop = {f"train/b/{number}.jpg" for number in range(9, 120)}
    kept = [place for place, photo in enumerate(photos) if photo.path not in drop]
    found = find_faults([photos[place] for place in kept], [facts[place] for place in kept])
    assert found.num_train == {"a": 120, "b": 9}
    assert found.imbalance == pytest.approx(120 / 9)
    few, imbalance = found.warnings
    assert "1 class has fewer than 10 photos to train on: 'b'" in few
    assert "13 times the training photos of the smallest" in imbalance


def test_a_group_on_two_sides_must_be_fixed():
    photos, facts = make_data()
    for path in ("train/a/0.jpg", "val/a/0.jpg"):
        photos[at(photos, path)] = replace(photos[at(photos, path)], group="nest 7")
    photos[1] = replace(photos[1], group="nest 8")
    found = find_faults(photos, facts)
    assert found.crossing_groups == {"nest 7": ["train", "val"]}
    assert "1 group lies in more than one split: 'nest 7' is in train and val" in only(found.must_fix)


def test_names_that_differ_only_in_form_are_pointed_out():
    photos, facts = make_data()
    classes = ("a", "b", "A ", "é", "e\u0301", "c")
    assert find_faults(photos, facts, classes=classes).similar_names == [["a", "A "], ["é", "e\u0301"]]
    photos = [replace(photo, label="A " if photo.label == "b" else "a") for photo in photos]
    found = find_faults(photos, facts, classes=("a", "A "))
    assert "classes with nearly the same name: 'a', 'A '" in only(found.warnings)


def test_a_training_is_told_of_similar_names_and_of_one_photo_under_two_labels():
    photos, facts = make_data()
    assert find_doubts(PhotoIndex(Path("/data"), tuple(photos), ("a", "b"), {}), facts) == []
    facts[-1] = replace(facts[-1], sha256=facts[0].sha256)
    similar, conflict = find_doubts(PhotoIndex(Path("/data"), tuple(photos), ("a", "b", "A "), {}), facts)
    assert similar == "classes with nearly the same name: 'a', 'A '. Are they one?"
    assert f"1 photo has more than one label, such as {photos[0].path!r}, {photos[-1].path!r}" in conflict


def test_color_profiles_that_are_ignored_are_pointed_out():
    photos, facts = make_data()
    facts[:3] = [replace(fact, color_profile="Display P3") for fact in facts[:3]]
    found = find_faults(photos, facts)
    assert found.color_profiles == {"Display P3": 3}
    expected = "3 photos have a color profile other than sRGB, which is ignored: Display P3 (3)"
    assert expected in only(found.warnings)


def test_the_dict_is_json_and_holds_every_field():
    photos, facts = make_data()
    facts[3] = replace(facts[3], problem="is truncated")
    place = at(photos, "val/a/0.jpg")
    facts[place] = replace(facts[place], perceptual_hash=facts[0].perceptual_hash)
    found = find_faults(photos, facts)
    plain = json.loads(json.dumps(asdict(found)))
    assert set(plain) == set(found.__dataclass_fields__)
    assert plain["broken"] == [{"path": photos[3].path, "reason": "is truncated"}]
    assert plain["near_duplicates"][0]["other_path"] == "val/a/0.jpg"
    assert plain["sizes"]["max_short_side"] == 480


@pytest.mark.parametrize(
    ("num_train", "expected"),
    [
        ({"a": 1}, ["needs at least 2 classes; there is only 'a'"]),
        ({}, ["needs at least 2 classes; there is none"]),
        ({"a": 1, "b": 2, "c": 0}, ["1 class has no photo in train: 'c'"]),
        ({"a": 1, "b": 1}, []),
    ],
)
def test_what_a_classifier_lacks_to_learn_is_named(num_train, expected):
    found = list(find_gaps_in_training(num_train))
    assert len(found) == len(expected)
    assert all(words in gap for words, gap in zip(expected, found, strict=True))
