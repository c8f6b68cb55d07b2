"""The layout of a run folder, ``runs/<name>/version_N/``, and which checkpoint a word such as ``best`` means.

Only this module knows the names in a run folder. It needs neither torch nor Lightning.
"""

import contextlib
import csv
import difflib
import glob
import io
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from lenet_pl import __version__
from lenet_pl.atomic import write_atomic
from lenet_pl.errors import CheckpointError, require, shorten

CONFIG = "config.yaml"  # every setting of the run
RESULTS = "results.csv"  # a row for each epoch
SCORE = "test.json"  # the accuracy on the test images
REPORT = "report.html"  # the page of the report
FINISHED = "finished.txt"  # why the training ended; absent until then
CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best.ckpt"  # of the epoch with the highest validation accuracy
LAST = f"{CHECKPOINTS}/last.ckpt"  # of the newest finished epoch
DEFAULT_NAME = "lenet"  # of a run whose command names neither a config file nor --name
TRAIN = "python -m lenet_pl fit --config lenet"  # the command that makes the first checkpoint
METRICS = ("train_loss", "train_acc", "val_loss", "val_acc")
COLUMNS = ("epoch", "step", "lr", *METRICS, "seconds")

# The weights of the package: python scripts/pretrained.py makes the file.
PRETRAINED = Path(__file__).with_name("pretrained.ckpt")


def new(parent: Path) -> Path:
    """Makes the next free ``version_N`` below ``parent``, which is ``runs/<name>``."""
    taken = [version(folder) for folder in parent.glob("version_*")]
    number = max(taken, default=-1) + 1
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run was faster, or a file is in the way of ``parent``
            if not folder.exists():
                raise
            number += 1


def remove(folder: Path) -> None:
    """Deletes a run folder, and then the two folders above it if they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError):  # it is not empty
            parent.rmdir()


def version(folder: Path) -> int:
    """Returns the N of ``version_N``, or -1 for a folder of another name."""
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def all_runs(root: Path, name: str | None = None) -> list[Path]:
    """Returns the run folders below ``root``, the folder ``runs``, or only those called ``name``; the newest first.

    The newest run is the one that was begun or resumed last.
    """
    found = []
    for folder in root.glob(f"{glob.escape(name) if name else '*'}/version_*"):
        # Path.is_file would raise an error in a folder without permission.
        files = list(filter(os.path.isfile, (folder / CONFIG, folder / BEST, folder / LAST)))
        if files and version(folder) >= 0:
            found.append((_begun(files), version(folder), folder))
    return [folder for *_, folder in sorted(found, reverse=True)]


def _begun(files: list[Path]) -> float:
    """Returns when a run was begun or resumed, in seconds since 1970: the time in its config.yaml.

    An older run has none there, so the time of its newest file counts, which some ways of copying change.
    """
    with contextlib.suppress(OSError, ValueError), files[0].open(encoding="utf-8", errors="replace") as file:
        return datetime.fromisoformat(file.readline(300).rstrip(".\n").rpartition(" at ")[2]).timestamp()
    return max(path.stat().st_mtime for path in files)


def folder_of(ckpt_path: Path) -> Path | None:
    """Returns the run folder in which a checkpoint lies, or None."""
    # A relative path is shorter in messages, so it stays one, except inside the run folder.
    is_inside = not ckpt_path.parent.parent.name
    parent = ckpt_path.absolute().parent if is_inside else ckpt_path.parent
    files = (parent.parent / CONFIG, parent.parent / RESULTS)  # stock Lightning has neither
    is_run = parent.name == CHECKPOINTS and any(map(os.path.isfile, files))
    return parent.parent if is_run else None


def beside(ckpt_path: Path) -> Path:
    """Returns the folder for what is made from a checkpoint: its own, or the current one for the package's weights."""
    return Path() if ckpt_path.samefile(PRETRAINED) else ckpt_path.parent


def scored_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint by which a run is scored: the best, or without validation the last, or None."""
    return next(filter(os.path.isfile, (folder / BEST, folder / LAST)), None)


def find(word: str | Path, root: Path = Path("runs"), name: str | None = None) -> Path:
    """Returns the file that ``--ckpt_path`` means, without opening it.

    Args:
        word: A file; or, if there is no such file, ``best``, ``last`` or ``pretrained``, also with ``.ckpt``.
        root: The folder ``runs``.
        name: The name of the run that ``best`` and ``last`` mean; by default the newest of all runs.

    Raises:
        CheckpointError: If there is no such file, or ``word`` is a URL. The message lists the files that exist.
    """
    refuse_url(word)
    word = str(word)
    path, kind = Path(word), word.removesuffix(".ckpt")
    try:
        if path.is_file():
            return path
        if kind == "pretrained":
            return PRETRAINED
        runs = all_runs(root, name)
        around = [*path.glob("checkpoints/*.ckpt"), *path.glob("*.ckpt"), *path.parent.glob("*.ckpt")]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"Checkpoint {word!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    of_name = f" of the name {name!r}" if name else ""
    problem = f"Checkpoint {word!r} does not exist or is not a file"
    if kind in ("best", "last"):
        problem = f"Checkpoint {word!r} does not exist: there is no run{of_name} in {str(root)!r}"
        if runs:
            found = scored_checkpoint(runs[0]) if kind == "best" else runs[0] / LAST
            if found and found.is_file():
                return found
            lacks = f"the newest run{of_name}, {runs[0]}, has no checkpoint of a finished epoch"
            problem = f"Checkpoint {word!r} does not exist: {lacks}"
    scored = [scored_checkpoint(folder) for folder in all_runs(root)]
    known = [path for path in (*around, *scored) if path and path.is_file()]
    names = list(dict.fromkeys(map(str, known)))
    similar = ", ".join(difflib.get_close_matches(word, names) or names[:3])
    advice = f"There is none yet but the package's, pretrained; this trains one: {TRAIN}"
    if names:
        advice = f"Give one of these: {similar}"
    raise CheckpointError(f"{problem}.\n{advice}")


def refuse_url(path: str | Path) -> None:
    """Raises CheckpointError if ``path`` is a URL: nothing is downloaded, because anybody could have made the file."""
    is_url = re.match(r"[A-Za-z][\w+.:-]+:/|.*://", str(path))  # Path("http://x") is "http:/x"
    if is_url and not os.path.isdir(str(path).split("/")[0]):  # noqa: PTH112 (a folder's name may end in a colon)
        raise CheckpointError(
            f"Checkpoint {str(path)!r} is a URL: download it first, because only local files are read"
        )


def versions() -> str:
    """Returns the main versions on which the bits of a result depend."""
    packages = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "lightning"))
    return f"lenet_pl {__version__}, {packages}, Python {platform.python_version()}"


def read_results(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of results.csv, except for a last row that a crash cut short.

    Raises:
        UsageError: If somebody has changed its columns, or it holds something else than numbers.
    """
    path = folder / RESULTS
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:  # Excel adds a byte order mark
        reader = csv.DictReader(file)
        expected = ",".join(COLUMNS)
        found = ",".join(reader.fieldnames or COLUMNS)
        require(found == expected, f"the first line of {path} is {shorten(found, 80)!r}", f"{expected!r}")
        rows = [row for row in reader if row["seconds"]]
    for number, row in enumerate(rows, 2):
        try:
            row["epoch"] = str(int(float(row["epoch"])))  # a spreadsheet may have made 1.0 of 1
            are_numbers = all(value == "" or float(value) < math.inf for value in row.values())
        except (TypeError, ValueError):
            are_numbers = False
        require(are_numbers, f"line {number} of {path} is {shorten(','.join(map(str, row.values())), 80)!r}", "numbers")
    return sorted(rows, key=lambda row: int(row["epoch"]))


def write_results(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces results.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / RESULTS, text.getvalue().encode())
