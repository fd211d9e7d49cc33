"""Laws of splitting: nobody is on two sides, no group crosses, the same seed gives the same split."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fieldmark.data import splits
from fieldmark.data.index import Photo, PhotoIndex
from fieldmark.data.splits import fold_index, remembered_split, split_gaps, split_index
from fieldmark.errors import DataError


def make_index(*counts: int, split: str = "", root: Path = Path("/data")) -> PhotoIndex:
    photos = [
        Photo(f"{label}/{n}.jpg", str(label), split, "") for label, count in enumerate(counts) for n in range(count)
    ]
    return PhotoIndex(root, tuple(photos), tuple(str(label) for label in range(len(counts))), {})


def split_of(index: PhotoIndex) -> dict[str, str]:
    return {photo.path: photo.split for photo in index.photos}


def divide(index: PhotoIndex, val: float = 0.2, test: float = 0.0, seed: int = 0, groups=None) -> PhotoIndex:
    return split_index(index, val_fraction=val, test_fraction=test, seed=seed, groups=groups)


def crossing(index: PhotoIndex, groups: list[str]) -> set[str]:
    sides: dict[str, set[str]] = {}
    for photo, group in zip(index.photos, groups, strict=True):
        sides.setdefault(group, set()).add(photo.split)
    return {group for group, found in sides.items() if group and len(found) > 1}


COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.floats(0.05, 0.5), st.sampled_from([0.0, 0.1, 0.3]), st.integers(0, 2**40))
def test_each_class_gives_its_share_rounded_and_keeps_one_photo_in_train(counts, val, test, seed):
    assume(sum(counts) - len(counts) >= 2)  # at least two photos can be spared
    index = make_index(*counts)
    divided = divide(index, val, test, seed)
    assert [photo.path for photo in divided.photos] == [photo.path for photo in index.photos]
    assert {photo.split for photo in divided.photos} == {"train", "val"} | ({"test"} if test else set())
    for name, found in divided.counts().items():
        size = counts[int(name)]
        assert found["train"] >= 1
        assert int(size * val + 1e-9) - 1 < found["val"] < size * val + 1
        assert found.get("test", 0) < size * test + 1
    total = Counter(photo.split for photo in divided.photos)
    assert total["val"] <= max(1, round(sum(counts) * val))
    if all(size * (1 - val - test) >= 1 for size in counts):  # then rounding up is never refused
        assert total["val"] == max(1, round(sum(counts) * val))


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.data(), st.integers(0, 9))
def test_no_group_crosses_and_every_class_trains(counts, data, seed):
    index = make_index(*counts)
    names = ["", *"abcdefghijkl"]
    groups = data.draw(st.lists(st.sampled_from(names), min_size=len(index), max_size=len(index)))
    try:
        divided = divide(index, 0.25, 0.1, seed, groups)
    except DataError:
        return  # too few groups to spare one: the next test shows that this is not the rule
    assert not crossing(divided, groups)
    assert all(found["train"] for found in divided.counts().values())
    assert [photo.group for photo in divided.photos] == groups


def test_groups_come_near_the_share_of_every_class():
    index = make_index(60, 60, 60)
    groups = [f"{photo.label} {int(photo.path[2:-4]) // 3}" for photo in index.photos]
    divided = divide(index, 0.2, 0.1, 3, groups)
    for found in divided.counts().values():
        assert abs(found["val"] - 12) <= 3
        assert abs(found["test"] - 6) <= 3


def test_two_large_groups_still_give_one_to_validation():
    index = make_index(10, 10)
    groups = [("a", "b")[int(photo.path[2:-4]) // 5] for photo in index.photos]
    assert Counter(photo.split for photo in divide(index, 0.1, groups=groups).photos) == {"train": 10, "val": 10}


@pytest.mark.parametrize("groups", [None, [str(number % 9) for number in range(60)]])
def test_the_seed_alone_decides(groups):
    index = make_index(20, 20, 20)
    first = divide(index, seed=1, groups=groups)
    assert divide(index, seed=1, groups=groups) == first
    assert divide(index, seed=2, groups=groups) != first


def test_a_split_in_the_data_is_respected_and_only_the_missing_one_made():
    index = make_index(20, 20, split="train")
    given_val = tuple(replace(photo, split="val") for photo in index.photos[:5])
    index = replace(index, photos=(*given_val, *index.photos[5:]))
    assert divide(index) == index
    with_test = divide(index, test=0.2)
    assert with_test.of("val").photos == given_val
    assert len(with_test.of("test")) == 7
    assert len(with_test.of("train")) == 28


def test_undecided_photos_join_train_where_nothing_is_missing_or_follow_their_group():
    photos = [
        Photo(f"{n}.jpg", "ab"[n % 2], split, "") for n, split in enumerate(["train", "train", "val", "", "", ""])
    ]
    index = PhotoIndex(Path("/data"), tuple(photos), ("a", "b"), {})
    assert [photo.split for photo in divide(index).photos] == ["train", "train", "val", "train", "train", "train"]
    groups = ["", "x", "y", "y", "x", ""]
    assert [photo.split for photo in divide(index, groups=groups).photos][3:] == ["val", "train", "train"]


def test_unlabeled_test_photos_stay_where_they_are():
    index = make_index(10, 10, split="train")
    index = replace(index, photos=(*index.photos, Photo("test/1.jpg", None, "test", "")))
    divided = divide(index, test=0.3)
    assert [photo.path for photo in divided.of("test").photos] == ["test/1.jpg"]
    assert len(divided.of("val")) == 4


def test_nothing_to_spare_is_an_error_not_an_empty_validation():
    with pytest.raises(DataError, match="can be kept for val: of 3 photos in 3 groups"):
        divide(make_index(1, 1, 1))
    with pytest.raises(DataError, match=r"can be kept for val.*in 2 groups.*group less"):
        divide(make_index(5, 5), groups=["a"] * 5 + ["b"] * 5)


@settings(max_examples=30, deadline=None)
@given(COUNTS, st.integers(2, 5), st.integers(0, 9))
def test_over_all_folds_each_photo_is_validated_on_once_and_every_class_always_trains(counts, folds, seed):
    assume(max(counts) >= folds)
    index = make_index(*counts)
    index = replace(index, photos=(*index.photos, Photo("test/1.jpg", "0", "test", "")))
    validated: Counter[str] = Counter()
    for fold in range(folds):
        found = fold_index(index, folds=folds, fold=fold, seed=seed, groups=None)
        validated.update(photo.path for photo in found.of("val").photos)
        assert all(count["train"] for count in found.counts().values())
        assert [photo.path for photo in found.of("test").photos] == ["test/1.jpg"]
    assert validated == Counter(photo.path for photo in index.photos[:-1] if counts[int(photo.label)] > 1)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(0, 9))
def test_no_group_crosses_a_fold(data, seed):
    index = make_index(30, 9, 1)
    groups = data.draw(st.lists(st.sampled_from(["", *"abcdef"]), min_size=40, max_size=40))
    assume(len(set(groups) - {""}) >= 3)
    for fold in range(3):
        found = fold_index(index, folds=3, fold=fold, seed=seed, groups=groups)
        assert not crossing(found, groups)
        assert all(count["train"] for count in found.counts().values())


def test_too_many_folds_are_refused():
    with pytest.raises(DataError, match="5 folds need a class of as many photos; the largest has 3"):
        fold_index(make_index(3, 2), folds=5, fold=0, seed=0, groups=None)
    with pytest.raises(DataError, match="3 folds need as many groups; there are 2"):
        fold_index(make_index(4, 4), folds=3, fold=0, seed=0, groups=list("aabbaabb"))


def test_a_class_absent_from_a_split_keeps_its_place_and_is_reported():
    photos = [Photo("a", "x", "train", ""), Photo("b", "y", "train", ""), Photo("c", "y", "val", "")]
    index = PhotoIndex(Path("/data"), (*photos, Photo("d", None, "test", "")), ("x", "y"), {})
    assert split_gaps(index) == [("x", "val")]
    assert index.of("val").label_numbers().tolist() == [1]


def remember(index: PhotoIndex, folder: Path, groups=None, **extra) -> PhotoIndex:
    return remembered_split(
        index, val_fraction=0.2, test_fraction=0.0, seed=0, groups=groups, settings=extra, folder=folder
    )


def test_a_remembered_split_keeps_old_photos_and_assigns_new_ones_to_the_right_totals(tmp_path):
    first = remember(make_index(20, 20), tmp_path / "splits")
    assert first == divide(make_index(20, 20))
    grown = remember(make_index(40, 20, 10), tmp_path / "splits")
    assert split_of(first).items() <= split_of(grown).items()
    assert {name: found["val"] for name, found in grown.counts().items()} == {"0": 8, "1": 4, "2": 2}
    assert remember(make_index(20, 20), tmp_path / "splits") == first
    assert remember(make_index(40, 20, 10), tmp_path / "splits") == grown  # though photos were away in between


def test_a_remembered_split_is_found_again_rather_than_drawn_again(tmp_path):
    first = remember(make_index(20, 20), tmp_path)
    (table,) = tmp_path.iterdir()
    swapped = table.read_text().replace(",val,", ",?,").replace(",train,", ",val,").replace(",?,", ",train,")
    table.write_text(swapped)
    again = split_of(remember(make_index(20, 20), tmp_path))
    assert all(again[path] != split for path, split in split_of(first).items())


def test_other_settings_and_other_roots_have_other_tables(tmp_path):
    remember(make_index(20, 20), tmp_path)
    remember(make_index(20, 20), tmp_path, group_by="pattern")
    remember(make_index(20, 20, root=Path("/elsewhere")), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_group_that_grows_together_does_not_cross(tmp_path):
    index = make_index(12, 12)
    groups = [photo.path for photo in index.photos]
    first = remember(index, tmp_path, groups)
    a = next(photo.path for photo in first.photos if photo.split == "val")
    merged = ["burst" if path in (a, "0/0.jpg", "0/1.jpg", "0/2.jpg") else path for path in groups]
    assert not crossing(remember(index, tmp_path, merged), merged)


def test_a_split_that_cannot_be_kept_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the split cannot be kept in.*XDG_CACHE_HOME"):
        remember(make_index(5, 5), tmp_path / "file" / "folder")


def test_data_that_say_their_splits_need_no_folder_to_keep_them(tmp_path):
    (tmp_path / "file").write_text("")
    index = divide(make_index(5, 5))
    assert remember(index, tmp_path / "file" / "folder").photos == index.photos


def test_groups_by_pattern_are_the_text_in_parentheses():
    index = make_index(2, 2)
    assert splits.groups_by_pattern(index, r"/(\d)") == ["0", "1", "0", "1"]
    assert splits.groups_by_pattern(index, r"^0/(1)") == ["", "1", "", ""]
    with pytest.raises(DataError, match=r"matches no path, such as '0/0.jpg'"):
        splits.groups_by_pattern(index, r"(cam\d+)")


def test_bursts_are_photos_within_a_minute_of_the_one_before():
    times = [100.0, None, 5.0, 65.0, 160.5, 100.0]
    facts = [SimpleNamespace(captured_at=time) for time in times]
    groups = splits.groups_by_capture_time(make_index(6), facts)
    assert groups == ["burst 1", "", "burst 1", "burst 1", "burst 2", "burst 1"]
    with pytest.raises(DataError, match="has an EXIF capture time"):
        splits.groups_by_capture_time(make_index(6), [SimpleNamespace(captured_at=None)] * 6)


def test_groups_by_column_are_those_of_the_table():
    index = make_index(2)
    with pytest.raises(DataError, match="needs a group column"):
        splits.groups_by_column(index)
    index = replace(index, photos=(replace(index.photos[0], group="g"), index.photos[1]))
    assert splits.groups_by_column(index) == ["g", ""]
