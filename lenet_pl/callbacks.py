"""What a run leaves behind and prints: its folder, results.csv, epoch lines; and how it stops on a signal."""

import csv
import io
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import rich
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Column, Table
from rich.text import Text

from lenet_pl.atomic import write_atomic
from lenet_pl.lenet import layers

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")


class RunFolder(Callback):
    """Keeps ``runs/<name>/version_N``: config.yaml, TensorBoard events, and a row of results.csv for each epoch.

    Args:
        parent: ``runs/<name>``; a new run gets the next free ``version_N`` in it.
        config: The complete configuration, as YAML.
        resumed: The folder of the run to go on with, if any.
        step: The optimizer step it goes on from.
        tensorboard: Whether to write TensorBoard events into the folder.
    """

    def __init__(
        self, parent: Path, config: str, resumed: Path | None = None, step: int = 0, tensorboard: bool = True
    ) -> None:
        self.parent, self.config, self.resumed, self.step, self.tensorboard = parent, config, resumed, step, tensorboard
        self.path = resumed or parent
        self.started = 0.0
        self.validated = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Makes the folder when everything before the training has gone well."""
        if stage != "fit":
            return
        if trainer.is_global_zero:
            self.path = self.resumed or self._next_version()
            if not self.resumed:
                write_atomic(self.path / "config.yaml", self.config.encode())
        self.path = trainer.strategy.broadcast(self.path)
        for callback in trainer.checkpoint_callbacks:
            callback.dirpath = str((self.path / "checkpoints").resolve())  # type: ignore[attr-defined]
        if self.tensorboard:  # made here, for the folder is not known before; events of superseded steps are dropped
            root, name, version = self.path.parts[:-2], self.path.parts[-2], self.path.parts[-1]
            options: dict[str, Any] = {"purge_step": max(self.step - 1, 0)} if self.resumed else {}
            trainer.loggers = [TensorBoardLogger(Path(*root), name, version, default_hp_metric=False, **options)]

    def _next_version(self) -> Path:
        taken = [int(p.name[8:]) for p in self.parent.glob("version_*") if p.name[8:].isdecimal()]
        for version in range(max(taken, default=-1) + 1, 2**31):
            path = self.parent / f"version_{version}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:  # another run was quicker
                continue
            return path
        raise FileExistsError(str(self.parent))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lets ModelCheckpoint remember the best score although the run folder may have been moved."""
        folder, callbacks = (self.path / "checkpoints").resolve(), checkpoint["callbacks"]
        for key, state in list(callbacks.items()):
            if "best_model_path" in state:
                path = folder / Path(state["best_model_path"]).name
                state.update(dirpath=str(folder), best_model_path=str(path))
                if not path.is_file():  # best.ckpt is gone: forget its score, or perhaps no epoch would beat it
                    del callbacks[key]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Repeats the last epoch's events: Lightning writes them after its checkpoint, a kill may have come between."""
        for row in self.rows():
            if self.tensorboard and int(row["step"]) == self.step:
                values = {name: float(row[name]) for name in COLUMNS[3:7] if row[name]}
                trainer.loggers[0].log_metrics({**values, "epoch": int(row["epoch"]) - 1}, self.step - 1)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes the settings a run goes on with, and drops what it wrote after the checkpoint it goes on from."""
        self.started = time.perf_counter()
        if self.resumed and trainer.is_global_zero:  # the checkpoint has been accepted
            write_atomic(self.path / "config.yaml", self.config.encode())
            finished = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
            self._write([row for row in self.rows() if int(row["epoch"]) <= finished])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the epoch's clock."""
        self.started, self.validated = time.perf_counter(), False

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes that this epoch has validation metrics: Lightning shows those of an earlier one otherwise."""
        self.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the epoch's row and prints it.

        Raises:
            FloatingPointError: If the training diverged; the checkpoints of the epochs before it stay.
        """
        metrics = {name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}
        epoch = trainer.current_epoch + 1
        seen = {name: metrics[name] for name in ("train_loss", *(["val_loss"] if self.validated else []))}
        seen["a weight"] = float(sum(weight.detach().abs().sum() for weight in pl_module.net.parameters()))
        if odd := [name for name, value in seen.items() if not math.isfinite(value)]:
            raise FloatingPointError(
                f"{odd[0]} is NaN or infinite in epoch {epoch}: training diverged at lr {pl_module.hparams['lr']};"
                " try a smaller --model.lr. Checkpoints of finished epochs are intact."
            )
        if not trainer.is_global_zero:
            return
        shown = [name for name in COLUMNS if self.validated or not name.startswith("val_")]
        row: dict[str, Any] = {name: metrics[name] if name in shown and name in metrics else "" for name in COLUMNS}
        row.update(epoch=epoch, step=trainer.global_step, lr=trainer.optimizers[0].param_groups[0]["lr"])
        row["seconds"] = round(time.perf_counter() - self.started, 3)
        self._write([*self.rows(), row])
        print(epoch_line(row, trainer.max_epochs), flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of results.csv, without one that a crash cut short."""
        path = self.path / "results.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("seconds")]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path / "results.csv", text.getvalue().encode())


def epoch_line(row: dict[str, Any], max_epochs: int | None) -> str:
    """Formats a row of results.csv for people: accuracies in per cent."""
    parts = [f"epoch {row['epoch']}/{max_epochs}"]
    for name in COLUMNS[3:7]:
        if row[name] != "":
            parts.append(f"{name} {row[name]:.2%}" if name.endswith("acc") else f"{name} {row[name]:.4f}")
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, the epoch with the highest ``val_acc``, the earlier one on a tie."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves if that was the best epoch; one that ``max_steps`` cut short has no validation to go by."""
        if "val_acc" in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)


class Summary(Callback):
    """Prints the net's layers with output shapes and parameters at the start, as the article does."""

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
    """An epoch's progress on a terminal, with the metrics so far; the finished epochs are lines above it."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"  # counted like results.csv and the lines

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Returns the metrics as text, accuracies in per cent."""
        metrics = super().get_metrics(trainer, pl_module)
        return {
            name: f"{value:.2%}" if name.endswith("acc") else f"{value:.4f}"
            for name, value in metrics.items()
            if isinstance(value, float)
        }


class Stopped(Exception):  # noqa: N818 (being stopped is no error)
    """A signal ended the training; the newest checkpoint is written.

    Args:
        signum: The signal's number.
        path: That checkpoint, if any.
    """

    def __init__(self, signum: int, path: Path | None) -> None:
        super().__init__(signum, path)
        self.signum, self.path = signum, path


class GracefulStop(Callback):
    """Ends a training on Ctrl-C, SIGTERM and, under SLURM, SIGUSR1, so that it can go on exactly where it was.

    The block in flight is finished and ``last.ckpt`` written; after the last block of an epoch also the validation. A
    second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signum = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Takes the signals over from Lightning, which would lose the steps since the last epoch and exit with 0."""
        for signum in (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])):
            signal.signal(signum, self._notice)

    def _notice(self, signum: int, frame: Any) -> None:
        self.signum = signum
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stops between two blocks of an epoch; after its last one, when that epoch's checkpoints are written."""
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or trainer.global_step == trainer.max_steps
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches  # a checkpoint holds no gradients
        if not last and not accumulating:
            self._stop_if_asked(trainer, pl_module, save=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stops between two epochs."""
        self._stop_if_asked(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stops after the last epoch."""
        self._stop_if_asked(trainer, pl_module)

    def _stop_if_asked(self, trainer: Trainer, pl_module: Any, save: bool = False) -> None:
        """Raises ``Stopped`` if any process was told to stop."""
        if not trainer.strategy.reduce_boolean_decision(bool(self.signum), all=False):
            return
        folders = [c.dirpath for c in trainer.checkpoint_callbacks]  # type: ignore[attr-defined]
        last = Path(folders[0]) / "last.ckpt" if folders else None
        if save and last and pl_module.metrics["train_loss"].compute().isfinite():
            trainer.save_checkpoint(last)
        raise Stopped(self.signum or signal.SIGTERM, last if last and last.exists() else None)
