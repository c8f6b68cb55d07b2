"""What a command of trials.py asks for: its trials, the settings of each, and the study that holds them."""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import yaml
from optuna.trial import Trial

from lenet_pl.errors import UsageError

FIT = [sys.executable, "-m", "lenet_pl", "fit"]


class Plan:
    """What the command line asks for."""

    def __init__(self, args: argparse.Namespace, rest: list[str]) -> None:
        self.args = args
        self.recipe = Path(args.config[-1]).stem
        self.runs = Path(args.root) / "runs"
        self.metric = "test_acc" if args.final else "val_acc"
        local = sqlalchemy.URL.create("sqlite", database=str(self.runs / "trials.db"), query={"timeout": "60"})
        self.storage = args.storage or local.render_as_string()
        self.engine = sqlalchemy.create_engine(self.storage)
        configs = [f"--config={config}" for config in args.config]
        self.fit = [*FIT, *configs, "--threads=1", *rest, f"--trainer.default_root_dir={args.root}"]
        # The settings that differ, and their values: {"model.dropout": "0,0.05"}
        self.space: dict[str, str] = {}
        for item in args.grid or args.search:
            name, _, values = item.partition("=")
            self.space[name] = values
        self.settings = self._ask_fit()  # those that all trials share
        self.study = f"{self.recipe}-{digest(self.settings, self.space, bool(args.search), args.final)}"
        self.images = 10_000 if args.final else self.settings["data.val_size"]
        if not self.images:
            remedy = "add --data.val_size 10000, or --final if it is chosen and the test images shall score it"
            raise UsageError(f"{self.recipe} has no validation images to compare trials by: {remedy}")
        self.runs.mkdir(parents=True, exist_ok=True)
        self.jobs: dict[str, tuple[dict[str, str], int]] = {}  # settings and seed of a trial by its name in the queue
        if args.search:
            self.jobs = {f"trial {k}": ({}, 0) for k in range(args.trials)}
            return
        choices: list[Any] = [values.split(",") for values in self.space.values()]
        for seed, *drawn in itertools.product(range(args.seeds), *choices):
            cell = dict(zip(self.space, drawn, strict=True))
            self.jobs[" ".join([*flags(cell), f"seed {seed}"])] = (cell, seed)

    def _ask_fit(self) -> dict[str, Any]:
        """Returns all settings that decide a result; ``fit`` knows them, and refuses what it does not know."""
        probe = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        drawn = {name: suggest(probe, name, values) for name, values in self.space.items()}
        command = [*self.fit, *flags(drawn), "--print_config"]
        asked = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if asked.returncode:  # it has said why
            sys.exit(asked.returncode)
        config = yaml.safe_load(asked.stdout)
        settings = {"threads": config["threads"]}
        for group in ("trainer", "model", "data"):
            settings |= {f"{group}.{name}": value for name, value in config[group].items()}
        for name in ("trainer.default_root_dir", "data.data_dir", *self.space):  # another machine has other folders
            settings.pop(name, None)
        return settings


def flags(settings: dict[str, Any]) -> list[str]:
    """Returns settings as arguments of ``fit``."""
    return [f"--{name}={value}" for name, value in settings.items()]


def digest(*settings: Any) -> str:
    """Returns eight hexadecimal digits that stand for these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def suggest(trial: Trial, name: str, values: str) -> Any:
    """Returns a trial's value of one setting: the queued one of a grid, or one that the search draws."""
    bounds, _, log = values.partition(":")
    low, dots, high = bounds.partition("..")
    try:
        if dots and log not in ("", "log"):
            raise ValueError(f"{log!r} is no scale")
        if not dots:
            return trial.suggest_categorical(name, values.split(","))
        if low.isdecimal() and high.isdecimal():
            return trial.suggest_int(name, int(low), int(high), log=bool(log))
        return trial.suggest_float(name, float(low), float(high), log=bool(log))
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name}={values}: {error}; expected such as 0,0.05 or 1e-3..3e-2:log") from error
