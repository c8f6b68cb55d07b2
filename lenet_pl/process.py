"""Ends the process on a signal, and hides messages that nobody asked for."""

import logging
import os
import re
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
    """Ends the process at once on Ctrl-C, SIGTERM, SIGHUP and, under SLURM, SIGUSR1.

    Nothing has to be saved, because a run resumes from its last finished epoch. After a second signal there is no
    message.
    """
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only in the main thread
        yield
        return
    codes = {signal.SIGINT: ("Ctrl-C", 130), signal.SIGTERM: ("SIGTERM", 143)}
    if sys.platform != "win32":
        codes[signal.SIGHUP] = ("SIGHUP", 129)  # the terminal was closed
        if "SLURM_JOB_ID" in os.environ:
            codes[signal.SIGUSR1] = ("SIGUSR1", 143)  # sbatch can ask for it before the job's time is over

    caught: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        name, code = codes[signal.Signals(signum)]
        if caught:
            os._exit(code)
        caught.append(signum)
        raise Stopped(name, code)

    # Signals that are ignored, as under nohup, stay so.
    wanted = [signum for signum in codes if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in wanted}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# How messages begin that Lightning prints unasked: advertisements, and notes that are untrue or superfluous here.
_UNASKED = (
    "GPU available",
    "TPU available",
    "💡",
    "Seed set to",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Using 16",
    "Using bfloat16",
    "`Trainer.fit` stopped",  # RunWriter says why a training ended
    "`Trainer(barebones",
    "Initializing distributed",
    "-----",  # the line above "distributed_backend=gloo"
    "LOCAL_RANK",
    "You are using a CUDA device",
)


def _print_unless_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """Prints the traceback of a thread, unless it is TensorBoard's, whose error appears where an event is logged."""
    if not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


def _is_asked_for(record: logging.LogRecord) -> bool:
    message = re.sub(r"^\[rank: \d+\] ", "", record.getMessage().lstrip("\n"))
    return not message.startswith(_UNASKED)


def quiet() -> None:
    """Silences messages that nobody asked for, and shortens warnings to a line.

    The messages of callbacks, profilers and tuners stay.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_asked_for)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # otherwise it tells of a cache that it cannot write
    for message in (
        ".*LeafSpec.* is deprecated",  # a matter of Lightning's own code
        "(?s)Checkpoint directory .* is not empty",  # a resumed run writes into its own folder
        ".*does not have many workers",  # data in memory needs no workers
        "GPU available but not used",  # the user chose that
        "You are trying to `self.log",  # barebones logs nothing
        "(?s)Grad strides do not match bucket view strides",  # a matter of speed, for convolutions on several CPUs
    ):
        warnings.filterwarnings("ignore", message=message)
    threading.excepthook = _print_unless_tensorboard
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
