"""LightningCLI: from the options of a command to its data, model and trainer.

Settings come from three places, of which a later one wins over an earlier one: the defaults in the signatures, the
checkpoint or its run folder, and the command line with its config files and flags, of which the one further right wins.
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning's code, not the user's

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lenet_pl import checks, configs, runs, start
from lenet_pl.callbacks import RunWriter
from lenet_pl.checkpoint import fill
from lenet_pl.console import help_text, say
from lenet_pl.datamodule import FashionMNISTDataModule
from lenet_pl.errors import UsageError, explain, require
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line
from lenet_pl.trainer import TRAINER_DEFAULTS, set_threads, trainer_options

# Options of the Trainer whose values are classes with options of their own. LISTS take several of them.
LISTS = ("trainer.callbacks", "trainer.logger", "trainer.plugins")
OBJECTS = (*LISTS, "trainer.profiler", "trainer.strategy")


class CLI(LightningCLI):
    """The options of one command, such as ``fit``, and the data, model and trainer that they describe.

    Raises:
        UsageError: If an option is unknown or its value is wrong.
    """

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.start = start.Start()
        self.root = Path("runs")  # the folder of all runs
        self.run_name: str | None = None  # which the command names, by --name or a config file
        self.given_objects: dict[str, Any] = {}  # the values of OBJECTS as they were given
        self.is_finished = False  # whether ``auto`` has found its run finished
        self.run_writer: RunWriter | None = None  # the callback that writes the run folder of a training
        super().__init__(
            LitLeNet,
            FashionMNISTDataModule,
            save_config_callback=None,  # RunWriter writes the configuration
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "prog": f"lenet-pl {command}"},
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser with our own ``--config``."""
        parser = LightningArgumentParser(**kwargs)
        words = "A file of settings in YAML, or the name of a recipe such as best."
        parser.add_argument("-c", "--config", action=configs.ConfigFile, help=words)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of this command that are not about trainer, model or data."""
        words = "A file, or best, last or pretrained."
        if self.command == "fit":
            words = "last: resume the newest run; auto: begin this run, or resume it; or a file to begin a run from."
        # The type is str, although None is the default: otherwise a value such as #1 would be read as YAML.
        parser.add_argument("--ckpt_path", type=str, default=None, help=words)
        parser.add_argument("--name", type=str, default=None, help="Folder in runs/ (default: the config's).")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; results depend on them.")
        # Only fit uses it. The others accept it, because it stands in a run's config.yaml, which they take too.
        parser.add_argument("--test", type=bool, default=True, help="Whether fit scores the test images at the end.")
        if self.command in ("predict", "export"):
            parser.add_argument("--output", type=str, default=None, help="Folder to write to, or export's file.")
        if self.command == "demo":
            parser.add_argument("--port", type=int, default=7860, help="TCP port on 127.0.0.1, 1 to 65535.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line. Its settings win over those of the checkpoint."""
        if {"-h", "--help"} & set(args):
            print(help_text(parser, self.command))
            sys.exit(0)
        # jsonargparse would take only one picture, and would read a file name such as [a] as a list.
        pictures = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        pictures.add_argument("--data.images", dest="names", nargs="+", action="extend")
        try:
            taken, args = pictures.parse_known_args(args)
            prints = [arg for arg in args if arg.startswith("--print_config")]
            given = parser.parse_args([arg for arg in args if arg not in prints], defaults=False)
            if taken.names:
                given["data.images"] = taken.names
            given = configs.with_home_folders(given)
            self.root = Path(given.get("trainer.default_root_dir") or ".") / "runs"
            self.run_name = checks.take_run_name(given)
            word, name = given.get("ckpt_path"), given.get("name")
            if self.command == "fit":
                self.start = start.of_training(word, self.root, name, self.run_name)
            else:
                self.start = start.of_evaluation(word, self.root, self.run_name)
            stored = self._parse_stored(parser)
            self._join_objects(args, given, stored)
            self.config = parser.parse_object(given, stored)
        except (ArgumentError, TypeError, KeyError) as error:
            raise UsageError(explain(str(error), self.command, parser.get_defaults().keys())) from error
        if prints:
            self._print_config(prints[0])
        checks.check(self.command, self.config)
        if self.start.resumed and self.config.ckpt_path == "auto":
            self.is_finished = checks.is_finished(self.start.resumed, parser.parse_object(stored), self.config)
        if self.start.path and not self.is_finished:
            checks.check_fits(self.command, self.config, self.start)
            if self.command == "fit":
                checks.check_resume(self.config, self.start)

    def _parse_stored(self, parser: LightningArgumentParser) -> Namespace:
        """Parses the settings of the checkpoint, without adding defaults."""
        try:
            stored: Namespace = parser.parse_object(self.start.settings, defaults=False)
        except (ArgumentError, TypeError, KeyError) as error:
            why = explain(str(error), self.command, ()).splitlines()[0]
            source = self.start.path or self.start.resumed
            raise UsageError(f"{str(source)!r} has settings of another version or class: {why}") from error
        return stored

    def _join_objects(self, args: list[str], given: Namespace, stored: Namespace) -> None:
        """Joins callbacks and the like that ``+=`` adds with those of the run. Given by ``=`` they replace them."""
        for key in LISTS:
            for settings in (stored, given):
                if isinstance(settings.get(key), Namespace):
                    settings[key] = [settings[key]]
            if any(arg.startswith(f"--{key}+") for arg in args) and isinstance(stored.get(key), list):
                given[key] = configs.joined(stored[key], given[key])
        self.given_objects = {key: given.get(key, stored.get(key)) for key in OBJECTS}

    def _print_config(self, option: str) -> NoReturn:
        """Prints the configuration and ends the process. ``option`` may say what to leave out."""
        skipped = set(filter(None, option.partition("=")[2].split(",")))
        fits = skipped <= {"skip_null", "skip_default"}
        require(fits, option, "skip_null or skip_default after the equals sign, or nothing")
        leave_out = {"skip_none": "skip_null" in skipped, "skip_default": "skip_default" in skipped}
        print(self._as_yaml(self.config, **leave_out), end="")
        sys.exit(0)

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer, and says which checkpoint is used. A value that they refuse is wrong use."""
        self.config.threads = set_threads(self.config.threads, str(self.config.trainer.devices))
        try:
            super().instantiate_classes()
        except UsageError:
            raise
        except (ValueError, TypeError, MisconfigurationException, ModuleNotFoundError) as error:
            text = explain(str(error), self.command, ())
            accelerator = self.config.trainer.accelerator
            if accelerator not in ("auto", "cpu") and not torch.accelerator.is_available():
                text += f"\nTo run on the CPU instead of {accelerator}: --trainer.accelerator cpu"
            raise UsageError(text) from error
        path = self.start.path
        if path is None:
            return
        say(f"checkpoint: {one_line(path)}")
        fill(self.model, self.start.checkpoint, path)
        if self.command not in ("fit", "validate"):  # both validate the net as it trains
            self.model.simplify()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer. A training gets a run folder."""
        options = self.config_init.trainer
        if self.command == "fit" and not options.fast_dev_run and not options.barebones:
            resumed = self.start.resumed
            if resumed:
                parent = resumed.absolute().parent
                name = self.config.name or parent.name  # the folder may have been moved
            else:
                name = self.run_name or self.config.name or runs.DEFAULT_NAME
                parent = self.root / name
            self.run_writer = RunWriter(parent, self._saved_config(name), resumed, self.start.path)
        kwargs |= trainer_options(options, self.run_writer, self.start.checkpoint.get("global_step", 0))
        if self.command == "predict":  # one process writes all rows
            kwargs |= {"devices": 1, "num_nodes": 1}
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]  # the variable RANK may belong to another job
        # Lightning's signal handlers wait for other processes, save within an epoch, and end with exit code 0 (its
        # issue 19916). Ours are in process.py.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def _saved_config(self, name: str) -> str:
        """Returns the complete configuration as YAML: ``fit --config`` on it repeats the run, with these versions."""
        config = self.config.clone()
        config.name, config.ckpt_path = name, None
        now = datetime.now().astimezone().isoformat()
        return f"# Written by {runs.versions()}, at {now}.\n{self._as_yaml(config, skip_none=False)}"

    def _as_yaml(self, config: Namespace, **options: Any) -> str:
        """Returns a configuration as YAML, with callbacks and the like as they were given.

        The defaults of their classes are left out, because such a default may be an object that YAML cannot hold.
        """
        config = config.clone()
        for key, value in self.given_objects.items():
            config[key] = value or config[key]
        return str(self.parser.dump(config, format="yaml", **options))
