"""``python -m lenet_pl``: answers ``--help`` and ``--version`` at once, and imports torch only for a command."""

import difflib
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from lenet_pl import __version__
from lenet_pl.errors import Failure, tell

COMMANDS = {
    "fit": "train; at the end score the best checkpoint on the test set",
    "validate": "score a checkpoint on the validation images",
    "test": "score a checkpoint on the 10,000 test images",
    "predict": "classify your own pictures, or the test images",
    "report": "make a page on a checkpoint: curves, confusions, calibration and mistakes",
    "export": "write the net as an ONNX file that classifies the test images in the same way",
    "demo": "serve a local page: drop a picture, see what the net sees and its ten probabilities",
}
USAGE = f"""\
LeNet-5 on Fashion-MNIST with PyTorch Lightning, version {__version__}

usage: python -m lenet_pl COMMAND [--config FILE] [--trainer.* ...] [--model.* ...] [--data.* ...] [--ckpt_path PATH]

{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

start here:      python -m lenet_pl fit --config lenet
all its options: python -m lenet_pl fit --help"""
NO_LIBRARY = """\
Is the environment active (source .venv/bin/activate), and lenet_pl installed in it (pip install .)?
Or does a file in this folder have the name of a library, such as random.py? Then rename it"""


def main(args: list[str] | None = None) -> int:
    """Runs the command line ``args``, by default ``sys.argv[1:]``, and returns the exit code.

    It is 0 if all is done, 1 after a failure, 2 after wrong use, 130 after Ctrl-C, 143 after SIGTERM, and 129
    where the terminal was closed.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may be unable to show × or ≤
    try:
        code = _main(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
        return code
    except OSError as error:
        # Nobody reads the output any more (``| head``), or the disk is full.
        print(f"error: standard output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what Python flushes when it exits
        return 1


def _open_closed_streams() -> None:
    """Lets a process without standard streams, such as a service, run silently.

    Otherwise the next file to be opened, perhaps a checkpoint, would get the file descriptor of standard output.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (it stays open)


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if args[0] == "--version":
        print(f"lenet_pl {__version__}")
        return 0
    if args[0] in COMMANDS:
        from lenet_pl import process

        try:
            with process.stopping():
                try:
                    from lenet_pl.commands import run  # takes seconds
                except Exception as error:  # a library is missing or cannot start
                    return tell(Failure(f"{type(error).__name__}: {error}\n{NO_LIBRARY}"), 1)
                return run(args[0], args[1:])
        except process.Stopped as stop:
            print(f"stopped by {stop.name}", file=sys.stderr)
            return int(stop.code or 0)
    later = [name for name in COMMANDS if name in args]
    near = difflib.get_close_matches(args[0].lower(), COMMANDS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}"
    if args[0].startswith("-") and later:
        hint = f"the command comes first: python -m lenet_pl {later[0]} {args[0]} ..."
    print(f"error: {args[0]!r} is not a command; {hint}", file=sys.stderr)
    return 2


def entry() -> NoReturn:
    """Runs the command line as a process of its own."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook names one that need not be installed here; no window is opened anyway
    code = main()
    if code > 128 and "IPython" not in sys.modules:  # a signal, and no notebook's %run
        os._exit(code)  # at once: what the libraries would clean up takes seconds, and nothing needs it
    sys.exit(code)


if __name__ == "__main__":
    entry()
