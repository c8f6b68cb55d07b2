"""What a user reads when something is wrong: one to three lines, and a quiet console otherwise."""

import difflib
import errno
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.accelerators import AcceleratorRegistry

# Trainer options that Lightning takes at 0 or below, and then fails far from here, trains nothing or without end.
_ABOVE_0 = "max_epochs max_steps num_nodes accumulate_grad_batches gradient_clip_val check_val_every_n_epoch"
_ABOVE_0 += " val_check_interval limit_train_batches limit_test_batches"
_TYPES = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_TYPES |= {"list": "a list", "Iterable": "a list", "dot import path": "a class such as package.module.Class"}
_TYPE = re.compile(
    r"Expected an? (?:<class '[\w.]*?(\w+)'>|typing\.Literal\[(.*?)\]|(dot import path))|(a subclass of \w+)"
)
_INSIDE = re.compile(r"(?:.* )?Problem with given class_path '(\S+)': (.+?)(?: - .*|$)")  # of a callback or logger


class UsageError(Exception):
    """The command, a flag or a value is wrong: the process exits with 2."""


def check_file(name: str) -> None:
    """Refuses what is no config file; jsonargparse would tell neither its name nor the line."""
    path, expected = Path(name), "expected settings such as\nmodel:\n  lr: 0.001"
    try:
        text = path.read_text("utf-8")
        yaml.safe_load(text)
    except FileNotFoundError as error:
        recipes = {p.name: p for folder in (path.parent, Path("configs")) for p in folder.glob("*.yaml")}
        near = [recipes[n] for n in difflib.get_close_matches(path.name, recipes, 1)]
        hint = f"did you mean {near[0]}?" if near else "the recipes lie in configs/"
        raise UsageError(f"config file {name} does not exist; {hint}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"config file {name}{line}: {problem or 'no YAML'}; {expected}") from error
    except (OSError, ValueError) as error:  # a folder, no UTF-8, a 13th month
        raise UsageError(f"config file {name}: {error}; expected YAML in UTF-8") from error
    tree, seen = yaml.compose(text, yaml.SafeLoader), set()
    if not isinstance(tree, yaml.MappingNode):
        raise UsageError(f"config file {name}: {expected}")
    for key, value in tree.value:
        place = f"config file {name}, line {key.start_mark.line + 1}: {key.value}"
        if key.value in seen:  # YAML would forget the first
            raise UsageError(f"{place} is there for the second time; join the two")
        if key.value in ("trainer", "model", "data") and not isinstance(value, yaml.MappingNode):
            raise UsageError(f"{place} has no settings; {expected}")
        seen.add(key.value)


def check(command: str, config: Any) -> None:
    """Refuses values that Lightning would take and fail on later, or refuse in many words."""
    trainer, seed = config.trainer, config.seed_everything
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything={seed}: expected an integer from 0 to {2**32 - 1}")
    for name in _ABOVE_0.split() + (["limit_val_batches"] if command == "validate" else []):
        value = trainer[name]
        if isinstance(value, int | float) and not value > 0 and (name, value) != ("max_steps", -1):
            raise UsageError(f"trainer.{name}={value}: expected a number above 0")
    if "://" in str(trainer.default_root_dir):
        raise UsageError(f"trainer.default_root_dir={trainer.default_root_dir}: expected a folder of this machine")
    if re.search("spawn|fork|notebook", str(trainer.strategy)):  # these hand weights over in files of their own kind
        raise UsageError(f"trainer.strategy={trainer.strategy}: expected auto or ddp")
    there = {name for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available()}
    known = there | {"auto"} | ({"gpu"} if there & {"cuda", "mps"} else set())
    if isinstance(trainer.accelerator, str) and trainer.accelerator not in known:
        hint = f"expected one of those here: {', '.join(sorted(known))}\nTo run on the CPU: --trainer.accelerator cpu"
        raise UsageError(f"trainer.accelerator={trainer.accelerator}: {hint}")
    most = 4 * (os.cpu_count() or 1)  # more processes would only fill the memory
    fine = ("auto", *map(str, range(1, most + 1)))
    if (trainer.accelerator == "cpu" or there == {"cpu"}) and str(trainer.devices) not in fine:
        raise UsageError(f"trainer.devices={trainer.devices}: expected a number of CPU processes from 1 to {most}")


def refused(message: str, command: str, config: Any) -> str:
    """Opens what a class says of its arguments with the option and its value, where it does not name it itself."""
    message = " ".join(message.split())
    if own := re.match(r"([\w.]+)=", message):
        return f"model.{message}" if own[1] in vars(config.model) else message
    message = _INSIDE.sub(r"\1: \2", message)
    named = [name for name in vars(config.trainer) if re.search(rf"\b{name}\b", message)]
    name = min(named, key=message.index, default=None)
    return (f"trainer.{name}={config.trainer[name]}: " if name else "") + _short(message) + _options(command)


def explain(message: str, command: str, known: Iterable[str]) -> str:
    """Rewrites a message of jsonargparse, often of many lines: what was wrong, what was expected, what to do.

    Args:
        message: Its text.
        command: The command, such as ``fit``.
        known: The command's flags, such as ``--model.lr``.
    """
    flat, options = " ".join(message.split()), _options(command)
    if unknown := re.search(r"unrecognized arguments: ([^\s=]+)|does not accept \w+ '(\S+)'", flat, re.IGNORECASE):
        name, names = unknown[1] or unknown[2], [k.removeprefix("--") for k in known if not k.endswith(".help")]
        leaves = {n.split(".")[-1]: n for n in names}  # --lr means --model.lr
        bare, leaf = name.lstrip("-"), name.lstrip("-").split(".")[-1]
        near = difflib.get_close_matches(bare, names, 1, 0.8) or [
            leaves[n] for n in difflib.get_close_matches(leaf, leaves, 1, 0.75)
        ]
        hint = f"; did you mean {'--' if unknown[1] else ''}{near[0]}?" if near else ""
        return f"unknown {'option' if unknown[1] else 'config key'} {name}{hint}{options}"
    keys = re.findall(r'Parser key "([\w.]+)"', flat)
    if not keys:
        return _short(flat) + options
    key = max((k for k in keys if k.startswith(keys[0])), key=len)
    if inside := _INSIDE.search(flat):
        return f"{key}={inside[1]}: {_short(inside[2])}{options}"
    value = re.search(r"(?:Given value|Got value|Unable to load config)(?::| )(?!type:) ?(.*?)(?: - Parser.*)?$", flat)
    expected = " or ".join(dict.fromkeys(_TYPES.get(t, t) for t in map("".join, _TYPE.findall(flat))))
    given = f"={_short(value[1], 80)}" if value else ""
    return f"{key}{given}: expected {expected or 'settings, such as --model.lr 0.001'}{options}"


def _options(command: str) -> str:
    return f"\nAll options: python -m lenet_pl {command} --help"


def _short(text: str, length: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]} ..."


def fail(error: Exception, code: int) -> int:
    """Prints what was wrong, under ``LENET_PL_DEBUG=1`` after the traceback; returns ``code``."""
    if os.environ.get("LENET_PL_DEBUG") == "1":
        traceback.print_exception(error)
    text = str(error)
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        text = f"{error.filename or 'the disk'}: {error.strerror}\n"
        text += "Mend that, or choose another folder: --trainer.default_root_dir for the runs, --output for the rest"
    elif not type(error).__module__.startswith("lenet_pl") and not isinstance(error, FloatingPointError):
        text = f"{type(error).__name__}: {_short(text)}\nLENET_PL_DEBUG=1 shows where"
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
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
