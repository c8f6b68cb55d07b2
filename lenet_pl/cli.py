"""LightningCLI: from the options of a command to its data, model and trainer.

Settings come from four places, the later winning over the earlier: the defaults in the signatures; what the checkpoint
or its run folder says; config files; flags.
"""

import os
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning's code, not the user's

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lenet_pl import blocks, checkpoint, configs, runs
from lenet_pl.callbacks import BestCheckpoint, EpochBar, LastCheckpoint, RunFolder, RunLogger, Summary
from lenet_pl.datamodule import FashionMNISTDataModule
from lenet_pl.errors import CheckpointError, UsageError, explain
from lenet_pl.module import LitLeNet

# ``fit --help`` opens with these.
COMMON = (
    "--config --ckpt_path --name --threads --seed_everything --trainer.max_epochs --trainer.accelerator "
    "--trainer.precision --model.lr --model.schedule --model.dropout --model.weight_decay --data.batch_size "
    "--data.val_size --data.flip --data.shift"
).split()
# Settings that change what the numbers in a checkpoint mean: a run cannot go on with others.
FIXED = {"model": ("variant",), "data": ("val_size", "split_seed", "mean", "std")}
# Trainer's own defaults are None here, or not good for so small a net.
TRAINER_DEFAULTS = {"max_epochs": 30, "num_sanity_val_steps": 0}
# More threads gain nothing for this net at its batch sizes.
MOST_THREADS = 4


class CLI(LightningCLI):
    """The options of one command, and what they describe.

    Args:
        command: Such as ``fit``.
        args: What follows the command.

    Attributes:
        path: The checkpoint's file, if the command starts from one.
        checkpoint: What it holds.
        run_folder: Keeps the run folder of a training.

    Raises:
        UsageError: If an option is unknown or its value is wrong.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.path: Path | None = None
        self.checkpoint: dict[str, Any] = {}
        self.run_folder: RunFolder | None = None
        super().__init__(
            LitLeNet,
            FashionMNISTDataModule,
            save_config_callback=None,  # RunFolder writes the configuration
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"lenet-pl {command}"},
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what this command takes beside trainer, model and data."""
        text, number = str | None, int | None
        words = "A file, or best, last or pretrained" + (" or auto." if self.command == "fit" else ".")
        parser.add_argument("--ckpt_path", type=text, default=None, help=words)
        parser.add_argument("--name", type=text, default=None, help="Folder in runs/; by default the config file's name.")
        parser.add_argument("--threads", type=number, default=None, help="CPU threads; they are part of the result.")
        if self.command == "fit":
            parser.add_argument("--test", type=bool, default=True, help="Whether to score the test images at the end.")
        if self.command in ("predict", "export"):
            place = "A folder" if self.command == "predict" else "A folder or file"
            parser.add_argument("--output", type=text, default=None, help=f"{place} to write to.")
        if self.command == "demo":
            parser.add_argument("--port", type=int, default=7860, help="TCP port on 127.0.0.1, 1 to 65535.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line, and puts it on top of what the checkpoint says."""
        if {"-h", "--help"} & set(args):
            print(_help(parser, self.command))
            sys.exit(0)
        args, pictures = _take_values(args, "--data.images")
        args, recipe = configs.read_in(args)
        try:
            only_given = not any(arg.startswith("--print_config") for arg in args)  # that prints the defaults too
            given = parser.parse_args(args, defaults=not only_given)
            given = _with_home_folders(given)
            if pictures:
                given["data.images"] = pictures
            self.root = Path(given.get("trainer.default_root_dir") or ".") / "runs"
            self.name = _checked_name(given.get("name") or recipe)
            self.path, stored = self._find_checkpoint(given)
            self.stored = base = self._parse_stored(parser, stored)
            for key in ("trainer.callbacks", "trainer.logger", "trainer.plugins"):
                if given.get(key):
                    given[key] = _joined(base.get(key), given[key])
            self.config = parser.parse_object(given, base)
        except (ArgumentError, TypeError, KeyError) as error:
            raise UsageError(explain(str(error), self.command, parser.get_defaults().keys())) from error
        _check(self.command, self.config)
        self._check_resume()

    def _find_checkpoint(self, given: Namespace) -> tuple[Path | None, dict[str, Any]]:
        """Finds and loads the checkpoint that is asked for.

        Returns:
            Its file, or None for a training from the start; and the settings that it brings.
        """
        word = given.get("ckpt_path")
        self.folder: Path | None = None  # the run to go on with
        if self.command == "fit":
            if word is None:
                return None, {}
            if word == "auto":
                newest = runs.all_runs(self.root, self.name or "lenet")[:1]
                if not newest:
                    return None, {}
                self.folder = newest[0]
                if not (self.folder / runs.LAST).is_file():  # stopped in its first epoch: it begins again
                    return None, _read_settings(self.folder)
                word = str(self.folder / runs.LAST)
        elif word is None:
            word = "best" if runs.all_runs(self.root, self.name) or not runs.PRETRAINED.is_file() else "pretrained"
        path = runs.find(word, self.root, self.name)
        self.checkpoint = checkpoint.load_ours(path, resume=self.command == "fit")
        if self.command == "fit":
            self.folder = runs.folder_of(path)
            if self.folder:
                return path, _read_settings(self.folder)
        data = dict(self.checkpoint["datamodule_hyper_parameters"])
        if not Path(data.get("data_dir", "")).is_dir():  # it was another machine's
            data.pop("data_dir", None)
        settings = {"model": self.checkpoint["hyper_parameters"], "data": data}
        settings |= {"seed_everything": self.checkpoint["seed"] % 2**32}
        return path, settings | {"trainer": {"precision": self.checkpoint.get("precision")}}

    def _parse_stored(self, parser: LightningArgumentParser, stored: dict[str, Any]) -> Namespace:
        """Parses the settings that the checkpoint brings, on top of the defaults."""
        try:
            return parser.parse_object(stored)
        except (ArgumentError, TypeError, KeyError) as error:
            why = explain(str(error), self.command, ()).splitlines()[0]
            raise UsageError(f"Checkpoint {str(self.path)!r} has settings that this version does not know: {why}") from error

    def _check_resume(self) -> None:
        """Refuses to go on with settings that do not fit the checkpoint."""
        config, path = self.config, self.path
        if self.command == "validate" and not config.data.val_size:
            raise UsageError("data.val_size=0: there are no images to validate on; expected more than 0, or use test")
        if self.command != "fit" or path is None:
            return
        for group, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
            for name in FIXED[group]:
                old, new = self.checkpoint[key].get(name), config[group][name]
                if old != new:
                    raise UsageError(
                        f"{group}.{name}={new}: {path} was trained with {old}, and goes on with that only\n"
                        "Leave the option out, or begin a new run without --ckpt_path"
                    )
        if blocks.within_epoch(self.checkpoint):
            raise UsageError(f"Checkpoint {str(path)!r} was written within an epoch: give the one of a finished epoch")
        done, most = self.checkpoint["epoch"] + 1, config.trainer.max_epochs
        if most and most < done:
            raise UsageError(f"trainer.max_epochs={most}: {path} has finished epoch {done}; expected at least that")

    def before_instantiate_classes(self) -> None:
        """Sets the number of threads."""
        config = self.config
        processes = int(config.trainer.devices) if str(config.trainer.devices).isdecimal() else 1
        if config.threads is None:
            config.threads = max(1, min(torch.get_num_threads(), MOST_THREADS) // max(1, processes))
        torch.set_num_threads(config.threads)
        if processes > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))  # or Lightning sets a number of its own

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; what their signatures refuse is wrong use."""
        try:
            super().instantiate_classes()
        except UsageError:
            raise
        except (ValueError, TypeError, MisconfigurationException, ModuleNotFoundError) as error:
            raise UsageError(explain(str(error), self.command, ())) from error
        if self.checkpoint:
            self._load_weights()

    def _load_weights(self) -> None:
        try:
            self.model.load_state_dict(self.checkpoint["state_dict"])
        except RuntimeError as error:
            what = str(error).splitlines()[1].strip()[:150]
            raise CheckpointError(
                f"Checkpoint {str(self.path)!r} holds another net than model.variant={self.config.model.variant}: {what}\n"
                "Leave the --model options out, or give another file with --ckpt_path"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer with the callbacks, the logger and the checkpoint plugin of the command."""
        options = self.config_init.trainer
        asked = options.callbacks or []
        asked = asked if isinstance(asked, list) else [asked]
        ours: list[Any] = []
        training = self.command == "fit" and not options.fast_dev_run and not options.barebones
        if training:
            name = self.folder.parent.name if self.folder else self.name or "lenet"
            self.run_folder = RunFolder(self.root / name, self._saved_config(name), self.folder)
            ours.append(self.run_folder)
            if options.enable_checkpointing is not False:
                if self.datamodule.val_size and options.limit_val_batches != 0:
                    ours.append(BestCheckpoint())
                ours.append(LastCheckpoint())
            if options.enable_model_summary is not False and not _has(asked, ModelSummary):
                ours.append(Summary())
            kwargs["log_every_n_steps"] = options.log_every_n_steps or 1  # of blocks: an epoch may be one
        else:
            kwargs["enable_checkpointing"] = None if options.barebones else False
        if options.logger in (None, True):
            tensorboard = self.run_folder is not None and find_spec("tensorboard") is not None
            step = self.checkpoint.get("global_step", 0)
            kwargs["logger"] = RunLogger(self.run_folder, step) if self.run_folder and tensorboard else False
        if not _has(asked, ProgressBar) and not options.barebones:
            if options.enable_progress_bar or (options.enable_progress_bar is None and sys.stdout.isatty()):
                ours.append(EpochBar())
            else:
                kwargs["enable_progress_bar"] = False
        if self.command == "predict":  # one process writes all rows
            kwargs |= {"devices": 1, "num_nodes": 1}
        plugins = options.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), checkpoint.AtomicCheckpointIO()]
        kwargs["callbacks"] = asked + ours
        kwargs["enable_model_summary"] = None if options.barebones else False
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        # Lightning's handlers wait for other processes inside the handler, save within an epoch, and end with exit code
        # 0 (its issue 19916); commands.py has its own.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def _saved_config(self, name: str) -> str:
        """Returns the complete configuration as YAML: ``fit --config`` on it repeats the run."""
        config = self.config.clone()
        config.name, config.ckpt_path = name, None
        config.pop("config", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults that YAML cannot hold, see _readable
            text = self.parser.dump(config, skip_none=False, format="yaml")
        return str(yaml.safe_dump(_readable(yaml.safe_load(text)), sort_keys=False, allow_unicode=True))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Reads config.yaml of a run folder."""
    path = folder / runs.CONFIG
    settings = yaml.safe_load(configs.read(str(path)))
    settings.pop("ckpt_path", None)
    return dict(settings)


def _readable(settings: Any) -> Any:
    """Leaves out values that jsonargparse could not write: they are defaults of a signature, such as a device."""
    if isinstance(settings, list):
        return [_readable(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    kept = {}
    for key, value in settings.items():
        if not str(value).startswith("Unable to serialize instance"):
            kept[key] = _readable(value)
    return kept


def _joined(stored: Any, given: Any) -> Any:
    """Joins the callbacks (loggers, plugins) of a run with those given now: one given again replaces the stored one."""
    if not isinstance(given, list):
        return given
    joined = list(stored) if isinstance(stored, list) else []
    places = {id(entry): place for place, entry in enumerate(joined)}
    for entry in given:
        match = next((old for old in joined if id(old) in places and old.class_path == entry.class_path), None)
        if match is None:
            joined.append(entry)
        else:
            joined[places.pop(id(match))] = entry
    return joined


def _with_home_folders(settings: Any) -> Any:
    """Expands ``~`` at the beginning of any text: no other text begins so."""
    if isinstance(settings, Namespace):
        for key, value in vars(settings).items():
            settings[key] = _with_home_folders(value)
    elif isinstance(settings, list):
        return [_with_home_folders(value) for value in settings]
    elif isinstance(settings, str) and re.match(r"~[\w.-]*(/|$)", settings):
        return str(Path(settings).expanduser())
    return settings


def _take_values(args: list[str], option: str) -> tuple[list[str], list[str]]:
    """Takes the values of an option out of the arguments: file names are text, and YAML would read ``[a].png`` as a list.

    Returns:
        The other arguments, and the values: all words after the option up to the next option.
    """
    rest, values, taking = [], [], False
    for arg in args:
        if arg == option or arg.startswith(f"{option}="):
            taking = True
            values += [arg.partition("=")[2]] if "=" in arg[: len(option) + 1] else []
        elif taking and not arg.startswith("--"):
            values.append(arg)
        else:
            taking = False
            rest.append(arg)
    return rest, values


def _checked_name(name: str | None) -> str | None:
    """Refuses a name that no folder can have."""
    if name is not None and (not re.fullmatch(r"[^/\\\x00-\x1f\x7f]{1,100}", name) or name.strip(" .") == ""):
        raise UsageError(f"name={name!r}: expected 1 to 100 characters for a folder in runs/, without slashes")
    return name


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _help(parser: LightningArgumentParser, command: str) -> str:
    """Returns jsonargparse's help, with the options that people change most in front."""
    text = parser.format_help()
    described = re.split(r"\n(?=  -)", text)
    first = [part.split("\n\n")[0] for name in COMMON for part in described if re.search(rf"{name}\b(?![.\w])", part[:60])]
    title = f"lenet-pl {command}: the options that people change most\n"
    return "\n".join([title, *dict.fromkeys(first), "", "All options", "", text])


def _check(command: str, config: Namespace) -> None:
    """Refuses values that Lightning would take, and fail on later or refuse in many words."""
    trainer, seed = config.trainer, config.seed_everything
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything={seed}: expected an integer from 0 to {2**32 - 1}")
    above_0 = "max_epochs max_steps num_nodes accumulate_grad_batches gradient_clip_val check_val_every_n_epoch".split()
    above_0 += ["val_check_interval", "limit_train_batches", "limit_test_batches"]
    above_0 += ["limit_val_batches"] if command == "validate" else []
    for name in above_0:
        value = trainer[name]
        if isinstance(value, int | float) and not value > 0 and (name, value) != ("max_steps", -1):
            raise UsageError(f"trainer.{name}={value}: expected a number above 0")
    most = 4 * (os.cpu_count() or 1)  # more would only fill the memory
    if config.threads is not None and not 1 <= config.threads <= most:
        raise UsageError(f"threads={config.threads}: expected an integer from 1 to {most}")
    if "://" in str(trainer.default_root_dir):
        raise UsageError(f"trainer.default_root_dir={trainer.default_root_dir}: expected a folder of this machine")
    if re.search("spawn|fork|notebook", str(trainer.strategy)):  # these hand weights over in files of their own kind
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
