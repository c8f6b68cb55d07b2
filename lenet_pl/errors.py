"""What a user reads when something is wrong: one to three lines. This module needs neither torch nor Lightning."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable

# What jsonargparse expected, in its own words, and plain words for it.
_EXPECTED = re.compile(r"Expected an? (?:<class '[\w.]*?(\w+)'>|typing\.Literal\[(.*?)\]|(dot import path))")
# Reasons that begin like this only name a type. Others say more.
_GENERAL = ("Expected a", "Not a valid subclass", "a class path", "a dict ")
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_TYPES |= {"list": "a list", "Iterable": "a list", "dot import path": "a class such as package.module.Class"}


class UsageError(ValueError):
    """The user gave a wrong command, flag, value or file. The process exits with 2."""


class Failure(RuntimeError):  # noqa: N818 (UsageError is the other kind)
    """Something failed at run time, such as a download. The text is for the user. The process exits with 1."""


class CheckpointError(UsageError):
    """A checkpoint is missing or cannot be used. The text gives name, cause and remedy in at most three lines."""


def require(fine: bool, given: str, expected: str) -> None:
    """Raises UsageError unless ``fine``. ``given`` is a setting such as ``model.lr=-1``."""
    if not fine:
        raise UsageError(f"{given}: expected {expected}")


def shorten(text: str, length: int = 300) -> str:
    """Returns a message as one line of about ``length`` characters at most."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]} ..."


def explain(message: str, command: str, options: Iterable[str]) -> str:
    """Shortens a message of jsonargparse, and adds a remedy and the nearest option, such as ``model.lr``."""
    flat = " ".join(message.split())
    remedy = f"\nAll options: python -m lenet_pl {command} --help"
    inside = re.match(r"Problem with given class_path '(\S+)':\s+(.+)", message, re.DOTALL)
    if inside:  # such as a callback with a wrong argument
        return f"{inside[1]}: {explain(inside[2], command, ())}"
    key = re.search(r'Parser key "([\w.]+)"', flat)
    values = re.findall(r"(?:Given value:|Got value:|Unable to load config) ?(.*?)(?= Given value|\.? - |$)", flat)
    given = f"={shorten(values[-1], 80)}" if values else ""
    option = f"{key[1]}{given}: " if key else ""
    # An option may have several types, and each of them says why the value does not fit. They are told apart by how
    # far their lines are indented, because one of them may have several types itself.
    reasons = re.search(r"^( *)Errors:\n(.+?)(?=\n\1Given value type:|\Z)", message, re.DOTALL | re.MULTILINE)
    for reason in re.split(rf"^{reasons[1]}  - ", reasons[2], flags=re.MULTILINE)[1:] if reasons else ():
        if not reason.startswith(_GENERAL):
            names_class = reason.startswith("Problem with given class_path")
            return (f"{key[1]}=" if key and names_class else option) + explain(reason, command, ())
    unknown = re.search(r"(unrecognized arguments: |does not accept option '|Option ')([^\s=']+)", flat)
    if unknown:
        is_typed, name = unknown[1].startswith("unrecognized"), unknown[2]  # otherwise it stands in a config file
        if is_typed and not name.startswith("-") and "." not in name:
            return f"{name!r} stands alone; write its option before it, such as --config or --ckpt_path{remedy}"
        alike = _nearest(name.lstrip("-").split(".")[-1], options)
        hint = f"; did you mean {'--' if is_typed else ''}{alike}?" if alike else ""
        return f"unknown option {name}{hint}{remedy}"
    if not key:
        return shorten(flat) + remedy
    kinds = [_TYPES.get(kind, kind) for kind in map("".join, _EXPECTED.findall(flat))]
    expected = " or ".join(dict.fromkeys(kinds)) or "settings, such as --model.lr 0.001"
    return f"{option}expected {expected}{remedy}"


def _nearest(word: str, options: Iterable[str]) -> str | None:
    """Returns the option whose last part is or begins like ``word``: --lr means --model.lr, --seed seed_everything."""

    def likeness(part: str) -> tuple[bool, float]:
        return part.startswith(word), difflib.SequenceMatcher(None, word, part).ratio()

    by_last_part = {option.split(".")[-1]: option for option in sorted(options)}
    best = max(by_last_part, key=likeness, default="")
    begins, ratio = likeness(best)
    return by_last_part[best] if best and (begins or ratio >= 0.75) else None


def tell(error: BaseException, code: int) -> int:
    """Prints what was wrong and returns ``code``. With ``LENET_PL_DEBUG=1`` it prints the traceback first."""
    if os.environ.get("LENET_PL_DEBUG") == "1":
        traceback.print_exception(error)
    text = str(error)
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        place = os.fsdecode(error.filename) if error.filename else "the disk or standard output"
        text = f"{place}: {error.strerror}\nFree space or correct the permissions there, or choose another folder: "
        text += "--trainer.default_root_dir for a training, --output for predict and export"
    elif not isinstance(error, UsageError | Failure):
        text = f"{type(error).__name__}: {shorten(text)}\nLENET_PL_DEBUG=1 shows where it comes from"
    print(f"error: {text}", file=sys.stderr)
    return code
