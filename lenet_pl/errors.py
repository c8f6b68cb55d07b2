"""What a user reads when something is wrong: one to three lines, and a quiet console otherwise."""

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable


class UsageError(Exception):
    """The command, a flag or a value is wrong: the process exits with 2."""


def explain(message: str, command: str, known: Iterable[str]) -> str:
    """Rewrites a message of jsonargparse for people.

    Args:
        message: Its text, often of many lines.
        command: The command, such as ``fit``.
        known: The command's flags, such as ``--model.lr``.

    Returns:
        What was wrong, what was expected, what to do.
    """
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message)
    flat = " ".join(message.split())
    if unknown := re.search(r"unrecognized arguments: (\S+)|does not accept \w+ '(\S+)'", flat, re.IGNORECASE):
        given = unknown[1] or f"--{unknown[2]}"
        name = given.split("=")[0]
        near = difflib.get_close_matches(name, known, 1)
        shown = name if unknown[1] else name.removeprefix("--")
        hint = f"did you mean {near[0] if unknown[1] else near[0].removeprefix('--')}?" if near else "no such option"
        return f"unknown {'flag' if unknown[1] else 'config key'} {shown}; {hint}\nAll: {_help(command)}"
    key = re.search(r'Parser key "([\w.]+)"', flat)
    value = re.search(r"(?:Given value|Got value): (.+?)(?: Subtypes:| Errors:|$)", flat)
    types = list(dict.fromkeys(re.findall(r"Expected an? (\w+)", flat)))
    if key and value and types:
        expected = " or ".join("null" if t == "NoneType" else t for t in types)
        return f"{key[1]}={value[1]}: expected {expected}"
    if missing := re.search(r"(?:File does not exist|Unable to open file|No such file)\D*?: '?([^']+)'?", flat):
        return f"config file {missing[1]} does not exist; the recipes lie in configs/"
    return flat if len(flat) < 300 else f"{flat[:300]} ...\nAll options: {_help(command)}"


def _help(command: str) -> str:
    return f"python -m lenet_pl {command} --help"


def fail(error: Exception, code: int) -> int:
    """Prints what was wrong, or raises it under ``LENET_PL_DEBUG=1``; returns ``code``."""
    if os.environ.get("LENET_PL_DEBUG") == "1":
        raise error
    text = str(error) or type(error).__name__
    if re.search(r"\b(gpu|cuda|mps|tpu)", text, re.IGNORECASE) and "accelerator" not in text.split("\n")[-1]:
        text += "\nTo run on the CPU: --trainer.accelerator cpu"
    print(f"error: {text}", file=sys.stderr)
    return code


def quiet() -> None:
    """Silences notes about Lightning's own code, advertisement, and hints that do not hold here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.* is deprecated",  # in Lightning's own code
        "Checkpoint directory .* is not empty",  # when a run goes on
        "Be aware that when using `ckpt_path`",  # a checkpoint names the callbacks of fit, which test has not
        ".*does not have many workers",  # data in memory need none
        "GPU available but not used",  # the user said so
    ):
        warnings.filterwarnings("ignore", message=message)
