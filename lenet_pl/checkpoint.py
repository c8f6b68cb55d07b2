"""Checkpoint files: when they are written, whole or not at all; verified before use, so that none can run code."""

import io
import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO

from lenet_pl import runs
from lenet_pl.atomic import write_atomic
from lenet_pl.errors import CheckpointError, Failure

# What Lightning writes for any module that saves its hyperparameters.
KEYS = {"state_dict": dict, "hyper_parameters": dict, "global_step": int, "pytorch-lightning_version": str}
# What this package needs as well: the first to rebuild data and net, the second to resume a training.
OURS = {"datamodule_hyper_parameters": dict, "seed": int, "epoch": int}
_TRAINING = {"loops": dict, "optimizer_states": list}
# How our own checkpoints are written: after each epoch, over the previous file.
EACH_EPOCH: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
_REMEDY = f".\nGive another file with --ckpt_path, or train one: {runs.TRAIN}"


class AtomicCheckpointIO(CheckpointIO):
    """A Lightning plugin for local files that saves with ``write_atomic`` and loads with :func:`load`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes ``checkpoint`` to ``path``. If that fails, it raises an OSError, and a previous file is intact."""
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: expected None for a local file")
        runs.refuse_url(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getvalue()
        try:  # the state of a callback could make a file that would be refused when it is read
            torch.load(io.BytesIO(content), weights_only=True)
        except pickle.UnpicklingError as error:
            raise Failure(
                f"{path}: a callback, optimizer or hyperparameter has a value of the kind "
                f"{_refused_kind(error) or 'unknown'}, which no checkpoint may hold. Use plain numbers, texts, tensors"
            ) from error
        write_atomic(Path(path), content)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Calls :func:`load`, for which ``weights_only`` is always true, whatever is given here."""
        return load(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes the file ``path`` if there is one."""
        Path(path).unlink(missing_ok=True)


def load(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint, to ``map_location``, after verifying every byte that matters. It runs no code from the file.

    Raises:
        CheckpointError: If ``path`` is a URL, not a file, unreadable, damaged, refused by ``weights_only=True``, or not
            a checkpoint of Lightning.
    """
    runs.refuse_url(path)
    name = f"Checkpoint {str(path)!r}"
    if not os.path.isfile(path):  # noqa: PTH113 (no error for any name); reading a pipe or a device might never end
        raise CheckpointError(f"{name} does not exist or is not a file{_REMEDY}")
    try:
        with Path(path).open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign files before it raises an error
            content: dict[str, Any] = torch.load(_verified(file), map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}{_REMEDY}") from error
    except pickle.UnpicklingError as error:
        kind = _refused_kind(error)
        why = f"would run code ({kind})" if kind else "holds more than tensors and plain values"
        raise CheckpointError(f"{name} {why}: it was refused, and nothing was executed{_REMEDY}") from error
    except Exception as error:  # BadZipFile, EOFError, RuntimeError, struct.error …: they have no common parent
        line = (str(error) or type(error).__name__).splitlines()[0][:120].rstrip(".")
        raise CheckpointError(f"{name} is damaged, cut off or not a checkpoint: {line}{_REMEDY}") from error
    _require(content, KEYS, name)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if isinstance(content.get(key), dict):  # a stock LightningCLI adds names such as _instantiator
            content[key] = {name: value for name, value in content[key].items() if not name.startswith("_")}
    return content


def _refused_kind(error: pickle.UnpicklingError) -> str | None:
    """Returns the class or function that ``weights_only=True`` has refused, if torch names it."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return named[1] if named else None


def load_ours(path: Path, resume: bool) -> dict[str, Any]:
    """Calls :func:`load` for a checkpoint of this package. To ``resume`` a training needs more than the weights.

    Raises:
        CheckpointError: As :func:`load`, and if the file lacks what this package writes.
    """
    content = load(path)
    _require(content, OURS | (_TRAINING if resume else {}), f"Checkpoint {str(path)!r}")
    return content


def fill(module: LightningModule, content: dict[str, Any], path: str | Path) -> None:
    """Gives a module the weights in the content of a checkpoint, which is that of the file ``path``.

    Raises:
        CheckpointError: If they are those of another net.
    """
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        difference = str(error).splitlines()[1].strip()[:150]
        raise CheckpointError(
            f"Checkpoint {str(path)!r} has weights that do not fit the net in its settings: {difference}{_REMEDY}"
        ) from error


def _require(content: Any, keys: dict[str, type], name: str) -> None:
    fields = content if isinstance(content, dict) else {}
    lacking = [key for key, kind in keys.items() if not isinstance(fields.get(key), kind)]
    if lacking:
        what = "holds no training to resume" if lacking[0] in _TRAINING else "was not written by lenet_pl"
        raise CheckpointError(f"{name} {what}: it lacks {', '.join(lacking)}{_REMEDY}")


def _verified(file: IO[bytes]) -> io.BytesIO:
    """Copies a zip archive and checks the CRC of every member.

    ``torch.load`` ignores the CRCs, and it reads headers in its own way: a flipped bit in the archive's directory can
    make it leave a tensor unfilled, which ``ZipFile.testzip`` cannot see. So it gets this copy, which holds only
    verified content.
    """
    magic, copy = file.read(4), io.BytesIO()
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile("it does not begin like one and was not opened" if magic else "it is empty")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(copy, "w") as target:
        if not any(name.endswith("/data.pkl") for name in source.namelist()):
            raise zipfile.BadZipFile("torch.save did not make it, because it has no data.pkl")
        for member in source.infolist():
            if member.compress_type != zipfile.ZIP_STORED:  # torch.save does not compress, so this could be a zip bomb
                raise zipfile.BadZipFile(f"{member.filename!r} is compressed")
            target.writestr(zipfile.ZipInfo(member.filename), source.read(member))
    copy.seek(0)
    return copy


def was_cut_short(trainer: Trainer) -> bool:
    """Says whether a callback, such as a Timer, has ended the training within this epoch or before its first step.

    Such an epoch does not count: a resumed run trains it again. An epoch that ``max_steps`` cuts short does count,
    because the user asked for the weights at that step.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    is_asked_for = 0 < trainer.max_steps <= trainer.global_step
    return trainer.should_stop and not is_asked_for and (batches.current.ready == 0 or not batches.is_last_batch)


class BestCheckpoint(ModelCheckpoint):
    """Writes best.ckpt: the epoch with the highest ``val_acc``, of equal ones the earliest; none without validation."""

    def __init__(self) -> None:
        super().__init__(filename=Path(runs.BEST).stem, monitor="val_acc", mode="max", **EACH_EPOCH)
        self.validated_step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes which weights have the score."""
        self.validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves if that was the best epoch, and if its last weights are those that were validated."""
        if self.validated_step == trainer.global_step and not was_cut_short(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Starts the search afresh if best.ckpt is missing, damaged, or of an epoch that is trained again.

        Otherwise the old score would stay without its file, and perhaps no later epoch would beat it.
        """
        try:
            epoch = load_ours(Path(str(self.dirpath), Path(runs.BEST).name), resume=True)["epoch"]
        except CheckpointError:
            epoch = math.inf
        if epoch > checkpoint["epoch"]:
            checkpoint["callbacks"].pop(self.state_key, None)


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after each epoch. Lightning's ``save_last`` writes only when it saves another checkpoint."""

    def __init__(self) -> None:
        super().__init__(filename=Path(runs.LAST).stem, **EACH_EPOCH)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves, unless the epoch was cut short."""
        if not was_cut_short(trainer):
            super().on_train_epoch_end(trainer, pl_module)
