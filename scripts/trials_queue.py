"""The queue of trials.py: takes one trial after another out of Optuna's database, and runs ``fit`` for it."""

import contextlib
import fcntl
import json
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from trials_plan import Plan, digest, flags, suggest

from lenet_pl import runs
from lenet_pl.errors import UsageError, shorten

PAUSE = 1.0  # seconds between two looks at the trials
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
# Queues a killed trial again, or one whose command was killed; ten times at most, in case the trial is the cause.
queue_again = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=10)
stopped: list[int] = []  # the exit code of each signal that asked this command to stop


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
            if storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                return Trial(study, waiting._trial_id)
    return None


def work(study: optuna.Study, plan: Plan) -> None:
    """Runs trials until none is left, here or elsewhere: if another command dies, this one takes its trials over."""
    running: list[Generator[bool]] = []
    try:
        while not stopped and wanted(study, plan, TrialState.WAITING, TrialState.RUNNING):
            while len(running) < plan.args.workers:
                trial = claim(study, plan)
                if trial is None:
                    break
                running.append(train(study, trial, plan))
            for training in list(running):
                if not next(training, False):  # it has ended
                    running.remove(training)
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
    """Reads the newest run in a folder: times, best validation accuracy, last training metrics, and its test score."""
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
