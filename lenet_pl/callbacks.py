"""What a run writes: its folder with a row for each epoch, and TensorBoard events."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lenet_pl import runs
from lenet_pl.atomic import write_atomic
from lenet_pl.checkpoint import BestCheckpoint, LastCheckpoint, was_cut_short
from lenet_pl.console import epoch_line
from lenet_pl.errors import Failure


class RunWriter(Callback):
    """Writes the run folder: config.yaml, and for each epoch a row of results.csv. It also prints a line each epoch.

    Args:
        parent: The folder ``runs/<name>``. A new run gets the next free ``version_N`` in it.
        config: The complete configuration, as YAML.
        resumed: The folder of the run to resume, if any.
        origin: The checkpoint from which a new run begins, if any.
    """

    knows_blocks = True  # it looks only at epochs, see blocks.py

    def __init__(self, parent: Path, config: str, resumed: Path | None = None, origin: Path | None = None) -> None:
        self.parent, self.config = parent, config
        self.resumed, self.origin = resumed, origin
        self.path = resumed  # None until ``create`` makes the folder of a new run
        self.rows: list[dict[str, Any]] = list(runs.read_results(resumed)) if resumed else []
        self.epochs = 0  # that are finished
        self.validated_step = -1
        self.started = 0.0  # time.perf_counter() at the start of the epoch
        self.fastest = math.inf  # seconds of the fastest epoch
        self.warned = False

    def create(self) -> Path:
        """Makes the folder with its config.yaml, unless it is there; returns it."""
        if self.path is None:
            self.path = runs.new(self.parent)
            write_atomic(self.path / runs.CONFIG, self.config.encode())
        return self.path

    def discard(self) -> None:
        """Deletes the folder of a new run."""
        if self.path and not self.resumed:
            runs.remove(self.path)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tells every process the folder. Checkpoint callbacks that have no folder of their own get this one."""
        folder: Path = trainer.strategy.broadcast(self.create() if trainer.is_global_zero else Path())
        self.path = folder
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((folder / runs.CHECKPOINTS).resolve())
                # The names best.ckpt and last.ckpt belong to our own checkpoints.
                is_ours = isinstance(callback, BestCheckpoint | LastCheckpoint)
                if not is_ours and callback.filename in (Path(runs.BEST).stem, Path(runs.LAST).stem):
                    callback.filename = f"{type(callback).__name__}-{callback.filename}"
                if callback.save_last:
                    callback.CHECKPOINT_NAME_LAST = f"{type(callback).__name__}-last"

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Counts the finished epochs, and adapts the states of other callbacks to the settings of today."""
        self.epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        states = checkpoint["callbacks"]
        for stopper in trainer.early_stopping_callbacks:
            if stopper.state_key in states:
                states[stopper.state_key]["patience"] = stopper.patience
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.state_key in states:
                if self.resumed:
                    states[saver.state_key]["dirpath"] = saver.dirpath  # the run may have been moved
                else:
                    del states[saver.state_key]  # a new run has no best epoch yet

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Ends the training at once if EarlyStopping had lost its patience before the resume.

        Prints a line if validations do not fall on the end of each epoch.
        """
        validates = trainer.enable_validation and trainer.is_global_zero
        if validates and trainer.num_training_batches % (trainer.val_check_batch or 1):
            print("val_check_interval: an epoch at whose end there is no validation cannot become best.ckpt")
        for callback in trainer.early_stopping_callbacks:
            is_stock = type(callback) is EarlyStopping  # a derived class may have gone on all the same
            if is_stock and callback.wait_count >= max(1, callback.patience):
                trainer.should_stop = True
            else:
                callback.stopping_reason_message = None  # perhaps it has one from before the resume

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the epoch's clock."""
        is_first = not self.started
        self.started = time.perf_counter()
        if is_first and trainer.is_global_zero:  # by now every check of the settings has passed
            if self.resumed:
                self._resume(self.resumed)
            elif self.origin and trainer.checkpoint_callbacks:  # if it is stopped in this epoch, it resumes from there
                write_atomic(self.create() / runs.LAST, self.origin.read_bytes())

    def _resume(self, folder: Path) -> None:
        """Saves the settings with which a run resumes, and drops what is newer than its finished epochs."""
        self.rows = [row for row in self.rows if int(row["epoch"]) <= self.epochs]
        write_atomic(folder / runs.CONFIG, self.config.encode())
        for outdated in (runs.FINISHED, runs.SCORE, runs.REPORT):
            (folder / outdated).unlink(missing_ok=True)
        for unfinished in folder.rglob(".*.tmp"):  # the stopped process was writing it
            unfinished.unlink(missing_ok=True)
        runs.write_results(folder, self.rows)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes the step of the last validation, because Lightning goes on showing its metrics."""
        self.validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the epoch's row and prints its line.

        Raises:
            Failure: If the training diverged. The checkpoints of earlier epochs stay.
        """
        epoch = trainer.current_epoch + 1
        seconds = round(time.perf_counter() - self.started, 3)
        metrics = rounded_metrics(trainer)
        row: dict[str, Any] = {name: metrics.get(name, "") for name in runs.COLUMNS}
        if self.validated_step != trainer.global_step:
            row.update(val_loss="", val_acc="")
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        row.update(epoch=epoch, step=trainer.global_step, lr=lr, seconds=seconds)
        weights = float(sum(weight.detach().abs().sum() for weight in pl_module.parameters()))
        for name, value in {**row, "a weight": weights}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise Failure(
                    f"{name} is NaN or infinite in epoch {epoch}: the training diverged at lr "
                    f"{pl_module.hparams['lr']}. Try a smaller --model.lr. Checkpoints of finished epochs are intact."
                )
        if was_cut_short(trainer):
            return
        self.epochs = epoch
        if not trainer.is_global_zero:
            return
        self.rows.append(row)
        runs.write_results(self.create(), self.rows)
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

    def finish(self, trainer: Trainer) -> Path:
        """Writes why the training ended, prints it if that was early, and returns the run folder."""
        folder = self.create()
        reason = _reason(trainer, self.epochs)
        if trainer.is_global_zero:
            if not self.started:
                remedy = "" if reason else " To train longer, give a larger --trainer.max_epochs."
                print(f"Nothing was left to train.{remedy}")
                # No epoch has saved the settings.
                write_atomic(folder / runs.CONFIG, self.config.encode())
            if self.epochs:  # otherwise ``auto`` begins it again
                end = reason or f"trained to epoch {self.epochs}"
                write_atomic(folder / runs.FINISHED, f"{end}\n".encode())
            if reason:
                print(f"The training ended after epoch {self.epochs}: {reason}")
        return folder


def _reason(trainer: Trainer, done: int) -> str | None:
    """Returns why a training ended before ``max_epochs``, or None if all its epochs are ``done``."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps={trainer.max_steps} is reached"
    max_epochs = trainer.max_epochs or -1  # -1: without a limit
    if 0 < max_epochs <= done:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping: {callback.stopping_reason_message}"
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None and remaining <= 0:
            return "the time limit is reached"
    return "a callback asked for it"


def rounded_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns the metrics of the last epoch or evaluation as they are written to files."""
    return {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}


class RunLogger(TensorBoardLogger):
    """Writes TensorBoard events into the run folder, which does not exist before the training starts.

    ``step`` is the optimizer step from which the run resumes. Events of later steps are dropped.
    """

    def __init__(self, run_writer: RunWriter, step: int = 0) -> None:
        super().__init__(run_writer.parent.parent, run_writer.parent.name, default_hp_metric=False, purge_step=step)
        self.run_writer = run_writer

    @property
    def log_dir(self) -> str:
        """The run folder."""
        is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        return str(self.run_writer.create() if is_first else self.run_writer.path)
