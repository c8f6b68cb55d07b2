"""Trains a recipe with several seeds and says how sure its accuracy is.

    python scripts/seeds.py --config configs/lenet.yaml --seeds 5 [--threads N] [fit arguments]

Each seed is a process of its own running the real ``fit`` into ``runs/<recipe>-seed<S>/``. A seed whose run folder has
a ``test.json`` is finished and not run again, an interrupted one goes on from its ``last.ckpt``; both only if their
settings are those asked for. The table goes to the screen and to ``runs/<recipe>-seeds.md``; the last line is JSON.
Seconds are those of results.csv: of an epoch that was interrupted only the part after it.
"""

import argparse
import csv
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

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


def result(run: Path) -> dict[str, float]:
    """Reads a finished run: ``val_acc`` (absent without validation) of the chosen epoch, training's of the last."""
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    val = [float(row["val_acc"]) for row in rows if row["val_acc"]]
    seconds = [float(row["seconds"]) for row in rows]
    return {
        "test_acc": json.loads((run / "test.json").read_text())["test_acc"],
        **({"val_acc": max(val)} if val else {}),
        "train_acc": float(rows[-1]["train_acc"]),
        "train_loss": float(rows[-1]["train_loss"]),
        "seconds": sum(seconds),
        "s/epoch": statistics.median(seconds),
    }


def settings(text: str) -> dict[str, Any]:
    """Flattens a configuration to what decides the result, such as ``model.lr``."""
    config = yaml.safe_load(text)
    flat = {f"{group}.{key}": value for group in ("trainer", "model", "data") for key, value in config[group].items()}
    return {key: value for key, value in flat.items() if key not in ("trainer.default_root_dir", "data.data_dir")}


def newest(folder: Path, file: str, wanted: dict[str, Any]) -> Path | None:
    """Returns the newest run in ``folder`` that has ``file``; leaves if it was made with other settings."""
    found = [p for p in folder.glob("version_*") if p.name[8:].isdecimal() and (p / file).exists()]
    if not found:
        return None
    run = max(found, key=lambda p: int(p.name[8:]))
    had = settings((run / "config.yaml").read_text())  # an option that an older run knows nothing of was off
    if other := [f"{k}: {had.get(k)} -> {v}" for k, v in wanted.items() if had.get(k) != v and (k in had or v)]:
        sys.exit(f"error: {run} was made with other settings ({', '.join(other)}); move it away to train anew")
    return run


def train(command: list[str], env: dict[str, str]) -> None:
    """Runs one ``fit``; a signal stops it in good order, and then or when it fails this process ends as it did."""
    print(shlex.join(command[1:]), flush=True)
    child = subprocess.Popen(command, env=env)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C has reached the child too
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    if code := child.wait():
        print("Stopped here; the same command goes on where this one ended.", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def main() -> None:
    """Trains the seeds that are missing, then prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, … (default 5)")
    parser.add_argument("--threads", type=int, help="CPU threads of a run (default: torch's choice)")
    parser.add_argument("--trainer.default_root_dir", dest="root", default=".", help="where runs/ lies (default .)")
    args, rest = parser.parse_known_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: expected at least 1")
    env = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    fit = [sys.executable, "-m", "lenet_pl", "fit", "--config", args.config, *rest]
    fit += ["--trainer.default_root_dir", args.root]
    asked = subprocess.run([*fit, "--print_config"], env=env, stdout=subprocess.PIPE, text=True)
    if asked.returncode:  # it has said why
        sys.exit(asked.returncode)
    runs, stem, wanted = Path(args.root) / "runs", Path(args.config).stem, settings(asked.stdout)
    results = []
    for seed in range(args.seeds):
        name = f"{stem}-seed{seed}"
        run = newest(runs / name, "test.json", wanted)
        if run is None:
            begun = newest(runs / name, "checkpoints/last.ckpt", wanted)
            resume = ["--ckpt_path", str(begun / "checkpoints/last.ckpt")] if begun else []
            train([*fit, "--seed_everything", str(seed), "--name", name, *resume], env)
            run = newest(runs / name, "test.json", wanted)
        if run is None:
            sys.exit(f"error: fit left no test.json in {runs / name}; it needs checkpoints to score")
        results.append(result(run))

    stats = {column: summary([r[column] for r in results]) for column in results[0]}
    rows = [(f"seed {seed}", values) for seed, values in enumerate(results)]
    rows += [(kind, {column: stats[column][kind] for column in stats}) for kind in stats["test_acc"]]
    table = Table("", *results[0], box=box.MARKDOWN)
    for title, values in rows:
        table.add_row(title, *(f"{v:.2%}" if c.endswith("acc") else f"{v:.4g}" for c, v in values.items()))
    p = stats["test_acc"]["mean"]
    error = math.sqrt(p * (1 - p) / 10_000)
    with (runs / f"{stem}-seeds.md").open("w") as file:
        for console in (Console(width=100), Console(file=file, width=100)):
            console.print(f"`python {shlex.join(sys.argv)}`\n", table, highlight=False, markup=False, soft_wrap=True)
            console.print(f"Binomial standard error of 10,000 test images: {error:.2%}", highlight=False)
    print(json.dumps({"config": args.config, "seeds": args.seeds, **stats, "binomial_error": error}))


if __name__ == "__main__":
    main()
