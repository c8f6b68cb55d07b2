"""Checkpoint files: written whole or not at all, verified before use, never able to run code."""

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
from lenet_pl.errors import CheckpointError
from lenet_pl.runs import refuse_url

# What Lightning writes for any module that saves its hyperparameters.
_KEYS = {"state_dict": dict, "hyper_parameters": dict, "global_step": int, "pytorch-lightning_version": str}
# What this package needs beside that: to build data and net anew, and to go on with a training.
_OURS = {"datamodule_hyper_parameters": dict, "seed": int, "epoch": int}
_TRAINING = {"loops": dict, "optimizer_states": list}
_REMEDY = ".\nGive another file with --ckpt_path, or train one: python -m lenet_pl fit --config lenet.yaml"


class AtomicCheckpointIO(CheckpointIO):
    """A Lightning plugin that saves with ``write_atomic`` and loads with :func:`load`; local files only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``; where that fails it raises an OSError and a previous file is intact."""
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: a local file has none")
        refuse_url(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        for leftover in Path(path).parent.glob(f".{Path(path).name}.*.tmp"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        write_atomic(Path(path), buffer.getvalue())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Calls :func:`load`; ``weights_only`` is always true, whatever is given."""
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
        CheckpointError: If ``path`` is a URL, no file, unreadable, damaged, refused by ``weights_only=True``, or not a
            checkpoint of Lightning.
    """
    refuse_url(path)
    name = f"Checkpoint {str(path)!r}"
    try:
        if not Path(path).is_file():  # a pipe or a device could be read for ever
            raise CheckpointError(f"{name} does not exist or is no file{_REMEDY}")
        with Path(path).open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign files, and an error follows
            content = torch.load(_verified(file), map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}{_REMEDY}") from error
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"would run code ({code[1]})" if code else "holds more than tensors and plain values"
        raise CheckpointError(f"{name} {why}: it was refused, nothing was executed{_REMEDY}") from error
    except Exception as error:  # BadZipFile, EOFError, RuntimeError, struct.error …: they have no common parent
        line = (str(error) or type(error).__name__).splitlines()[0][:120].rstrip(".")
        raise CheckpointError(f"{name} is damaged, cut off or no checkpoint: {line}{_REMEDY}") from error
    _require(content, _KEYS, name)
    fields: dict[str, Any] = content
    return fields


def load_ours(path: Path, resume: bool) -> dict[str, Any]:
    """Calls :func:`load` for a checkpoint of this package.

    Args:
        path: A local file.
        resume: Whether a training is to go on from it, which takes more than the weights.

    Raises:
        CheckpointError: Also if it lacks what this package writes.
    """
    content = load(path)
    _require(content, _OURS | (_TRAINING if resume else {}), f"Checkpoint {str(path)!r}")
    return content


def _require(content: Any, keys: dict[str, type], name: str) -> None:
    fields = content if isinstance(content, dict) else {}
    lacking = [key for key, kind in keys.items() if not isinstance(fields.get(key), kind)]
    if lacking:
        what = "holds no training to go on with" if lacking[0] in _TRAINING else "is not one of lenet_pl"
        raise CheckpointError(f"{name} {what}: it lacks {', '.join(lacking)}{_REMEDY}")


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
            if member.compress_type != zipfile.ZIP_STORED:  # torch.save does not compress: this could be a zip bomb
                raise zipfile.BadZipFile(f"{member.filename!r} is compressed")
            target.writestr(zipfile.ZipInfo(member.filename), source.read(member))
    copy.seek(0)
    return copy
