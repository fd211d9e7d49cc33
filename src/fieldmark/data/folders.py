"""Which files below a folder are photos, and which class and split the folders give them.

Names are taken as the file system gives them: bytes that are not UTF-8 arrive as lone surrogates (PEP 383) and leave
again as the same bytes.
"""

import functools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fieldmark.errors import DataError

SYSTEM_NAMES = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found"}
# Pillow has no decoder for the first four; the others are drawings, for which it starts another program.
NOT_PHOTOS = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF", "EMF"})
_RAW = "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mrw nef nrw orf pef raf rw2 rwl sr2 srf srw x3f"
RAW_EXTENSIONS = frozenset(f".{name}" for name in _RAW.split())
_OTHER_EXTENSIONS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"})
_RUN_FILES = frozenset({"split.csv", "environment.json", "metrics.jsonl", "summary.json", "last.pt"})
_OUTPUT_MARKS = frozenset({"fieldmark.json", "ensemble.json", "evaluation.json", "CACHEDIR.TAG"})
_OUTPUT_FOLDER = "folder written by Fieldmark"
_SPELLINGS = {"train": "train training", "val": "val valid validation validate dev", "test": "test testing"}
_SPLIT_WORDS = {word: split for split, words in _SPELLINGS.items() for word in words.split()}
_FILLERS = "dataset|data|set|images|image|imgs|photos|pictures|split"
_NUMBERED = re.compile(r"(fold|split|set|part|batch)[\W_]*\w{0,2}", re.IGNORECASE)

NONE = "_none"
"""The class of photos that show none of the classes: a model that names it answers "unknown"."""

Node = tuple[int, int]  # device and number of a folder


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo of a data set."""

    path: str  # relative to the data set's root, "/" on every system; the photo's identity in every table
    label: str | None  # class name; None for unlabeled photos
    split: str  # train, val, test; "" while no split is decided
    group: str  # what must not cross a split; "" for none


@functools.cache
def photo_extensions() -> frozenset[str]:
    """List the extensions of photos, in lower case with their dot: `.jpg`, `.png`, ...

    Those of HEIC, JPEG XL and cameras' raw files belong to them whether they can be read here or not: a photo that
    cannot be read is reported, not passed over.
    """
    from PIL import Image

    extensions = Image.registered_extensions()
    names = {name for name, kind in extensions.items() if kind in Image.OPEN and kind not in NOT_PHOTOS}
    return frozenset(names) | RAW_EXTENSIONS | _OTHER_EXTENSIONS


def natural_key() -> Callable[[str], tuple[bytes, str]]:
    """Make a sort key for paths with "/" and for names: "2" before "10", folder by folder; then the text itself.

    Its bytes say what natsort's key says, in a tenth of the memory: a number is a 2, how many digits it has, and these.
    """
    from natsort import natsort_keygen

    of_part, number, low = natsort_keygen(), re.compile("[0-9]+"), re.compile("[\0-\3]")

    def write_number(digits: str) -> str:
        digits = digits.lstrip("0")
        return f"\2{chr(len(digits))}{digits}"

    def write(name: str) -> str:
        if name.isascii() and name.isprintable():
            return number.sub(lambda found: write_number(found[0]), name)
        # Characters up to 3 come after a 3, so that they do not count as one of ours.
        parts = (write_number(str(p)) if isinstance(p, int) else low.sub("\3\\g<0>", str(p)) for p in of_part(name))
        return "".join(parts)

    write_folder = functools.cache(lambda folder: "".join(f"\1{write(name)}" for name in folder.split("/")))

    def key(path: str) -> tuple[bytes, str]:
        folder, _, name = path.rpartition("/")
        text = f"{write_folder(folder) if folder else ''}\0{write(name)}"
        return text.encode("utf-8", "surrogatepass"), path

    return key


def find_photos(root: Path) -> tuple[list[str], Counter[str]]:
    """List the photos below `root` by relative path, with "/", in natural order; and count what is skipped and why.

    Links to files and folders are followed, except a link to a folder that it lies in. A link to nothing or to itself
    whose name is a photo's counts as a photo: opening it will say that it is missing. What Fieldmark wrote (run
    folders, exports, reports, caches) is skipped. A folder that cannot be listed is a DataError.
    """
    found = list(_walk(root, "", ()))
    photos = sorted((path for path, reason in found if not reason), key=natural_key())
    return photos, Counter(reason for _, reason in found if reason)


def is_photo_path(path: str) -> bool:
    """Whether `find_photos` would take a file by this path, relative and with "/", for a photo."""
    return not is_skipped(path) and _is_photo_name(path)


def is_skipped(path: str) -> bool:
    """Whether `find_photos` would not look at this relative path, with "/", for its name: hidden, or the system's."""
    return any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in path.split("/"))


def require_photos(path: Path | str, names: Sequence[str], ignored: Mapping[str, int]) -> None:
    """Check that a walk found photos; the DataError says what there is instead."""
    if names:
        return
    if not ignored:
        raise DataError(f"{path} is empty: there are no photos in it or in its folders. Check the path")
    found = ", ".join(f"{reason}: {count}" for reason, count in ignored.items())
    raise DataError(f"{path} holds no photos ({found}). Give the folder that holds the class folders")


def quote(names: Sequence[str], most: int = 3) -> str:
    """Quote the first names, and say how many more there are."""
    text = ", ".join(repr(name) for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def _walk(folder: Path, prefix: str, above: tuple[Node, ...]) -> Iterator[tuple[str, str]]:
    """Yield each file's relative path, or a skipped folder's, and why it is no photo: "" for photos."""
    try:
        info = folder.stat()
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}. Make it readable, or move it away") from None
    inside = (*above, (info.st_dev, info.st_ino))
    names = frozenset(entry.name for entry in entries)
    is_run = "recipe.toml" in names and not names.isdisjoint(_RUN_FILES)
    if above and (is_run or not names.isdisjoint(_OUTPUT_MARKS)):
        yield prefix, _OUTPUT_FOLDER
        return
    if above and not entries:
        yield prefix, "empty folder"
    for entry in entries:
        reason = _reason_to_skip(entry, inside, names)
        if not reason and os.path.isdir(entry.path):  # noqa: PTH112, entry.is_dir() raises for a link to itself
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", inside)
        else:
            yield prefix + entry.name, reason


def _reason_to_skip(entry: os.DirEntry[str], inside: tuple[Node, ...], names: frozenset[str]) -> str:
    """Why an entry among `names` is neither a photo nor a folder to look into; "" if it is one of them."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name.lower() in SYSTEM_NAMES:
        return "made by the operating system"
    try:
        info = entry.stat()
    except OSError:  # a link to nothing, or to itself
        return "" if _is_photo_name(entry.name) else "broken link"
    if stat.S_ISDIR(info.st_mode):
        if (info.st_dev, info.st_ino) in inside:
            return "link to a folder that it lies in"
        is_report = entry.name.endswith("_files") and f"{entry.name.removesuffix('_files')}.md" in names
        return _OUTPUT_FOLDER if is_report else ""
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    if not _is_photo_name(entry.name):
        return "not a photo"
    stem, extension = os.path.splitext(entry.name)  # noqa: PTH122
    if extension.lower() in RAW_EXTENSIONS and not names.isdisjoint(
        {stem + e for e in (".jpg", ".JPG", ".jpeg", ".JPEG")}
    ):
        return "raw file of a photo that is there"  # cameras that write both leave them side by side
    return ""


def _is_photo_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in photo_extensions()  # noqa: PTH122, 4 times faster than Path


def split_of(name: str) -> str:
    """Translate a usual name of a split, such as Training, valid or test_images; "" for other names."""
    word = re.sub(r"[\W_]+", "", name.lower())
    return _SPLIT_WORDS.get(word) or _SPLIT_WORDS.get(re.sub(f"({_FILLERS})+$", "", word), "")


def read_folders(root: Path | str, names: Sequence[str], ignored: Counter[str]) -> tuple[list[Photo], str]:
    """Photos by relative path with the class and split that their folders' names give them, and how they were read.

    What is skipped is added to `ignored`; what can be read in two ways is a DataError.
    """
    require_photos(root, names, ignored)
    inner: dict[str, dict[str, None]] = {}  # each folder, and the folders in it that hold photos at any depth
    for parts in (name.split("/", 2) for name in names if "/" in name):
        inner.setdefault(parts[0], {}).update(dict.fromkeys(parts[1:-1]))
    folders = {name: list(found) for name, found in inner.items()}
    splits = {name: split for name in folders if (split := split_of(name))}
    if _has_splits(root, names, folders, splits):
        photos = _read_splits(root, names, splits, ignored)
        ranked = sorted(splits.items(), key=lambda pair: list(_SPELLINGS).index(pair[1]))
        layout = "read as splits: " + ", ".join(f"{split} from {folder}/" for folder, split in ranked)
    else:
        photos = _read_classes(root, names, "", ignored)
        _refuse_wrapped(root, folders)
        _refuse_unknown_splits(root, names, folders)
        layout = f"read as one class per folder{_other_reading(folders, splits)}"
    return photos, layout


def _has_splits(
    root: Path | str, names: Sequence[str], folders: Mapping[str, Sequence[str]], splits: Mapping[str, str]
) -> bool:
    """Whether the folders named train, val and test are splits rather than classes that happen to be called so."""
    others = [name for name in folders if name not in splits]
    if not others:
        return bool(splits)
    train = [name for name in names if splits.get(name.split("/", 1)[0]) == "train"]
    if not train or any(name.count("/") < 2 for name in train):
        return False
    trained = [folder for folder, split in splits.items() if split == "train"]
    classes = {name for folder in trained for name in folders[folder]}
    if any(classes.intersection(folders[folder]) for folder in splits if folder not in trained):
        return True
    first = trained[0]
    outside = sum(name.split("/", 1)[0] in others for name in names)
    raise DataError(
        f"{root} can be read in two ways: {first}/ as the photos to train on, with the classes "
        f"{quote(sorted(classes))} and without {quote(others)} ({outside} photos); or each folder as a "
        f"class, {first!r} too. For the first, move the other folders out; for the second, put all class folders into "
        "one folder named train"
    )


def _read_splits(
    root: Path | str, names: Sequence[str], splits: Mapping[str, str], ignored: Counter[str]
) -> list[Photo]:
    by_split: dict[str, str] = {}
    photos: list[Photo] = []
    for folder, split in splits.items():
        if by_split.setdefault(split, folder) != folder:
            raise DataError(f"{root} has both {by_split[split]}/ and {folder}/ with photos: keep one of them")
        inside = [name for name in names if name.startswith(f"{folder}/")]
        if split == "test":
            photos += [Photo(name, None, split, "") for name in inside if name.count("/") == 1]
            inside = [name for name in inside if name.count("/") > 1]
        photos += _read_classes(root, inside, split, ignored) if inside else []
    ignored["photo beside the split folders"] += sum(name.split("/", 1)[0] not in splits for name in names)
    return photos


def _read_classes(root: Path | str, names: Sequence[str], split: str, ignored: Counter[str]) -> list[Photo]:
    """Photos labeled by the folder below `root`, or below the split's folder; strays beside them are counted."""
    depth = 1 if split else 0
    photos = [Photo(name, name.split("/")[depth], split, "") for name in names if name.count("/") > depth]
    strays = [name for name in names if name.count("/") <= depth]
    if not photos:
        raise DataError(
            f"{root}: no class folders{f' in the {split} folder' if split else ''}, only photos, such as "
            f"{quote(strays, 1)}. Put each photo into a folder named for its class, as in robin/1.jpg"
        )
    ignored["photo beside the class folders"] += len(strays)
    return photos


def _refuse_wrapped(root: Path | str, folders: Mapping[str, Sequence[str]]) -> None:
    """A download that unpacks to one folder around the data set is not a data set of one class."""
    if len(folders) != 1:
        return
    [(folder, within)] = folders.items()
    if any(split_of(name) == "train" for name in within):
        raise DataError(f"{root} holds only {folder!r}, with a train folder in it: give {root}/{folder}")
    if len(within) > 1:
        raise DataError(
            f"{root} holds only {folder!r}, with {len(within)} folders in it: {quote(within)}. If those are "
            f"the classes, give {root}/{folder}; else add a second class beside it"
        )


def _refuse_unknown_splits(root: Path | str, names: Sequence[str], folders: Mapping[str, Sequence[str]]) -> None:
    """Folders such as seg_train/ and seg_test/, or fold1/ and fold2/, are hardly classes."""
    if len(folders) < 2 or not all(folders.values()) or any(name.count("/") == 1 for name in names):
        return
    words = [{word for word in re.findall("[a-z]+", name.lower()) if word in _SPLIT_WORDS} for name in folders]
    has_words = all(words) and any(_SPLIT_WORDS[word] == "train" for found in words for word in found)
    if has_words or (all(_NUMBERED.fullmatch(name) for name in folders) and len(_shared(folders)) > 1):
        raise DataError(
            f"{root} can be read in two ways: {quote(list(folders))} as classes, or as parts of a data set with the "
            f"classes {quote(next(iter(folders.values())))}. For the first, put them into one folder named "
            "train; for the second, name them train, val and test"
        )


def _shared(folders: Mapping[str, Sequence[str]]) -> set[str]:
    """Names of folders that are in each of several folders."""
    return set.intersection(*map(set, folders.values())) if len(folders) > 1 else set()


def _other_reading(folders: Mapping[str, Sequence[str]], splits: Mapping[str, str]) -> str:
    """Return what else the class folders could be, for the layout's sentence."""
    if splits:
        return f"; {quote(list(splits))} too {'is a class' if len(splits) == 1 else 'are classes'}"
    shared = _shared(folders)
    if len(shared) < 2:
        return ""
    return f"; each holds {quote(sorted(shared))}: if those are the classes, name the outer folders train, val, test"
