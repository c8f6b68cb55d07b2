"""The table of trials.py: a row for each set of settings, with mean, spread and error over the seeds."""

import json
import math
import re
import shlex
import statistics
import sys

import optuna
from optuna.trial import FrozenTrial, TrialState
from trials_plan import Plan
from trials_queue import DONE, wanted

COLUMNS = ("test_acc", "val_acc", "train_acc", "train_loss", "seconds", "s/epoch")
# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; for more the last one, a little too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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
    """Prints and writes the table, a row for each set of settings, the best first; returns 1 if a trial failed."""
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
