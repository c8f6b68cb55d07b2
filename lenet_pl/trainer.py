"""What a Trainer gets beside the options that the user gave, and the number of threads."""

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar, Timer
from lightning.pytorch.plugins import CheckpointIO

from lenet_pl.callbacks import RunLogger, RunWriter
from lenet_pl.checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from lenet_pl.console import EpochBar, Summary

# Trainer's own defaults are 1000 epochs, and a validation of the untrained weights.
TRAINER_DEFAULTS = {"max_epochs": 30, "num_sanity_val_steps": 0}
# One process trains LeNet-5 at batch 32 in 7.0, 5.1, 4.5, 4.7, 3.8, 3.3 s an epoch with 1, 2, 3, 4, 6, 8 threads
# (16-core Xeon). The first 4 give most of the gain, and other programs can use the rest.
MOST_THREADS = 4


def set_threads(threads: int | None, devices: str) -> int:
    """Sets the number of threads of this process, and of those that Lightning starts; returns it.

    None stands for a number that suits the machine. Where ``devices``, the Trainer's option, asks for several CPU
    processes, each gets its share of the cores.
    """
    processes = int(devices) if devices.isdecimal() else 1
    is_given = threads is not None
    if threads is None:
        available = min(torch.get_num_threads(), _quota())
        if processes > 1 and "OMP_NUM_THREADS" not in os.environ:  # where it is set, it is the share of a process
            available //= processes
        threads = max(1, min(int(available), MOST_THREADS))
    torch.set_num_threads(threads)
    if processes > 1 or is_given:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # otherwise Lightning sets another number
    return threads


def _quota() -> float:
    """Returns how many cores a container may use (cgroup v2), which torch ignores."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1.0, int(quota) / int(period))
    return math.inf


def trainer_options(options: Namespace, run_writer: RunWriter | None, step: int) -> dict[str, Any]:
    """Returns what a Trainer gets instead of the user's ``options``. A run resumes from the optimizer step ``step``."""
    callbacks, plugins = _listed(options.callbacks), _listed(options.plugins)

    def has(kind: type[Callback | CheckpointIO]) -> bool:
        return any(isinstance(piece, kind) for piece in (*callbacks, *plugins))

    if not has(CheckpointIO):
        plugins.append(AtomicCheckpointIO())
    changed: dict[str, Any] = {
        "callbacks": callbacks,
        "plugins": plugins,
        "enable_model_summary": False,  # Summary is ours
    }
    if run_writer:
        callbacks.append(run_writer)
        if options.enable_checkpointing is not False:
            callbacks += [BestCheckpoint(), LastCheckpoint()]
        if options.enable_model_summary is not False and not has(ModelSummary):
            callbacks.append(Summary())
        if options.max_time and not has(Timer):  # beside a user's, Lightning says that it ignores max_time
            # Ours ends a training only after an epoch, so that no work is lost.
            callbacks.append(Timer(options.max_time, interval="epoch", verbose=False))
            changed["max_time"] = None
    if options.logger in (None, True):
        changed["logger"] = RunLogger(run_writer, step) if run_writer else False
    shows_bar = options.enable_progress_bar
    if shows_bar is None:
        is_terminal = getattr(sys.stdout, "isatty", bool)()  # a notebook may have put something else there
        shows_bar = is_terminal and not options.barebones
    if shows_bar and not has(ProgressBar):
        callbacks.append(EpochBar(refresh_rate=5))  # Lightning's 100 times a second would slow the training down
    for option, kind in (("enable_checkpointing", Checkpoint), ("enable_progress_bar", ProgressBar)):
        if not has(kind):  # otherwise Lightning adds its own
            changed[option] = False
    return changed


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
