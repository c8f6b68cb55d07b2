"""How the process ends on a signal, and what it keeps off the console."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(SystemExit):
    """A signal ended the process; ``code`` is the exit code."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(code)
        self.name = name


@contextmanager
def stopping() -> Iterator[None]:
    """Ends the process on Ctrl-C, SIGTERM and, under SLURM, SIGUSR1: at once, a second signal without any word.

    Nothing has to be saved, because a run goes on from its last finished epoch.
    """
    if threading.current_thread() is not threading.main_thread():  # Python takes signals in the main thread only
        yield
        return
    codes = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 143)}
    if sys.platform != "win32" and "SLURM_JOB_ID" in os.environ:
        codes[signal.SIGUSR1] = ("SIGUSR1", 143)

    def stop(signum: int, frame: Any) -> None:
        for again in codes:
            signal.signal(again, signal.SIG_DFL)
        raise Stopped(*codes[signal.Signals(signum)])

    before = {signum: signal.signal(signum, stop) for signum in codes}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# The beginnings of what Lightning says at each start, unasked: advertisements, and notes that do not hold here.
_UNASKED = (
    "GPU available",
    "TPU available",
    "💡",
    "Tip:",
    "Seed set to",
    "Restor",
    "Loaded model weights",
    "Using ",
    "`Trainer.fit` stopped",  # RunFolder says why a training ended
    "`Trainer(barebones",
    "Initializing distributed",
    "-----",
    "distributed_backend",
    "All distributed processes",
    "LOCAL_RANK",
)


def _is_asked_for(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip("\n").startswith(_UNASKED)


def quiet() -> None:
    """Silences what nobody asked for; callbacks, profilers and tuners are heard."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_asked_for)
    for message in (
        ".*LeafSpec.* is deprecated",  # in Lightning's own code
        "Checkpoint directory .* is not empty",  # when a run goes on
        "Be aware that when using `ckpt_path`",  # a checkpoint names the callbacks of fit, which test has not
        ".*does not have many workers",  # data in memory need none
        "GPU available but not used",  # the user said so
        "You are trying to `self.log",  # with barebones, where nothing is logged
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
