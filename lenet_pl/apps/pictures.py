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

from lenet_pl.apps.prepare import SIDE, flatten, resize, to_uint8
from lenet_pl.names import one_line

__all__ = ["SIDE", "SUFFIXES", "find", "flatten", "load", "resize", "to_uint8"]

MARK = "lenet_pl"  # the text "Software" of every PNG that this program writes for its user
MAX_PIXELS = 250_000_000  # phones take up to 200 megapixels; so many pixels take 1 GB of memory
MAX_TEXT = MAX_PIXELS  # bytes of text in a PNG: they may take as much memory as its grey pixels
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # without EPS, for which Pillow would start Ghostscript
SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS)
_OURS = f"written by {MARK}"
_LOCK = threading.Lock()


def find(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Finds the pictures that a user names, and prints one line about files in folders that are not read.

    Args:
        images: A file, a folder or a pattern such as ``photos/*.jpg``, or several of them. A name that exists is never
            read as a pattern. Folders are searched with their subfolders, but without hidden files and folders.

    Returns:
        The pictures, each once, in the order of ``images`` and sorted within a folder. A file that is named itself is
        returned whatever it is. Files in a folder or of a pattern need the suffix of a picture, and pictures that
        this program wrote are left out.

    Raises:
        ValueError: If a name does not exist, or if there is no picture at all.
    """
    names = [images] if isinstance(images, str | Path) else list(images)
    found: dict[str, Path] = {}  # by absolute path
    not_read: dict[str, str] = {}  # absolute path: the reason
    for name in names:
        try:
            named, listed = _meant(Path(name))
        except OSError as error:
            raise ValueError(f"{one_line(name)}: {error.strerror}") from error
        for file in listed:
            if reason := _why_not(file):
                not_read[_key(file)] = reason
            else:
                named.append(file)
        for file in named:
            found.setdefault(_key(file), file)
    reasons = Counter(reason for key, reason in not_read.items() if key not in found)
    summary = _summary(reasons)
    if not found:
        where = ", ".join(map(one_line, names))
        raise ValueError(
            f"{where}: no pictures there; expected files named {' '.join(sorted(SUFFIXES))}"
            + (f"; {summary}" if summary else "")
        )
    if summary:
        print(summary)
    return list(found.values())


def _key(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 (resolve() would follow links)


def _meant(path: Path) -> tuple[list[Path], list[Path]]:
    """Returns the file that is named itself, and the files that a folder or a pattern stands for.

    Raises:
        OSError: If the name is too long, or a folder may not be read.
        ValueError: If there is no such file or folder, and nothing that fits the pattern.
    """
    if not path.exists():
        path = Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for a user who does not exist)
    if path.is_file():
        return [path], []
    if path.is_dir():
        return [], _below(path)
    listed: list[Path] = []
    for match in map(Path, sorted(glob.glob(str(path), recursive=True))):  # noqa: PTH207 (Path.glob: no absolute ones)
        if match.is_dir():
            listed += _below(match)
        elif match.is_file():  # no pipe, which would be read for ever
            listed.append(match)
    if not listed:
        raise ValueError(f"{one_line(path)}: no such file or folder; give a picture, a folder or a pattern")
    return [], listed


def _below(folder: Path) -> list[Path]:
    """Lists the files in a folder and its subfolders, sorted, without hidden ones."""
    files = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]  # os.walk goes into what is left
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _why_not(file: Path) -> str:
    """Returns why a file in a folder is not read, or nothing if it is a picture of the user's."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        return one_line(suffix) or "no suffix"
    return _OURS if suffix == ".png" and _is_ours(file) else ""


def _summary(reasons: Counter[str]) -> str:
    """Returns a line such as ``not read: 3 files (.heic 2, .avif 1)``, or nothing where every file is read."""
    if not reasons:
        return ""
    total = reasons.total()
    most_first = sorted(reasons.items(), key=lambda item: (item[0] != _OURS, -item[1], item[0]))
    parts = [f"{reason} {n}" for reason, n in most_first[:6]]
    if len(most_first) > len(parts):
        parts.append("…")
    return f"not read: {total:,} file{'s' if total > 1 else ''} ({', '.join(parts)})"


def _is_ours(path: Path) -> bool:
    """Tells whether this program wrote a PNG, such as an earlier predictions.png."""
    with contextlib.suppress(Exception), _limits(), Image.open(path, formats=["PNG"]) as picture:
        return picture.info.get("Software") == MARK
    return False  # a damaged file: loading it will tell


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Sets this module's limits against decompression bombs, for one thread at a time.

    Pillow's limits and Python's warning filters hold for the whole process, so both are set back afterwards.
    """
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
        if "MAX_TEXT" in str(error):
            raise ValueError(f"picture with over {MAX_TEXT:,} bytes of text; save it again without them") from None
        raise ValueError(f"damaged picture: {error}; save it again") from error
