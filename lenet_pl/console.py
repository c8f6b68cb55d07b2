"""What is shown on the terminal: the help of a command; and a training's layers, epoch lines and progress bar."""

import re
from typing import Any

import rich
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Column, Table
from rich.text import Text

from lenet_pl import runs
from lenet_pl.lenet import layers

say = rank_zero_only(print)  # of several processes the first one speaks
# The help shows these first, if the command has them.
COMMON = (
    "config ckpt_path name threads seed_everything trainer.max_epochs trainer.accelerator trainer.precision model.lr "
    "model.schedule model.dropout model.weight_decay data.batch_size data.val_size data.flip data.shift "
    "data.images output port"
)


def help_text(parser: LightningArgumentParser, command: str) -> str:
    """Returns jsonargparse's help, preceded by the options that people change most."""
    text = parser.format_help()
    entries = re.split(r"\n(?=  -)", text)[1:]  # one for each option, without the usage
    first = []
    for name in COMMON.split():
        first += [entry.split("\n\n")[0] for entry in entries if f"--{name} " in entry[:80]]
    title = f"lenet-pl {command}: the options that people change most"
    return "\n".join([title, "", *first, "", "All options", "", text])


def format_metric(name: str, value: float) -> str:
    """Formats a metric for the screen: an accuracy in per cent."""
    return f"{value:.2%}" if name.endswith("acc") else f"{value:.4f}"


def epoch_line(row: dict[str, Any], max_epochs: int | None) -> str:
    """Formats a row of results.csv as a line to print."""
    metrics = [f"{name} {format_metric(name, row[name])}" for name in runs.METRICS if row[name] != ""]
    return "  ".join([_epoch_of(row["epoch"], max_epochs), *metrics, f"{row['seconds']:.1f} s"])


def _epoch_of(epoch: int, max_epochs: int | None) -> str:
    most = f"/{max_epochs}" if max_epochs and max_epochs > 0 else ""  # -1: until something else ends the training
    return f"epoch {epoch}{most}"


class Summary(Callback):
    """Prints the layers with output shapes and numbers of parameters at the start, as the article does."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Prints the table."""
        if not trainer.is_global_zero:
            return
        rows = layers(pl_module.hparams["variant"])
        table = Table("layer", "output shape", Column("parameters", justify="right"))
        for kind, shape, parameters in rows:
            table.add_row(kind, Text(shape), f"{parameters:,}")
        total = sum(parameters for *_, parameters in rows)
        trained = sum(parameter.numel() for parameter in pl_module.net.parameters())
        table.add_section()
        table.add_row("total", "", f"{total:,}")
        if trained != total:
            table.add_row("while it trains", "", f"{trained:,}")
        rich.print(table)


class EpochBar(RichProgressBar):
    """The progress of an epoch on a terminal, with the metrics of the last finished epoch."""

    def _get_train_description(self, current_epoch: int) -> str:  # Lightning has no public hook for it
        return _epoch_of(current_epoch + 1, self.trainer.max_epochs)  # counted from 1 like results.csv

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Returns the metrics as text, with accuracies in per cent."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: format_metric(name, value) for name, value in metrics.items() if isinstance(value, float)}
