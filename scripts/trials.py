"""Trains a recipe many times, on one machine or on many: with several seeds, over a grid, or in search of settings.

    python scripts/trials.py --config configs/lenet.yaml --seeds 5
    python scripts/trials.py --config configs/lenet.yaml --grid model.dropout=0,0.05 data.shift=0,1 --seeds 3
    python scripts/trials.py --config configs/lenet.yaml --search model.lr=1e-3..3e-2:log data.shift=0..3 --trials 40

To go on after a kill or a power cut, give the same command again: what is finished is not run again, and what was cut
short resumes from its last epoch. To use more machines, give it on each (or as a SLURM array) with the same
``--storage postgresql://USER@HOST/DATABASE``: all take from one queue, kept by Optuna, and take over the trials of a
worker that died. ``optuna-dashboard sqlite:///runs/trials.db`` shows them.

A trial is a process, ``fit --ckpt_path auto`` into ``runs/<recipe>-<hash of the settings>-seed<S>``; further arguments,
such as ``--trainer.max_epochs 30``, go to ``fit``. A search draws its settings with TPE, from whole numbers between
whole bounds, and ends a trial early that does worse than the median. Trials are compared by validation accuracy and
read no test image; ``--final`` scores a recipe that is chosen on the test images. The table goes to the screen and to
``runs/<study>.md``; the last line is JSON.
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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from lenet_pl import runs
from lenet_pl.errors import UsageError, shorten, tell

try:
    import optuna
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import FrozenTrial, Trial, TrialState
    from sqlalchemy import event
    from sqlalchemy.exc import ArgumentError, DBAPIError
except ImportError:
    print("error: trials need Optuna: pip install 'lenet_pl[trials]'", file=sys.stderr)
    sys.exit(2)

FIT = [sys.executable, "-m", "lenet_pl", "fit"]
PAUSE = 1.0  # seconds between two looks at a trial
WAITING, RUNNING, FAIL = TrialState.WAITING, TrialState.RUNNING, TrialState.FAIL
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
COLUMNS = ("test_acc", "val_acc", "train_acc", "train_loss", "seconds", "s/epoch")
# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; for more the last one, a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Queues a trial anew whose worker died or that was killed; not for ever, because it may be what kills.
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
queue_again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=10)
stopped: list[int] = []  # the exit codes of what asked this command to stop


class Plan:
    """What the command line asks for.

    Attributes:
        space: The settings that differ, and their values: ``{"model.dropout": "0,0.05"}``.
        settings: All others.
        jobs: What a trial is given, settings and seed, by its name in the queue.
    """

    def __init__(self, args: argparse.Namespace, rest: list[str]) -> None:
        self.args, self.recipe, self.runs = args, Path(args.config).stem, Path(args.root) / "runs"
        self.metric = "test_acc" if args.final else "val_acc"
        self.fit = [*FIT, "--config", args.config, "--threads", "1", *rest, "--trainer.default_root_dir", args.root]
        self.space = {name: values for name, _, values in (item.partition("=") for item in args.grid or args.search)}
        if ".." in "".join(args.grid):
            raise UsageError("--grid takes single values, such as model.dropout=0,0.05; --search takes a range")
        self.settings = self._ask_fit()
        self.images = 10_000 if args.final else self.settings["data.val_size"]
        if not self.images:
            remedy = "add --data.val_size 10000, or --final if it is chosen and the test images shall score it"
            raise UsageError(f"{args.config} has no validation images to compare trials by: {remedy}")
        self.jobs: dict[str, tuple[dict[str, str], int]] = {f"trial {k}": ({}, 0) for k in range(args.trials)}
        if not args.search:
            choices = itertools.product(*(values.split(",") for values in self.space.values()))
            cells = [dict(zip(self.space, choice, strict=True)) for choice in choices]
            seeds = range(args.seeds)
            self.jobs = {" ".join([*flags(cell), f"seed {seed}"]): (cell, seed) for seed in seeds for cell in cells}
        self.study = f"{self.recipe}-{digest(self.settings, self.space, bool(args.search), args.final)}"

    def _ask_fit(self) -> dict[str, Any]:
        """Returns all settings that decide a result; ``fit`` knows them, and refuses what it does not know."""
        probe = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
        command = [*self.fit, *flags({name: suggest(probe, name, values) for name, values in self.space.items()})]
        asked = subprocess.run([*command, "--print_config"], stdout=subprocess.PIPE, text=True)
        if asked.returncode:  # it has said why
            sys.exit(asked.returncode)
        config = yaml.safe_load(asked.stdout)
        settings: dict[str, Any] = {"threads": config["threads"]}
        for group in ("trainer", "model", "data"):
            settings |= {f"{group}.{name}": value for name, value in config[group].items()}
        for name in ("trainer.default_root_dir", "data.data_dir", *self.space):  # another machine has other folders
            settings.pop(name, None)
        return settings

    def command(self, settings: dict[str, Any], seed: int) -> tuple[list[str], Path]:
        """Returns the command of a trial, and the folder of its runs, which no other settings share."""
        name = f"{self.recipe}-{digest(self.settings, settings)}-seed{seed}"
        own = ["--seed_everything", str(seed), "--name", name, "--ckpt_path", "auto"]
        return [*self.fit, *flags(settings), *own, "--test", str(self.args.final).lower()], self.runs / name


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
        if not dots:
            return trial.suggest_categorical(name, values.split(","))
        if low.isdecimal() and high.isdecimal():
            return trial.suggest_int(name, int(low), int(high), log=bool(log))
        return trial.suggest_float(name, float(low), float(high), log=bool(log))
    except ValueError as error:
        raise UsageError(f"{name}={values}: {error}; expected such as 0,0.05 or 1e-3..3e-2:log") from error


def open_study(plan: Plan) -> optuna.Study:
    """Opens the queue, and adds the trials that are neither in it nor done."""
    url, heartbeat = plan.args.storage, plan.args.heartbeat
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    signs = {"heartbeat_interval": heartbeat, "grace_period": 6 * heartbeat}
    for attempt in range(5):
        try:
            storage = optuna.storages.RDBStorage(url, options, heartbeat_stale_trial_callback=queue_again, **signs)
            break
        except DBAPIError:  # perhaps another machine is making the same tables just now
            if attempt == 4:
                raise
            time.sleep(PAUSE)
    if url.startswith("sqlite"):  # it locks only when it writes: two workers could read that the same trial waits
        storage.engine.dispose()
        event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    median = optuna.pruners.MedianPruner(n_warmup_steps=(plan.settings["trainer.max_epochs"] or 0) // 5)
    with storage.engine.connect() as connection, (plan.runs / "trials.lock").open("w") as file:  # one command at a time
        fcntl.flock(file, fcntl.LOCK_EX)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(5)")
        study = optuna.create_study(
            storage=storage,
            study_name=plan.study,
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # it keeps away from what is running
            pruner=median if plan.args.search else optuna.pruners.NopPruner(),
        )
        there = {trial.user_attrs["job"] for trial in study.trials if trial.state != FAIL}
        for job, (settings, seed) in plan.jobs.items():
            if job not in there:
                study.enqueue_trial(settings, user_attrs={"job": job, "seed": seed})
    return study


def claim(study: optuna.Study) -> Trial | None:
    """Takes a trial out of the queue, which no other worker gets; ``Study.ask`` would make up a new one in the end."""
    optuna.storages.fail_stale_trials(study)  # those of dead workers wait again
    storage: Any = study._storage
    for trial in study.get_trials(deepcopy=False, states=(WAITING,)):
        storage.record_heartbeat(trial._trial_id)  # first, or nobody notices if this worker dies here
        with contextlib.suppress(UpdateFinishedTrialError):  # another worker has even finished it
            if storage.set_trial_state_values(trial._trial_id, RUNNING):
                return Trial(study, trial._trial_id)
    return None


def work(study: optuna.Study, plan: Plan) -> None:
    """Runs trials until none is left, here or on other machines."""
    while not stopped:
        if trial := claim(study):
            with contextlib.suppress(UpdateFinishedTrialError):  # this worker was taken for dead, another has the trial
                train(study, trial, plan)
        elif study.get_trials(deepcopy=False, states=(RUNNING,)):
            time.sleep(PAUSE)  # if its worker dies, this one takes it over
        else:
            return


def train(study: optuna.Study, trial: Trial, plan: Plan) -> None:
    """Runs a trial to its end, and tells Optuna and the user how it ended."""
    settings = {name: suggest(trial, name, values) for name, values in plan.space.items()}
    command, parent = plan.command(settings, trial.user_attrs["seed"])
    parent.mkdir(parents=True, exist_ok=True)
    log = parent / "fit.log"
    code = follow(trial, command, log, plan)
    if stopped:
        trial.storage.set_trial_state_values(trial._trial_id, WAITING)
        return
    note = "pruned"
    if code is None:
        study.tell(trial, state=PRUNED, skip_if_finished=True)
    elif code == 0:
        found = result(parent, plan.metric)
        for name, value in found.items():
            trial.set_user_attr(name, value)
        study.tell(trial, found[plan.metric], skip_if_finished=True)
        note = f"{plan.metric} {found[plan.metric]:.2%}"
    else:
        failed = study.tell(trial, state=FAIL, skip_if_finished=True)
        errors = re.findall("^error: (.*)", log.read_text("utf-8", "replace"), re.MULTILINE)
        note = f"exit code {code}: {shorten(errors[-1]) if errors else ''} ({log})"
        if code == 2:  # wrong use, so the other trials would end as this one
            raise UsageError(note)
        if code != 1:  # something killed it
            queue_again(study, failed)
    print(f"{' '.join([*flags(settings), parent.name])}  {note}  {progress(study)}", flush=True)


def follow(trial: Trial, command: list[str], log: Path, plan: Plan) -> int | None:
    """Runs the process of a trial and reports its epochs; returns its exit code, or None if it was stopped."""
    storage: Any = trial.storage
    epoch, beat, process = max(storage.get_trial(trial._trial_id).intermediate_values, default=0), 0.0, None
    try:
        while not stopped:
            if time.monotonic() >= beat:
                storage.record_heartbeat(trial._trial_id)
                beat = time.monotonic() + plan.args.heartbeat
            process = process or launch(command, log)
            code = process.poll() if process else None  # before the rows are read, so that none is missed
            for folder in runs.all_runs(plan.runs, log.parent.name)[:1]:
                for row in runs.read_results(folder):
                    if row["val_acc"] and int(row["epoch"]) > epoch:
                        epoch = int(row["epoch"])
                        trial.report(float(row["val_acc"]), epoch)
            if code is not None:
                return code
            if process and trial.should_prune():
                break
            time.sleep(PAUSE)
    finally:
        if process:
            process.terminate()
            process.wait()
    return None


def launch(command: list[str], log: Path) -> subprocess.Popen[bytes] | None:
    """Starts a trial, unless one that lost its worker still runs in this folder: the log is its lock."""
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        return subprocess.Popen(command, stdout=file, stderr=file)


def progress(study: optuna.Study) -> str:
    """Says how many trials are done, and how long the others will take."""
    trials = study.get_trials(deepcopy=False)
    done = [t.duration.total_seconds() for t in trials if t.state in (COMPLETE, PRUNED) and t.duration]
    left = [t.state for t in trials if t.state in (RUNNING, WAITING)]
    side_by_side = min(left.count(RUNNING) + 1, len(left))
    time_left = f", {statistics.fmean(done) * len(left) / side_by_side / 60:.1f} minutes left" if done and left else ""
    return f"{len(done)}/{len(done) + len(left)} done{time_left}"


def result(parent: Path, metric: str) -> dict[str, float]:
    """Reads the newest run in a folder: the accuracy of its best epoch, and those of training of the last."""
    for folder in runs.all_runs(parent.parent, parent.name)[:1]:
        rows = runs.read_results(folder)
        seconds = [float(row["seconds"]) for row in rows]
        found = {"train_acc": float(rows[-1]["train_acc"]), "train_loss": float(rows[-1]["train_loss"])}
        found |= {"seconds": sum(seconds), "s/epoch": statistics.median(seconds)}
        if validated := [float(row["val_acc"]) for row in rows if row["val_acc"]]:
            found["val_acc"] = max(validated)
        if metric == "test_acc":
            found["test_acc"] = json.loads((folder / runs.SCORE).read_text("utf-8"))["test_acc"]
        if metric in found:
            return found
    raise UsageError(f"{parent} has no {metric} to compare trials by: leave out what keeps fit from it")


def summary(values: list[float]) -> dict[str, float]:
    """Returns mean, sample standard deviation and 95 % interval of the mean; of one value the mean alone."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {"mean": mean}
    std = statistics.stdev(values)
    half = T[min(len(values) - 1, len(T)) - 1] * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "95 % from": mean - half, "95 % to": mean + half}


def show(name: str, values: list[float], joint: str = " ± ") -> str:
    """Formats a mean and its standard deviation, or an interval; accuracies in per cent."""
    if name.endswith("acc"):
        return joint.join(f"{100 * value:.2f}" for value in values) + " %" * bool(values)
    return joint.join(f"{value:.4g}" for value in values)


def report(study: optuna.Study, plan: Plan) -> int:
    """Prints and writes the table, a row for each settings, the best first; returns 1 if a trial failed."""
    done = {trial.user_attrs["job"]: trial for trial in study.trials if trial.state in (COMPLETE, PRUNED)}
    trials = [done[job] for job in plan.jobs if job in done]
    complete = [trial for trial in trials if trial.state == COMPLETE]
    cells: dict[str, list[FrozenTrial]] = {}
    for trial in complete:
        cells.setdefault(" ".join(f"{k}={v}" for k, v in trial.params.items()) or plan.recipe, []).append(trial)
    columns = [name for name in COLUMNS if any(name in trial.user_attrs for trial in complete)]
    rows, numbers = [["settings", "n", *columns, "95 % interval", "binomial error"]], []
    for settings, cell in sorted(cells.items(), key=lambda item: -statistics.fmean(t.values[0] for t in item[1])):
        stats = {name: summary([trial.user_attrs[name] for trial in cell]) for name in columns}
        mean, *spread = stats[plan.metric].values()
        error = math.sqrt(mean * (1 - mean) / plan.images)
        shown = [show(name, [*stats[name].values()][:2]) for name in columns]
        interval = show(plan.metric, spread[1:], " to ")
        rows.append([settings, str(len(cell)), *shown, interval, show(plan.metric, [error])])
        seeds = {trial.user_attrs["seed"]: trial.value for trial in cell}
        numbers.append({"settings": cell[0].params, "n": len(cell), "seeds": seeds, **stats, "binomial_error": error})
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, re.sub(r"[^|]", "-", lines[0]))
    command = re.sub(r"(?<=://)[^/@\s]*@", "", shlex.join(sys.argv))  # without user and password
    text = "\n".join(
        [
            f"`python {command}`",
            "",
            *lines,
            "",
            f"{len(complete)} trials complete, {len(trials) - len(complete)} pruned",
        ]
    )
    (plan.runs / f"{plan.study}.md").write_text(text + "\n", "utf-8")
    print(text)
    print(json.dumps({"study": plan.study, "metric": plan.metric, "images": plan.images, "table": numbers}))
    return int(len(trials) < len(plan.jobs))


def main() -> int:
    """Runs the trials that are missing, then prints and writes the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        usage="trials.py --config FILE [--seeds N] [--grid NAME=A,B ... | --search NAME=LOW..HIGH ...] [fit arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--seeds", type=int, default=5, help="of each settings: 0, 1, … (default 5)")
    parser.add_argument("--grid", nargs="+", default=[], metavar="NAME=A,B", help="trains all combinations")
    parser.add_argument(
        "--search", nargs="+", default=[], metavar="NAME=LOW..HIGH[:log]", help="draws the settings; seed 0"
    )
    parser.add_argument("--trials", type=int, default=20, help="of a search (default 20)")
    parser.add_argument("--final", action="store_true", help="score a chosen recipe on the test images")
    parser.add_argument("--workers", type=int, default=cores, help=f"trials at a time (default {cores}, the cores)")
    parser.add_argument("--storage", help="URL of a database (default SQLite in runs/trials.db)")
    parser.add_argument("--heartbeat", type=int, default=10, help="seconds; silent for 6 of them is dead (default 10)")
    parser.add_argument("--trainer.default_root_dir", dest="root", default=".", help="where runs/ lies (default .)")
    args, rest = parser.parse_known_args()
    if sum(map(bool, (args.grid, args.search, args.final))) > 1:
        parser.error("--grid, --search and --final exclude each other: the test images are for what is chosen")
    for name in ("seeds", "trials", "workers", "heartbeat"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} {vars(args)[name]}: expected at least 1")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        signal.signal(number, lambda *_, code=code: stopped.append(code))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = None
    try:
        plan = Plan(args, rest)
        plan.runs.mkdir(parents=True, exist_ok=True)
        args.storage = args.storage or f"sqlite:///{plan.runs / 'trials.db'}"
        study = open_study(plan)
        print(f"study {plan.study}: {progress(study)}, {args.workers} at a time", flush=True)
        with ThreadPoolExecutor(args.workers) as pool:
            try:
                for worker in as_completed([pool.submit(work, study, plan) for _ in range(args.workers)]):
                    worker.result()
            except BaseException:
                stopped.append(2)
                raise
        if stopped:
            print("Stopped; the same command goes on where this one ended.", file=sys.stderr)
            return stopped[0]
        return report(study, plan)
    except (UsageError, ArgumentError, ImportError) as error:  # ImportError: the database's driver
        return tell(UsageError(shorten(str(error))), 2)
    except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
        why = shorten(str(error.__cause__ or error))
        return tell(UsageError(f"{args.storage.split(':')[0]}: {why}"), 1 if study else 2)
    except OSError as error:
        return tell(error, 1)


if __name__ == "__main__":
    sys.exit(main())
