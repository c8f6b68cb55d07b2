"""The command line: LightningCLI with run folders, checkpoint names, and errors of one to three lines."""

import argparse
import json
import os
import re
import shutil
import signal
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning's code, not the user's

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lenet_pl import checkpoint
from lenet_pl.atomic import write_atomic
from lenet_pl.callbacks import BestCheckpoint, EpochBar, GracefulStop, RunFolder, Stopped, Summary
from lenet_pl.checkpoint import AtomicCheckpointIO, CheckpointError
from lenet_pl.datamodule import FashionMNISTDataModule
from lenet_pl.errors import UsageError, check, check_file, explain, fail, quiet, refused
from lenet_pl.module import LitLeNet

say = rank_zero_only(print)
TRAINER_DEFAULTS = {"max_epochs": 30, "num_sanity_val_steps": 0, "log_every_n_steps": 1}


class Commands(Trainer):
    """Lightning's Trainer, with the commands that it lacks: LightningCLI takes their arguments from here."""

    def report(self, ckpt_path: str | None = None) -> None:
        """Writes report.html, with curves, confusions, calibration and mistakes, from a checkpoint.

        Args:
            ckpt_path: A file, or best or last of the newest run.
        """

    def export(self, ckpt_path: str | None = None) -> None:
        """Writes the net as an ONNX file for other programs, and proves that it classifies like the checkpoint.

        Args:
            ckpt_path: A file, or best or last of the newest run.
        """

    def demo(self, ckpt_path: str | None = None, port: int = 7860) -> None:
        """Opens a local page that classifies pictures.

        Args:
            ckpt_path: A file, or best or last of the newest run.
            port: TCP port on 127.0.0.1, 1 to 65535.
        """


class CLI(LightningCLI):
    """LightningCLI whose commands work on a checkpoint alone, and whose ``fit`` ends with the test accuracy."""

    def __init__(self, args: list[str]) -> None:
        self.run_folder: RunFolder | None = None
        self.checkpoint: dict[str, Any] = {}  # what --ckpt_path means, loaded
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            LitLeNet,
            FashionMNISTDataModule,
            trainer_class=Commands,
            save_config_callback=None,  # RunFolder writes it
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={**strict, "prog": "lenet-pl", **dict.fromkeys(self.subcommands(), strict)},
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the commands, each with the arguments of its Trainer method that are not for the user."""
        skip = {"model", "datamodule", "dataloaders", "verbose", "weights_only", "return_predictions"}
        return {
            "fit": skip - {"dataloaders", "verbose", "return_predictions"} | {"train_dataloaders", "val_dataloaders"},
            "validate": skip - {"return_predictions"},
            "test": skip - {"return_predictions"},
            "predict": skip - {"verbose"},
            **{name: set() for name in ("report", "export", "demo")},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--name`` and ``--output``."""
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="Folder (export: or file) to write to; predict: the current one, export: the checkpoint's by default.",
        )
        parser.add_argument(
            "--name", type=str | None, default=None, help="Folder under runs/; the name of the config file by default."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; what a checkpoint says ranks below config files and flags."""
        command = args[0]
        try:
            self.config = self._parse(parser, args)
            if path := self._checkpoint_path(command):
                folder = checkpoint.run_folder(path) if command == "fit" else None
                run_config = ["--config", str(folder / "config.yaml")] if folder else []
                self.config = self._parse(parser, [command, *run_config, *args[1:]])
                self.config[command].ckpt_path = str(path)
                config, epoch = self.config[command], self.checkpoint.get("epoch", -1)
                if command == "fit" and config.trainer.max_epochs and config.trainer.max_epochs <= epoch:
                    least = f"{path} is in epoch {epoch + 1}: expected at least that; or leave the option out"
                    raise UsageError(f"trainer.max_epochs={config.trainer.max_epochs}: {least}")
                if command == "validate" and not config.data.val_size:
                    raise UsageError("data.val_size=0: no images to validate on; expected more than 0, or use test")
                say(f"checkpoint: {path}")
        except (argparse.ArgumentError, TypeError, KeyError, ValueError) as error:
            known = self._subcommand_parsers[command]._option_string_actions
            raise UsageError(explain(str(error), command, known)) from error

    def _parse(self, parser: LightningArgumentParser, args: list[str]) -> Any:
        for flag, value in pairwise([*args, ""]):
            if flag.split("=")[0] in ("-c", "--config") and (file := flag.partition("=")[2] or value):
                check_file(file)
        config = parser.parse_args(args)
        check(args[0], config[args[0]])
        return config

    def _checkpoint_path(self, command: str) -> Path | None:
        """Finds and loads the checkpoint and makes its settings the defaults; every command but ``fit`` needs one."""
        name = self.config[command].ckpt_path
        if name is None and command == "fit":
            return None
        path = checkpoint.find("best" if name is None else name, self._runs())
        try:
            self.checkpoint = checkpoint.load(path)
        except CheckpointError as error:
            folder = checkpoint.run_folder(path)
            sound = checkpoint.newest_sound(folder) if folder and command == "fit" else None
            if sound is None:
                raise
            print(f"{str(error).splitlines()[0]}\nGoing on from {sound} instead.", file=sys.stderr)
            path, self.checkpoint = sound, checkpoint.load(sound)
        needed = ("seed", "epoch", "loops", "optimizer_states", "lr_schedulers")
        if lacking := [key for key in needed if key not in self.checkpoint]:
            raise CheckpointError(f"Checkpoint {str(path)!r} is not one of lenet_pl: it lacks {', '.join(lacking)}")
        try:
            defaults = {f"model.{key}": value for key, value in self.checkpoint["hyper_parameters"].items()}
            for key, value in self.checkpoint.get("datamodule_hyper_parameters", {}).items():
                if key != "data_dir" or Path(value).is_dir():
                    defaults[f"data.{key}"] = value
            self._subcommand_parsers[command].set_defaults(
                {**defaults, "seed_everything": self.checkpoint["seed"] % 2**32}
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"Checkpoint {str(path)!r} is not one of lenet_pl: {error}") from error
        return path

    def _parse_ckpt_path(self) -> None:
        """Does nothing: ``parse_arguments`` has used the checkpoint's settings, below the explicit ones."""

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer; what they refuse is wrong use."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException, ModuleNotFoundError) as error:
            raise self._refused(error) from error
        if self.checkpoint:
            try:
                self.model.load_state_dict(self.checkpoint["state_dict"])
            except RuntimeError as error:
                path, variant = self.config[self.subcommand].ckpt_path, self.model.hparams["variant"]
                raise CheckpointError(
                    f"Checkpoint {path!r} holds another net than model.variant={variant}: "
                    f"{str(error).splitlines()[1].strip()[:150]}\n"
                    "Leave the --model options out, or give another one with --ckpt_path"
                ) from error

    def _refused(self, error: Exception) -> UsageError:
        return UsageError(refused(str(error), self.config.subcommand, self.config[self.config.subcommand]))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer with the callbacks, logger and checkpoint plugin of the command."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        callbacks = trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        training = self.subcommand == "fit" and not trainer.fast_dev_run
        tensorboard = training and trainer.logger in (None, True) and find_spec("tensorboard") is not None
        if training:
            folder = checkpoint.run_folder(Path(config.ckpt_path)) if config.ckpt_path else None
            step = self.checkpoint.get("global_step", 0)
            self.run_folder = RunFolder(self._runs() / self._name(), self._saved_config(), folder, step, tensorboard)
            callbacks += [self.run_folder, GracefulStop()]
            if trainer.enable_checkpointing is not False:
                options: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}
                if self.datamodule.val_size and trainer.limit_val_batches != 0:
                    callbacks.append(BestCheckpoint(filename="best", monitor="val_acc", mode="max", **options))
                callbacks.append(ModelCheckpoint(filename="last", **options))
        if not training:
            kwargs["enable_checkpointing"] = False
        if self.subcommand == "predict":  # one process writes all rows
            kwargs |= {"devices": 1, "num_nodes": 1}
        if trainer.enable_progress_bar is not False and sys.stdout.isatty():
            callbacks.append(EpochBar(refresh_rate=5))  # at Lightning's 100 a second its thread slows the steps
        elif trainer.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = False
        if self.subcommand == "fit" and trainer.enable_model_summary is not False:
            callbacks.append(Summary())
        plugins = trainer.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        kwargs["callbacks"] = callbacks
        kwargs["enable_model_summary"] = False
        if trainer.logger in (None, True):
            kwargs["logger"] = False  # RunFolder adds TensorBoard when the folder is known
        return super().instantiate_trainer(**kwargs)

    def _runs(self) -> Path:
        """Returns the folder of all runs."""
        return Path(self.config[self.config.subcommand].trainer.default_root_dir or ".") / "runs"

    def _name(self) -> str:
        """Returns the recipe's name: ``--name``, the last config file's, or ``lenet``."""
        config = self.config[self.subcommand]
        files = [str(f) for f in config.get("config") or []]
        name = config.name or (Path(files[-1]).stem if files else "lenet")
        if not re.fullmatch(r"[\w.+-]{1,100}", name) or set(name) == {"."}:
            raise ValueError(f"name={name!r}: expected 1 to 100 letters, digits, '-', '_', '.' or '+', for a folder")
        return name

    def _saved_config(self) -> str:
        """Returns the complete configuration as YAML: ``fit --config`` on it repeats the run."""
        config = self.config[self.subcommand].clone()
        config.name, config.ckpt_path = self._name(), None
        config.pop("config", None)
        text: str = self._parser(self.subcommand).dump(config, skip_none=False)
        return text

    def fit(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str | None) -> None:
        """Trains, then scores the best checkpoint on the test set."""
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        except (ValueError, MisconfigurationException) as error:  # what only the data and the checkpoint could tell
            raise self._refused(error) from error
        finally:
            run = self.run_folder
            made = run is not None and not run.resumed and run.path != run.parent  # it is the parent until then
            if run and made and not self.trainer.global_step:
                shutil.rmtree(run.path, ignore_errors=True)  # of a run that never started
        if self.run_folder is None or not self.trainer.checkpoint_callbacks:
            return
        files = [self.run_folder.path / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        path = next((f for f in files if f.exists()), None)
        if path is None:
            raise UsageError("no training step was run, so there is nothing to score; allow more trainer.max_time")
        self.test(model, datamodule, str(path))
        self.report(model, datamodule, str(path))
        say(f"run folder: {self.run_folder.path}\nnext: python -m lenet_pl test --ckpt_path {path}")

    def report(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str) -> None:
        """Writes report.html and its pictures from a checkpoint alone."""
        from lenet_pl.apps import report  # matplotlib takes a second

        if self.trainer.is_global_zero:
            model.to(self.trainer.strategy.root_device)
            say(f"report: {report.write(Path(ckpt_path), model, datamodule, TRAINER_DEFAULTS)}")

    def export(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str) -> None:
        """Writes the net as a file for other programs."""
        from lenet_pl.apps import export

        export.write(Path(ckpt_path), model, datamodule, self.config.export.output)

    def demo(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str, port: int) -> None:
        """Serves the page until Ctrl-C."""
        from lenet_pl.apps import demo

        demo.serve(model, datamodule, port)

    def validate(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str) -> None:
        """Scores a checkpoint on the validation images."""
        self.trainer.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        metrics = {name: round(float(value), 6) for name, value in self.trainer.callback_metrics.items()}
        say(f"val_acc {metrics['val_acc']:.2%}  val_loss {metrics['val_loss']:.4f}")

    def predict(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str) -> None:
        """Classifies the user's pictures, or the test images."""
        from lenet_pl.apps import predict

        batches = self.trainer.predict(model, datamodule=datamodule, ckpt_path=ckpt_path)
        predict.write(Path(self.config.predict.output or "."), datamodule, torch.cat(batches))  # type: ignore[arg-type]

    def test(self, model: LitLeNet, datamodule: FashionMNISTDataModule, ckpt_path: str) -> None:
        """Scores a checkpoint on the test images and writes test.json; with another ``tta`` a file beside it."""
        self.trainer.test(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        metrics = {name: round(float(value), 6) for name, value in self.trainer.callback_metrics.items()}
        path, tta = Path(ckpt_path), model.hparams["tta"]
        own = tta if self.subcommand == "fit" else self.checkpoint["hyper_parameters"]["tta"]
        file = (checkpoint.run_folder(path) or path.parent) / ("test.json" if tta == own else f"test_tta_{tta}.json")
        result = {
            "test_acc": metrics["test_acc"],
            "test_loss": metrics["test_loss"],
            "n": int(metrics["n"]),
            "ckpt_path": str(path),
            "seed": self.config[self.subcommand].seed_everything,
        }
        if self.trainer.is_global_zero:
            write_atomic(file, (json.dumps(result, indent=2) + "\n").encode())
            score = f"{metrics['test_acc']:.2%}  (loss {metrics['test_loss']:.4f}, {result['n']} images)"
            print(f"Test accuracy: {score}" + ("" if tta == own else f", model.tta={tta}; see {file.name}"))


def run(args: list[str]) -> int:
    """Runs one command; returns its exit code (0, 1, 2, 130 or 143)."""
    quiet()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        CLI(args)
    except Stopped as stop:
        name = "Ctrl-C" if stop.signum == signal.SIGINT else signal.Signals(stop.signum).name
        remedy = f"; go on with: python -m lenet_pl fit --ckpt_path {stop.path}" if stop.path else ""
        say(f"stopped by {name}{remedy}", file=sys.stderr)
        return 130 if stop.signum == signal.SIGINT else 143
    except SystemExit as leave:  # --help, SIGTERM, and Lightning's own answer to Ctrl-C
        return 130 if isinstance(leave.__context__, KeyboardInterrupt) else int(leave.code or 0)
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        return fail(error, 2)
    except Exception as error:
        return fail(error, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
