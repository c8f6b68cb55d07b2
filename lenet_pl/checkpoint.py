"""Checkpoints: written whole or not at all, verified before use, never able to run code."""

import contextlib
import difflib
import io
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins import CheckpointIO

from lenet_pl.atomic import write_atomic
from lenet_pl.errors import UsageError

# What Trainer.save_checkpoint writes for LitLeNet; restoring a file without these would fail far from here.
_KEYS = {"state_dict": dict, "hyper_parameters": dict, "global_step": int, "pytorch-lightning_version": str}
_FIT = "python -m lenet_pl fit --config configs/lenet.yaml"
_REMEDY = f"\nGive another one with --ckpt_path, or train one: {_FIT}"


class CheckpointError(UsageError):
    """A checkpoint is missing or unfit for use; the text gives name, cause and remedy in at most 3 lines."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning plugin that saves with :func:`write_atomic` and loads with :func:`load`; local files only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``; raises every OSError, and then a previous file is intact."""
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: a local file has none.")
        _refuse_url(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        for leftover in Path(path).parent.glob(f".{Path(path).name}.*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        write_atomic(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Is :func:`load`: ``weights_only`` is ignored, for it is always true."""
        return load(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes the file ``path`` if there is one."""
        Path(path).unlink(missing_ok=True)


def load(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint after verifying every byte of it that matters; runs no code from it.

    Args:
        path: A local file.
        map_location: Where the tensors go, as for ``torch.load``.

    Raises:
        CheckpointError: ``path`` is an URL, no file, not readable, damaged, refused by ``weights_only=True``,
            or not a checkpoint of this package.
    """
    _refuse_url(path)
    name = f"Checkpoint {str(path)!r}"
    try:
        if not Path(path).is_file():  # a pipe or a device would be read for ever
            raise CheckpointError(f"{name} does not exist or is no file.{_REMEDY}")
        with Path(path).open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about foreign files: an error follows
            content = torch.load(_verified(file), map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{name} cannot be read: {e.strerror or e}.{_REMEDY}") from e
    except pickle.UnpicklingError as e:
        code = re.search(r"GLOBAL (\S+)", str(e))
        why = f"would run code ({code[1]})" if code else "holds more than tensors and plain values"
        raise CheckpointError(f"{name} {why}: refused, nothing was executed.{_REMEDY}") from e
    except Exception as e:  # BadZipFile, EOFError, RuntimeError, struct.error, …: there is no one error
        line = (str(e) or type(e).__name__).splitlines()[0][:120].rstrip(".")
        raise CheckpointError(f"{name} is damaged, cut off or no checkpoint: {line}.{_REMEDY}") from e
    fields = content if isinstance(content, dict) else {}
    if lacking := [key for key, kind in _KEYS.items() if not isinstance(fields.get(key), kind)]:
        raise CheckpointError(f"{name} is not one of lenet_pl: it lacks {', '.join(lacking)}.{_REMEDY}")
    return fields


def _verified(file: IO[bytes]) -> io.BytesIO:
    """Copies a zip archive, checking the CRC of every member.

    ``torch.load`` ignores the CRCs and reads headers in its own way: a flipped directory attribute makes it leave a
    tensor unfilled, which ``ZipFile.testzip`` cannot see. So it gets this copy, made only of what was verified.
    """
    magic, copy = file.read(4), io.BytesIO()
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile("it does not begin like one and was not opened" if magic else "it is empty")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        if not any(name.endswith("/data.pkl") for name in source.namelist()):
            raise zipfile.BadZipFile("torch.save did not make it, it has no data.pkl")
        for member in source.infolist():
            if member.compress_type != zipfile.ZIP_STORED:  # torch.save does not compress: perhaps a zip bomb
                raise zipfile.BadZipFile(f"{member.filename!r} is compressed")
            target.writestr(zipfile.ZipInfo(member.filename), source.read(member))
    copy.seek(0)
    return copy


def find(name: str | Path, root: Path = Path("runs")) -> Path:
    """Returns the file that ``--ckpt_path`` means; looks at no content.

    Args:
        name: A file. Or ``best``, ``best.ckpt``, ``last``, ``last.ckpt``: unless there is such a file, the
            one written last in ``root/<name>/version_N/checkpoints/``; if equal, the larger N.
        root: The folder of the runs.

    Raises:
        CheckpointError: There is none (the text lists those there are), or ``name`` is an URL.
    """
    _refuse_url(name)
    path, wanted = Path(name), f"{str(name).removesuffix('.ckpt')}.ckpt"
    try:
        if path.is_file():
            return path
        stamped = [
            (p.stat().st_mtime_ns, int(p.parts[-3][8:]), p)
            for p in root.glob("*/version_*/checkpoints/*.ckpt")
            if p.is_file() and p.parts[-3][8:].isdecimal()
        ]
        runs = [p for *_, p in sorted(stamped, reverse=True)]
        around = [*path.glob("checkpoints/*.ckpt"), *path.glob("*.ckpt"), *path.parent.glob("*.ckpt")]
        near = sorted(p for p in around if p.is_file())
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise CheckpointError(f"Checkpoint {str(name)!r} cannot be read: {getattr(e, 'strerror', e)}.{_REMEDY}") from e
    what = f"Checkpoint {str(name)!r} does not exist or is no file"
    if wanted in ("best.ckpt", "last.ckpt"):
        if found := [p for p in runs if p.name == wanted]:
            return found[0]
        what += f", and no run under {str(root)!r} has a {wanted}"
    known = list(dict.fromkeys(map(str, [*near, *runs])))
    shown = difflib.get_close_matches(str(name), known) or known[:3]
    there = f"Give one of these: {', '.join(shown)}" if shown else f"None exist yet; this makes one: {_FIT}"
    raise CheckpointError(f"{what}.\n{there}")


def run_folder(path: Path) -> Path | None:
    """Returns the run folder that the checkpoint ``path`` lies in, if it lies in one."""
    path = path if path.parent.name else path.absolute()  # within the folder, such as "last.ckpt"
    folder = path.parent.parent
    return folder if path.parent.name == "checkpoints" and (folder / "config.yaml").is_file() else None


def newest_sound(run_folder: Path) -> Path | None:
    """Returns the checkpoint of a run that got furthest (``global_step``) among those that load, if any."""
    sound = []
    for path in run_folder.glob("checkpoints/*.ckpt"):
        with contextlib.suppress(CheckpointError):
            sound.append((load(path)["global_step"], path.stat().st_mtime_ns, path))
    return max(sound)[2] if sound else None


def _refuse_url(path: str | Path) -> None:
    if re.match(r"[A-Za-z][\w+.:-]+:/|.*://", str(path)):  # Path("http://x") is "http:/x"
        raise CheckpointError(f"Checkpoint {str(path)!r} is an URL: download it, only local files are read.")
