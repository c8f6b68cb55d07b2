"""Finds and opens a user's pictures; ``prepare`` then turns them into what the net was trained on."""

import contextlib
import glob
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from lenet_pl.names import one_line

MARK = "lenet_pl"  # the text "Software" of every PNG that this program writes for its user
MAX_PIXELS = 250_000_000  # phones take up to 200 megapixels; so many pixels take 1 GB of memory
MAX_TEXT = MAX_PIXELS  # bytes of text in a PNG: they may take as much memory as its grey pixels
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # without EPS, for which Pillow would start Ghostscript
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS)
_LOCK = threading.Lock()


def find(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns the pictures that a user names, each once, and prints a line about files that are not read.

    Folders are searched with their subfolders, but without hidden ones. A file in a folder, or one that a pattern
    matches, counts if it has the suffix of a picture and was not written by this program. A file that the user
    names directly always counts.

    Args:
        images: A file, a folder, or a pattern such as ``*.png`` where nothing has that name; or several of them.

    Raises:
        ValueError: If a name is empty or does not exist, or if there is no picture at all.
    """
    names = [images] if isinstance(images, str | Path) else list(images)
    if "" in names:  # such as an unset variable of a shell; Path("") would be the current folder
        raise ValueError("the name of a picture is empty; give a picture or a folder")
    found: dict[Path, Path] = {}  # by absolute path
    reasons: Counter[str] = Counter()  # why files are not read
    for name in names:
        # Path.expanduser would raise an error for an unknown user.
        path = Path(name if os.path.lexists(name) else os.path.expanduser(name))  # noqa: PTH111
        for file in _files(path):
            reason = _why_not(file, is_named=file == path)
            if reason:
                reasons[reason] += 1
            else:
                found.setdefault(file.absolute(), file)
    kinds = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common(6))
    summary = f"files that are not read: {reasons.total():,} ({kinds})" if reasons else "there are no files"
    if not found:
        where = ", ".join(map(one_line, names))
        raise ValueError(f"{where}: no pictures there; expected files named {' '.join(sorted(SUFFIXES))}; {summary}")
    if reasons:
        print(summary)
    return list(found.values())


def _files(path: Path) -> list[Path]:
    """Returns the files that a name stands for: itself, those below a folder, or those that match a pattern."""
    if os.path.isfile(path):  # noqa: PTH113 (no error for any name); a pipe would be read for ever
        return [path]
    if os.path.isdir(path):  # noqa: PTH112
        return _below(path)
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (a pattern may be absolute)
    if not matches or matches == [str(path)]:
        raise ValueError(f"{one_line(path)}: no such file or folder; give a picture or a folder")
    found: list[Path] = []
    for match in map(Path, matches):
        found += _below(match) if os.path.isdir(match) else [match]  # noqa: PTH112
    return found


def _below(top: Path) -> list[Path]:
    """Returns the files below a folder that are not hidden, and the folders that cannot be read."""
    found: list[Path] = []
    errors: list[OSError] = []
    seen: set[str] = set()  # folders, because links may lead round in a circle
    for folder, subfolders, names in os.walk(top, onerror=errors.append, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found + [Path(error.filename) for error in errors])


def _why_not(file: Path, is_named: bool) -> str:
    """Returns why a file is not read, or nothing if it is a picture of the user's, or named by the user."""
    if not os.path.isfile(file):  # noqa: PTH113 (no error for any name)
        return "no readable file or folder"  # such as a link to a file that is gone
    if is_named:
        return ""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        return one_line(suffix) or "no suffix"
    with contextlib.suppress(Exception), _limits(), Image.open(file, formats=["PNG"]) as picture:
        if picture.info.get("Software") == MARK:  # such as an earlier predictions.png
            return f"written by {MARK}"
    return ""  # loading it will tell whether it is damaged


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Sets the limits against decompression bombs for one thread at a time, because they hold for the whole process."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata in a picture that can be read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = before


def load(path: Path) -> Image.Image:
    """Opens a picture: its first frame, turned as its EXIF data say.

    A large JPEG is decoded at 1/2 to 1/8 of its size, but to no less than 1024 pixels.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no picture or damaged, or if it has over ``MAX_PIXELS`` pixels.
    """
    try:
        with _limits(), Image.open(path, formats=_FORMATS) as picture:
            picture.draft(None, (1024, 1024))  # decodes a photo several times faster
            return ImageOps.exif_transpose(picture)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"picture too large: over {MAX_PIXELS:,} pixels; scale it down") from None
    except UnidentifiedImageError:
        raise ValueError(f"not a picture, or none of {', '.join(_FORMATS)}; convert it to PNG") from None
    except Exception as error:  # for damaged files the decoders raise anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"damaged picture: {error}; save it again") from error
