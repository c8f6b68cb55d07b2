"""Refuses wrong use before any work: values out of range, and settings that do not fit a checkpoint."""

import os
import re
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lenet_pl import runs
from lenet_pl.errors import UsageError, require, shorten
from lenet_pl.names import decoded, one_line
from lenet_pl.start import Start

# Options of the Trainer that must be above 0.
ABOVE_0 = (
    "max_epochs",
    "max_steps",
    "num_nodes",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_train_batches",
    "limit_test_batches",
    "limit_predict_batches",
)
# Settings, or how their names begin, in which ``auto`` may differ from a finished run.
WITHOUT_EFFECT = (
    "ckpt_path",
    "data.data_dir",
    "data.steps_per_execution",
    "name",
    "test",
    "threads",
    "trainer.default",
    "trainer.enable",
    "trainer.log",
)
# Options of the Trainer that decide when a training ends. EarlyStopping is a callback, and so is Timer.
ENDS = ("callbacks", "max_epochs", "max_steps", "max_time")
# Settings in which a command must agree with the checkpoint it starts from: the net, its pixels, and the split. With
# another split, for example, it would validate with images that the net was trained on.
FIXED = {
    "hyper_parameters": ("model.variant", "model.batch_norm", "model.composed_kernels"),
    "datamodule_hyper_parameters": ("data.mean", "data.std", "data.val_size", "data.split_seed"),
}


def take_run_name(given: Namespace) -> str | None:
    """Takes the config files out of ``given``; returns the run's name: ``--name``, or the last file's, or None."""
    files = given.pop("config", None)
    name: str | None = given.get("name")
    if name is None and files:
        name = Path(files[-1]).stem
    if name is not None:
        fits = re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,100}", name) is not None and name.strip(" .") != ""
        fits = fits and name == decoded(name) and len(name.encode()) <= 255
        require(
            fits,
            f"name={name!r}",
            "a folder in runs/: 1 to 100 characters (255 bytes) in UTF-8, without slashes",
        )
    return name


def check(command: str, config: Namespace) -> None:
    """Refuses values on which Lightning would fail later, or which it would refuse with a long message."""
    trainer, seed = config.trainer, config.seed_everything
    require(type(seed) is int and 0 <= seed < 2**32, f"seed_everything={seed}", f"an integer from 0 to {2**32 - 1}")
    options = (*ABOVE_0, "limit_val_batches") if command == "validate" else ABOVE_0
    for option in options:
        value = trainer[option]
        is_number = isinstance(value, int | float)
        is_endless = option in ("max_epochs", "max_steps") and value == -1
        fits = not is_number or value > 0 or is_endless
        require(fits, f"trainer.{option}={value}", "a number above 0")
    require(command == "fit" or not trainer.barebones, "trainer.barebones=true", "false, because it keeps no scores")
    pictures = config.data.images
    require(
        command == "predict" or not pictures,
        f"data.images={pictures}",
        "the command predict, which alone reads it",
    )
    if command == "validate":
        expected = "images that were held out from the training; this net has none, so use test"
        require(config.data.val_size != 0, "data.val_size=0", expected)
    most = 4 * (os.cpu_count() or 1)  # more would only use memory
    threads = config.threads
    require(threads is None or 1 <= threads <= most, f"threads={threads}", f"an integer from 1 to {most}")
    root, strategy = str(trainer.default_root_dir), str(trainer.strategy)
    fits = "://" not in root and root == decoded(root)
    require(fits, f"trainer.default_root_dir={one_line(root)}", "a folder on this machine, with a name in UTF-8")
    # Processes of these kinds return the weights in a temporary file that is not one of our checkpoints.
    fits = re.search("spawn|fork|notebook", strategy) is None
    require(fits, f"trainer.strategy={strategy}", "auto or ddp")
    devices = str(trainer.devices)
    fits = not devices.isdecimal() or 1 <= int(devices) <= most  # Lightning would start any number of CPU processes
    require(fits, f"trainer.devices={devices}", f"a number from 1 to {most}")


def is_finished(folder: Path, old: Namespace, new: Namespace) -> bool:
    """Says whether a run is finished and would end there with ``new`` too. ``old`` are the run's own settings.

    Raises:
        UsageError: If it is finished but was trained with other settings.
    """
    if not (folder / runs.FINISHED).is_file():
        return False
    for name in ENDS:
        if _unordered(old.trainer[name]) != _unordered(new.trainer[name]):
            return False
    for name, value in new.items():
        if not name.startswith(WITHOUT_EFFECT) and _unordered(old.get(name)) != _unordered(value):
            change = f"{name}: {shorten(str(old.get(name)), 100)} before, {shorten(str(value), 100)} now"
            raise UsageError(f"{folder} is finished, but with other settings ({change}); choose another --name")
    return True


def _unordered(value: Any) -> Any:
    """Sorts a list, such as that of the callbacks, because ``+=`` may have joined it in another order."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def check_fits(command: str, config: Namespace, start: Start) -> None:
    """Refuses settings with which the numbers of a checkpoint would mean something else."""
    assert start.path
    remedy = "Leave that option or config file out"
    if command == "fit":
        remedy += "; a new run begins without --ckpt_path"
    for group, settings in FIXED.items():
        for setting in settings:
            new = config[setting]
            old = start.checkpoint[group].get(setting.split(".")[1], new)  # an older checkpoint lacks newer settings
            require(old == new, f"{setting}={new}", f"{old}, as in {one_line(start.path)}\n{remedy}")


def check_resume(config: Namespace, start: Start) -> None:
    """Refuses to resume from a checkpoint with settings that do not fit it."""
    path, checkpoint, resumed = start.path, start.checkpoint, start.resumed
    for callback in config.trainer.callbacks or []:
        if callback.class_path.endswith(("LearningRateFinder", "BatchSizeFinder")):
            lr, size = checkpoint["hyper_parameters"]["lr"], checkpoint["datamodule_hyper_parameters"]["batch_size"]
            raise UsageError(
                f"{callback.class_path} searches at the beginning of a training, and would begin this one again\n"
                f"Resume with what it found: --trainer.callbacks null --model.lr {lr} --data.batch_size {size}"
            )
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    is_within_epoch = batches["current"]["ready"] > 0 and not batches["is_last_batch"]  # max_steps ended it there
    if is_within_epoch or epoch["processed"] < epoch["started"]:
        raise UsageError(f"Checkpoint {str(path)!r} was written within an epoch: give one of a finished epoch")
    limits = {"max_epochs": ("epoch", epoch["processed"]), "max_steps": ("step", checkpoint["global_step"])}
    for option, (unit, done) in limits.items():
        limit = config.trainer[option]
        least = done if resumed else done + 1  # a finished run may be scored again
        fits = limit in (None, -1) or limit >= least
        require(fits, f"trainer.{option}={limit}", f"at least {least}, because {path} has finished {unit} {done}")
