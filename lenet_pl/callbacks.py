"""What a run writes and prints: its folder, a row and a line for each epoch, the layers, a progress bar."""

import inspect
import math
import time
from pathlib import Path
from typing import Any

import rich
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Column, Table
from rich.text import Text

from lenet_pl import runs
from lenet_pl.atomic import write_atomic
from lenet_pl.lenet import layers


class RunFolder(Callback):
    """Writes the run folder: config.yaml, and for each epoch a row of results.csv. It also prints a line each epoch.

    Args:
        parent: ``runs/<name>``; a new run gets the next free ``version_N`` in it.
        config: The complete configuration, as YAML.
        resumed: The folder of the run to resume, if any.
    """

    takes_blocks = True  # it looks only at epochs, see blocks.py

    def __init__(self, parent: Path, config: str, resumed: Path | None = None) -> None:
        self.parent, self.config, self.resumed = parent, config, resumed
        self._path = resumed
        self.started = 0.0
        self.fastest = math.inf  # seconds of the fastest epoch
        self.warned = False
        self.validated = False

    @property
    def path(self) -> Path:
        """The run folder; until it is made, and until ``setup`` in other processes, the folder above it."""
        return self._path or self.parent

    def create(self) -> Path:
        """Makes the folder with its config.yaml, unless it is there; returns it."""
        if self._path is None:
            self._path = runs.new(self.parent)
            write_atomic(self._path / runs.CONFIG, self.config.encode())
        return self._path

    @property
    def is_new(self) -> bool:
        """Whether this process made the folder."""
        return self.resumed is None and self._path is not None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tells every process the folder. Checkpoint callbacks that have no folder of their own get this one."""
        self._path = trainer.strategy.broadcast(self.create() if trainer.is_global_zero else None)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.path / "checkpoints").resolve())
                if callback.save_last:  # the name last.ckpt belongs to our checkpoint of the newest epoch
                    callback.CHECKPOINT_NAME_LAST = f"{type(callback).__name__}-last"
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.repeat_last_epoch()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lets the arguments that a callback has now win over the checkpoint, and finds best.ckpt in a moved folder."""
        states = checkpoint["callbacks"]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = states.get(callback.state_key)
            if not isinstance(state, dict):
                continue
            for name in _arguments(type(callback)) & state.keys():
                if hasattr(callback, name):
                    state[name] = getattr(callback, name)
            if state.get("best_model_path"):
                best = Path(state["dirpath"]) / Path(state["best_model_path"]).name
                state["best_model_path"] = str(best)
                if not best.is_file():  # forget the score too: perhaps no later epoch beats it
                    del states[callback.state_key]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves the settings with which a run resumes, and drops the rows of epochs after its checkpoint."""
        if self.resumed and trainer.is_global_zero:  # the checkpoint has been accepted by now
            write_atomic(self.path / runs.CONFIG, self.config.encode())
            for outdated in (runs.FINISHED, runs.SCORE):
                (self.path / outdated).unlink(missing_ok=True)
            for half in self.path.glob("checkpoints/.*.tmp"):  # the stopped process was writing it
                half.unlink(missing_ok=True)
            finished = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
            kept = [row for row in runs.read_results(self.path) if int(row["epoch"]) <= finished]
            runs.write_results(self.path, kept)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the epoch's clock."""
        self.started, self.validated = time.perf_counter(), False

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes that this epoch has validation metrics: Lightning keeps those of earlier epochs."""
        self.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the epoch's row and prints its line.

        Raises:
            FloatingPointError: If the training diverged. The checkpoints of earlier epochs stay.
        """
        metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        epoch, seconds = trainer.current_epoch + 1, time.perf_counter() - self.started
        checked = {"train_loss": metrics["train_loss"]}
        if self.validated:
            checked["val_loss"] = metrics["val_loss"]
        checked["a weight"] = float(sum(weight.detach().abs().sum() for weight in pl_module.parameters()))
        for name, value in checked.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is NaN or infinite in epoch {epoch}: the training diverged at lr "
                    f"{pl_module.hparams['lr']}. Try a smaller --model.lr. Checkpoints of finished epochs are intact."
                )
        if not trainer.is_global_zero:
            return
        row: dict[str, Any] = {name: metrics.get(name, "") for name in runs.COLUMNS}
        if not self.validated:
            row.update(val_loss="", val_acc="")
        row.update(epoch=epoch, step=trainer.global_step, lr=trainer.optimizers[0].param_groups[0]["lr"])
        row["seconds"] = round(seconds, 3)
        runs.write_results(self.path, [*runs.read_results(self.path), row])
        print(epoch_line(row, trainer.max_epochs), flush=True)
        self._warn_if_slow(seconds)

    def _warn_if_slow(self, seconds: float) -> None:
        """Says once that an epoch was slow. One thread that waits for a busy core makes all others wait."""
        if seconds > 3 * self.fastest and torch.get_num_threads() > 1 and not self.warned:
            self.warned = True
            print(
                f"This epoch took {seconds / self.fastest:.0f} times as long as the fastest one. If another program "
                "keeps a core busy, --threads 1 is faster."
            )
        self.fastest = min(self.fastest, seconds)

    def finish(self, trainer: Trainer) -> None:
        """Writes why the training ended, and prints it if the training ended early."""
        done, reason = trainer.current_epoch, _reason(trainer)
        if trainer.is_global_zero:
            write_atomic(self.path / runs.FINISHED, f"{reason or f'all {done} epochs are trained'}\n".encode())
            if reason:
                print(f"The training ended after epoch {done}: {reason}")


def _arguments(kind: type) -> set[str]:
    """Returns the names of the arguments of a class and its parents."""
    names: set[str] = set()
    for parent in kind.__mro__[:-1]:
        names |= set(inspect.signature(parent).parameters)
    return names


def _reason(trainer: Trainer) -> str | None:
    """Returns why a training ended before ``max_epochs``, or None if it did not."""
    if trainer.global_step == trainer.max_steps:
        return f"trainer.max_steps={trainer.max_steps} is reached"
    if trainer.current_epoch >= (trainer.max_epochs or 0) > 0:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message}"
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None and remaining <= 0:
            return "its time is over (trainer.max_time)"
    return "a callback asked for it"


def epoch_line(row: dict[str, Any], max_epochs: int | None) -> str:
    """Formats a row of results.csv as a line to print, with accuracies in per cent."""
    parts = [f"epoch {row['epoch']}/{max_epochs}"]
    for name in runs.COLUMNS[3:7]:
        if row[name] != "":
            parts.append(f"{name} {row[name]:.2%}" if name.endswith("acc") else f"{name} {row[name]:.4f}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard events into the run folder, which does not exist before the training starts.

    Args:
        folder: The callback that knows the run folder.
        step: The optimizer step from which the run resumes. Events of later steps are dropped.
    """

    def __init__(self, folder: RunFolder, step: int = 0) -> None:
        options: dict[str, Any] = {"purge_step": max(step - 1, 0)} if step else {}
        super().__init__(folder.parent.parent, folder.parent.name, default_hp_metric=False, **options)
        self.folder, self.first_step = folder, step

    @property
    def log_dir(self) -> str:
        """The run folder."""
        is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        return str(self.folder.create() if is_first else self.folder.path)

    def repeat_last_epoch(self) -> None:
        """Writes once more what a resumed run dropped: the events of its last epoch, which a kill may have cut off."""
        for row in runs.read_results(self.folder.path):
            if int(row["step"]) == self.first_step:
                values = {name: float(row[name]) for name in runs.COLUMNS[3:7] if row[name]}
                self.log_metrics({**values, "epoch": int(row["epoch"]) - 1}, self.first_step - 1)
        self.first_step = 0


class BestCheckpoint(ModelCheckpoint):
    """Writes best.ckpt: the epoch with the highest ``val_acc``, and of equal ones the earliest."""

    def __init__(self) -> None:
        super().__init__(
            filename="best", monitor="val_acc", mode="max", save_on_train_epoch_end=True, enable_version_counter=False
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves if that was the best epoch. An epoch that ``max_steps`` cut short has no validation accuracy."""
        if "val_acc" in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after every epoch. Lightning's ``save_last`` writes only when it saves another checkpoint."""

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


class Summary(Callback):
    """Prints the layers with output shapes and numbers of parameters at the start, as the article does."""

    takes_blocks = True

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Prints the table."""
        if not trainer.is_global_zero:
            return
        rows = layers(pl_module.net)
        table = Table("layer", "output shape", Column("parameters", justify="right"))
        for kind, shape, parameters in rows:
            table.add_row(kind, Text(shape), f"{parameters:,}")
        table.add_section()
        table.add_row("total", "", f"{sum(parameters for *_, parameters in rows):,}")
        rich.print(table)


class EpochBar(RichProgressBar):
    """The progress of an epoch on a terminal, with the metrics so far. Lines above it show the finished epochs."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5)  # Lightning's 100 times a second would slow the training down

    def _get_train_description(self, current_epoch: int) -> str:  # Lightning has no public hook for it
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"  # counted from 1 like results.csv

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Returns the metrics as text, with accuracies in per cent."""
        metrics = super().get_metrics(trainer, pl_module)
        return {
            name: f"{value:.2%}" if name.endswith("acc") else f"{value:.4f}"
            for name, value in metrics.items()
            if isinstance(value, float)
        }
