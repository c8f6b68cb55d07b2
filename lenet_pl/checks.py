"""Refuses wrong use before any work: values out of range, and settings that do not fit a checkpoint."""

import os
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry

from lenet_pl import blocks
from lenet_pl.errors import UsageError

# Settings that change what the numbers in a checkpoint mean. A resumed run must keep them.
FIXED = {"model": ("variant",), "data": ("val_size", "split_seed", "mean", "std")}


def checked_name(name: str | None) -> str | None:
    """Returns the name of a run, and refuses one that no folder can have."""
    if name is not None and (not re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,100}", name) or name.strip(" .") == ""):
        raise UsageError(f"name={name!r}: expected 1 to 100 characters for a folder in runs/, without slashes")
    return name


def check(command: str, config: Namespace) -> None:
    """Refuses values on which Lightning would fail later, or which it would refuse with a long message."""
    trainer, seed = config.trainer, config.seed_everything
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything={seed}: expected an integer from 0 to {2**32 - 1}")
    above_0 = [
        "max_epochs",
        "max_steps",
        "num_nodes",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "check_val_every_n_epoch",
    ]
    above_0 += ["val_check_interval", "limit_train_batches", "limit_test_batches"]
    above_0 += ["limit_val_batches"] if command == "validate" else []
    for name in above_0:
        value = trainer[name]
        if isinstance(value, int | float) and not value > 0 and (name, value) != ("max_steps", -1):
            raise UsageError(f"trainer.{name}={value}: expected a number above 0")
    if command == "validate" and not config.data.val_size:
        raise UsageError("data.val_size=0: there are no images to validate on; expected more than 0, or use test")
    most = 4 * (os.cpu_count() or 1)  # more would only use memory
    if config.threads is not None and not 1 <= config.threads <= most:
        raise UsageError(f"threads={config.threads}: expected an integer from 1 to {most}")
    if "://" in str(trainer.default_root_dir):
        raise UsageError(f"trainer.default_root_dir={trainer.default_root_dir}: expected a folder on this machine")
    if re.search("spawn|fork|notebook", str(trainer.strategy)):  # these pass weights on in files of another kind
        raise UsageError(f"trainer.strategy={trainer.strategy}: expected auto or ddp")
    available = {name for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available()}
    known = available | {"auto"} | ({"gpu"} if available & {"cuda", "mps"} else set())
    if isinstance(trainer.accelerator, str) and trainer.accelerator not in known:
        hint = f"expected one of {', '.join(sorted(known))} on this machine"
        raise UsageError(
            f"trainer.accelerator={trainer.accelerator}: {hint}\nTo run on the CPU: --trainer.accelerator cpu"
        )
    fine = ("auto", *map(str, range(1, most + 1)))
    if (trainer.accelerator == "cpu" or available == {"cpu"}) and str(trainer.devices) not in fine:
        raise UsageError(f"trainer.devices={trainer.devices}: expected a number of CPU processes from 1 to {most}")


def check_resume(config: Namespace, path: Path, checkpoint: dict[str, Any]) -> None:
    """Refuses to resume from a checkpoint with settings that do not fit it."""
    for group, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        for name in FIXED[group]:
            old, new = checkpoint[key].get(name), config[group][name]
            if old != new:
                raise UsageError(
                    f"{group}.{name}={new}: {path} was trained with {old}, and resumes only with that\n"
                    "Leave the option out, or begin a new run without --ckpt_path"
                )
    if blocks.within_epoch(checkpoint):
        raise UsageError(f"Checkpoint {str(path)!r} was written within an epoch: give one of a finished epoch")
    done, most = checkpoint["epoch"] + 1, config.trainer.max_epochs
    if most and most < done:
        raise UsageError(f"trainer.max_epochs={most}: {path} has finished epoch {done}; expected at least that")
