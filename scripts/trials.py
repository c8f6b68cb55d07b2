"""Trains a recipe many times, on one machine or on many: with several seeds, over a grid, or in search of settings.

    python scripts/trials.py --config configs/lenet.yaml --seeds 5
    python scripts/trials.py --config configs/lenet.yaml --grid model.dropout=0,0.05 data.shift=0,1 --seeds 3
    python scripts/trials.py --config configs/lenet.yaml --search model.lr=1e-3..3e-2:log data.shift=0..3 --trials 40

To go on after a kill or a power cut, give the same command again: what is finished is not run again, and what was cut
short resumes from its last epoch. To use more machines, give it on each (or as a SLURM array) with the same
``--storage postgresql://USER@HOST/DATABASE``: all take from one queue, kept by Optuna, and take over the trials of a
command that died. ``optuna-dashboard sqlite:///runs/trials.db`` shows them.

A trial is a process, ``fit --ckpt_path auto`` into ``runs/<recipe>-<hash of the settings>-seed<S>``; further arguments,
such as ``--trainer.max_epochs 30``, go to ``fit``. A search draws its settings with TPE, and ends a trial early that
does worse than the median. Bounds without a point draw whole numbers: ``0..3`` means 0, 1, 2 or 3, and ``0.0..3.0`` all
between. Trials are compared by validation accuracy and read no test image; ``--final`` scores a recipe that is chosen
on the test images. The table goes to the screen and to ``runs/<study>.md``; the last line is JSON.

Where there is a GPU, ``fit`` chooses it by itself, and the trials of a machine share it; if its memory is too small for
so many, give fewer ``--workers``. Of several GPUs a trial would take all; give the command once for each GPU instead,
the first time as ``CUDA_VISIBLE_DEVICES=0 python scripts/trials.py …``: they take from one queue, too.
"""

import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import yaml

from lenet_pl import runs
from lenet_pl.errors import UsageError, shorten, tell

try:
    import optuna
    import sqlalchemy
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError:
    print("error: trials need Optuna: pip install 'lenet_pl[trials]'", file=sys.stderr)
    sys.exit(2)

FIT = [sys.executable, "-m", "lenet_pl", "fit"]
PAUSE = 1.0  # seconds between two looks at the trials
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
OWN = {"seed_everything", "name", "ckpt_path", "test"}  # options of fit that each trial sets for itself
COLUMNS = ("test_acc", "val_acc", "train_acc", "train_loss", "seconds", "s/epoch")
# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; for more the last one, a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
# Queues a killed trial again, or one whose command was killed; ten times at most, in case the trial is the cause.
queue_again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=10)
stopped: list[int] = []  # the exit code of each signal that asked this command to stop


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
        self.space = {name: values for name, _, values in (item.partition("=") for item in args.grid or args.search)}
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
        for seed, *values in itertools.product(range(args.seeds), *(v.split(",") for v in self.space.values())):
            cell = dict(zip(self.space, values, strict=True))
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
    """Returns eight letters that stand for these settings and no others."""
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


@contextlib.contextmanager
def alone(plan: Plan) -> Iterator[None]:
    """Keeps other commands away from the queue: those of this machine by a file, all others by PostgreSQL."""
    with (plan.runs / "trials.lock").open("w") as file, plan.engine.connect() as connection:
        fcntl.flock(file, fcntl.LOCK_EX)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(5)")
        yield


def open_study(plan: Plan) -> optuna.Study:
    """Opens the queue, and adds the trials that are neither in it nor done."""
    beat = plan.args.heartbeat
    epochs = plan.settings.get("trainer.max_epochs") or 0
    median = optuna.pruners.MedianPruner(n_warmup_steps=max(0, epochs) // 5)
    with alone(plan):
        storage = optuna.storages.RDBStorage(
            plan.storage, heartbeat_interval=beat, grace_period=6 * beat, heartbeat_stale_trial_callback=queue_again
        )
        study = optuna.create_study(
            storage=storage,
            study_name=plan.study,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # it keeps away from what is running
            pruner=median if plan.args.search else optuna.pruners.NopPruner(),
        )
        there = {trial.user_attrs["job"] for trial in study.trials if trial.state != TrialState.FAIL}
        for job, (settings, seed) in plan.jobs.items():
            if job not in there:
                study.enqueue_trial(settings, user_attrs={"job": job, "seed": seed})
    return study


def wanted(study: optuna.Study, plan: Plan, *states: TrialState) -> list[FrozenTrial]:
    """Returns the trials in these states that this command asks for; an earlier one may have asked for more."""
    return [trial for trial in study.get_trials(deepcopy=False, states=states) if trial.user_attrs["job"] in plan.jobs]


def claim(study: optuna.Study, plan: Plan) -> Trial | None:
    """Takes a trial out of the queue, if there is one; ``Study.ask`` would make up another when it is empty."""
    storage: Any = study._storage
    with alone(plan):  # SQLite locks only when it writes: two commands could read that the same trial waits
        optuna.storages.fail_stale_trials(study)  # those of dead commands wait again
        for waiting in wanted(study, plan, TrialState.WAITING):
            storage.record_heartbeat(waiting._trial_id)  # first, or nobody notices if this command dies here
            storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
            return Trial(study, waiting._trial_id)
    return None


def work(study: optuna.Study, plan: Plan) -> None:
    """Runs trials until none is left, here or elsewhere: if another command dies, this one takes its trials over."""
    running: list[Generator[bool]] = []
    try:
        while not stopped and wanted(study, plan, TrialState.WAITING, TrialState.RUNNING):
            while len(running) < plan.args.workers and (trial := claim(study, plan)):
                running.append(train(study, trial, plan))
            running = [training for training in running if next(training, False)]
            time.sleep(PAUSE)
    finally:
        for training in running:
            training.close()


def train(study: optuna.Study, trial: Trial, plan: Plan) -> Generator[bool]:
    """Runs a trial, then tells Optuna and the user how it ended. The generator yields True as long as it runs."""
    settings = {name: suggest(trial, name, values) for name, values in plan.space.items()}
    seed = trial.user_attrs["seed"]
    name = f"{plan.recipe}-{digest(plan.settings, settings)}-seed{seed}"  # no other settings write there
    own = [f"--seed_everything={seed}", f"--name={name}", "--ckpt_path=auto", f"--test={str(plan.args.final).lower()}"]
    parent = plan.runs / name
    parent.mkdir(parents=True, exist_ok=True)
    log = parent / "fit.log"
    value, state, note = None, TrialState.PRUNED, "pruned"
    try:
        code = yield from follow(trial, [*plan.fit, *flags(settings), *own], log)
        if code == 0:
            found = result(parent, plan.metric)
            for column, number in found.items():
                trial.set_user_attr(column, number)
            value, state = found[plan.metric], TrialState.COMPLETE
            note = f"{plan.metric} {value:.2%}"
        elif code:
            errors = re.findall("^error: (.*)", log.read_text("utf-8", "replace"), re.MULTILINE)
            state = TrialState.FAIL
            why = shorten(errors[-1]) if errors and code in (1, 2) else "it was killed"  # an older error may be there
            note = f"exit code {code}: {why} ({log})"
        ended = study.tell(trial, value, state, skip_if_finished=True)
    except UpdateFinishedTrialError:  # this command was taken for dead, and another has the trial
        return
    if code not in (None, 0, 1, 2):  # something killed it
        queue_again(study, ended)
    print(f"{' '.join([*flags(settings), name])}  {note}  {progress(study, plan)}", flush=True)


def follow(trial: Trial, command: list[str], log: Path) -> Generator[bool, None, int | None]:
    """Runs the process of a trial and reports its epochs; returns its exit code, or None if it was pruned."""
    storage: Any = trial.storage
    fit, beat = None, 0.0
    try:
        while True:
            if time.monotonic() >= beat:
                storage.record_heartbeat(trial._trial_id)
                beat = time.monotonic() + storage.get_heartbeat_interval()
            if fit is None:  # the log is the lock of its folder: one that lost its command may still run there
                with log.open("ab") as file, contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    fit = subprocess.Popen(command, stdout=file, stderr=file)
            code = fit.poll() if fit else None  # before the rows are read, so that none is missed
            known = storage.get_trial(trial._trial_id).intermediate_values
            for row in runs.read_results(newest(log.parent)):
                if row["val_acc"] and int(row["epoch"]) not in known:
                    trial.report(float(row["val_acc"]), int(row["epoch"]))
            if code is not None or trial.should_prune():
                return code
            yield True
    except GeneratorExit:  # this command ends before the trial
        with contextlib.suppress(UpdateFinishedTrialError, StorageInternalError):
            storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        raise
    finally:
        if fit:
            fit.terminate()
            fit.wait()


def newest(parent: Path) -> Path:
    """Returns the newest run in a folder, or the folder itself if there is none."""
    return next(iter(runs.all_runs(parent.parent, parent.name)), parent)


def result(parent: Path, metric: str) -> dict[str, float]:
    """Reads the newest run in a folder: the accuracy of its best epoch, and those of training of the last."""
    run = newest(parent)
    rows = runs.read_results(run)
    validated = [float(row["val_acc"]) for row in rows if row["val_acc"]]
    if not rows or not (validated or metric == "test_acc"):
        raise UsageError(f"{parent} has no {metric} to compare trials by: leave out what keeps fit from it")
    seconds = [float(row["seconds"]) for row in rows]
    found = {"seconds": sum(seconds), "s/epoch": statistics.median(seconds)}
    found |= {name: float(rows[-1][name]) for name in ("train_acc", "train_loss")}
    if validated:
        found["val_acc"] = max(validated)
    if metric == "test_acc":
        found["test_acc"] = json.loads((run / runs.SCORE).read_text("utf-8"))["test_acc"]
    return found


def progress(study: optuna.Study, plan: Plan) -> str:
    """Says how many trials are done, and how long the others will take."""
    trials = wanted(study, plan, *TrialState)
    seconds = [trial.duration.total_seconds() for trial in trials if trial.state in DONE and trial.duration]
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    left = running + sum(trial.state == TrialState.WAITING for trial in trials)
    text = f"{len(seconds)}/{len(seconds) + left} done"
    if seconds and left:
        side_by_side = min(running + 1, left)  # the place of the trial that just ended is free
        text += f", {statistics.fmean(seconds) * left / side_by_side / 60:.1f} minutes left"
    return text


def summary(values: list[float]) -> dict[str, float]:
    """Returns mean, sample standard deviation and 95 % interval of the mean; of one value the mean alone."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean}
    std = statistics.stdev(values)
    half = T[min(len(values) - 1, len(T)) - 1] * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "95 % from": mean - half, "95 % to": mean + half}


def show(name: str, stats: dict[str, float]) -> str:
    """Formats a mean and, if there is one, its standard deviation; accuracies in per cent."""
    scale, form, unit = (100, ".2f", " %") if name.endswith("acc") else (1, ".4g", "")
    return " ± ".join(f"{scale * stats[key]:{form}}" for key in ("mean", "std") if key in stats) + unit


def report(study: optuna.Study, plan: Plan) -> int:
    """Prints and writes the table, a row for each settings, the best first; returns 1 if a trial failed."""
    done = {trial.user_attrs["job"]: trial for trial in wanted(study, plan, *DONE)}
    trials = [done[job] for job in plan.jobs if job in done]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    cells: dict[str, list[FrozenTrial]] = {}
    for trial in complete:
        cells.setdefault(" ".join(f"{k}={v}" for k, v in trial.params.items()) or plan.recipe, []).append(trial)
    columns = [name for name in COLUMNS if any(name in trial.user_attrs for trial in complete)]
    rows, numbers = [["settings", "n", *columns, "95 % interval", "binomial error"]], []
    for settings, cell in sorted(cells.items(), key=lambda item: -statistics.fmean(t.values[0] for t in item[1])):
        stats = {name: summary([trial.user_attrs[name] for trial in cell]) for name in columns}
        score = stats[plan.metric]
        error = math.sqrt(score["mean"] * (1 - score["mean"]) / plan.images)
        seeds = {trial.user_attrs["seed"]: trial.value for trial in cell}
        numbers.append({"settings": cell[0].params, "n": len(cell), "seeds": seeds, **stats, "binomial_error": error})
        interval = f"{100 * score['95 % from']:.2f} to {100 * score['95 % to']:.2f} %" if "std" in score else ""
        shown = [show(name, stats[name]) for name in columns]
        rows.append([settings, str(len(cell)), *shown, interval, f"{100 * error:.2f} %"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, re.sub(r"[^|]", "-", lines[0]))
    command = re.sub(r"(?<=://)[^/@\s]*@", "", shlex.join(sys.argv))  # without user and password
    count = f"{len(complete)} trials complete, {len(trials) - len(complete)} pruned"
    if len(trials) < len(plan.jobs):
        count += f", {len(plan.jobs) - len(trials)} failed; the same command tries them again"
    text = "\n".join([f"`python {command}`", "", *lines, "", count])
    (plan.runs / f"{plan.study}.md").write_text(text + "\n", "utf-8")
    print(text)
    print(json.dumps({"study": plan.study, "metric": plan.metric, "images": plan.images, "table": numbers}))
    return int(len(trials) < len(plan.jobs))


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Returns the options of this command, and the arguments of ``fit``."""
    parser = argparse.ArgumentParser(
        usage="trials.py --config FILE [--seeds N] [--grid NAME=A,B ... | --search NAME=LOW..HIGH ...] [fit arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("--config", required=True, action="append", help="the recipe; of several the later one wins")
    add("--seeds", type=int, default=5, help="of each settings: 0, 1, … (default 5)")
    add("--grid", nargs="+", default=[], metavar="NAME=A,B", help="trains all combinations")
    add("--search", nargs="+", default=[], metavar="NAME=LOW..HIGH[:log]", help="draws the settings; seed 0")
    add("--trials", type=int, default=20, help="of a search (default 20)")
    add("--final", action="store_true", help="score a chosen recipe on the test images")
    add("--workers", type=int, default=cores, help=f"trials at a time (default {cores}, the cores)")
    add("--storage", help="URL of a database (default SQLite in runs/trials.db)")
    add("--heartbeat", type=int, default=10, help="seconds; silent for 6 of them is dead (default 10)")
    add("--trainer.default_root_dir", dest="root", default=".", help="where runs/ lies (default .)")
    args, rest = parser.parse_known_args()
    args.root = os.path.expanduser(args.root)  # noqa: PTH111 (Path.expanduser raises for an unknown user)
    if sum(map(bool, (args.grid, args.search, args.final))) > 1:
        parser.error("--grid, --search and --final exclude each other: the test images are for what is chosen")
    if ".." in "".join(args.grid):
        parser.error("--grid takes single values, such as model.dropout=0,0.05; --search takes a range")
    names = [item.partition("=")[0] for item in args.grid or args.search]
    if len(set(names)) < len(names):
        parser.error("a setting appears twice; give all its values at once, such as model.dropout=0,0.05")
    given = {arg.partition("=")[0].removeprefix("--") for arg in rest if arg.startswith("--")}
    shared = {"data.val_size", "trainer.default_root_dir"}  # one for all trials of a command
    refused = sorted(OWN & {*names, *given} | shared & {*names})
    if refused:
        parser.error(
            f"{refused[0]} is the same for all trials or belongs to each; --seeds says how many seeds to train"
        )
    for name in ("seeds", "trials", "workers", "heartbeat"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} {vars(args)[name]}: expected at least 1")
    return args, rest


def main() -> int:
    """Runs the trials that are missing, then prints and writes the table; returns the exit code."""
    args, rest = parse()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        signal.signal(number, lambda *_, code=code: stopped.append(code))
    study = None
    try:
        plan = Plan(args, rest)
        study = open_study(plan)
        print(f"study {plan.study}: {progress(study, plan)}, {args.workers} at a time", flush=True)
        work(study, plan)
        if stopped:
            print("Stopped; the same command goes on where this one ended.", file=sys.stderr)
            return stopped[0]
        return report(study, plan)
    except UsageError as error:
        return tell(error, 2)
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:  # ImportError: no driver
        scheme = (args.storage or "sqlite").split(":")[0]
        return tell(UsageError(f"{scheme}: {shorten(str(error.__cause__ or error))}"), 1 if study else 2)
    except OSError as error:
        return tell(error, 1)


if __name__ == "__main__":
    sys.exit(main())
