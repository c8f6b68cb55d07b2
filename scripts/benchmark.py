"""Measures lenet_pl beside hand-written PyTorch loops, stock Lightning and the article's Keras script.

    python scripts/benchmark.py [--quick] [--rounds N] [--threads N] [--accelerator gpu] [--busy]
    python scripts/benchmark.py --linearity

Training: every contestant trains the same net at batch 32 with Adam on 55,000 images, in a new order each epoch. It
keeps the running loss and accuracy, and validates on the other 5,000 images after the epoch. With --quick each half of
the images does one of the two.

- lenet_pl: the command ``fit --config configs/lenet.yaml`` with everything on: metrics, checkpoints, results.csv,
  TensorBoard and the progress bar
- lenet_pl, compiled: on a GPU, the same with ``--model.compile true``
- plain loop: PyTorch as most people write it: tensors in memory, an index per batch, ``.item()`` for loss and accuracy
- best loop: the quickest loop we know: also channels_last, fused Adam, one shuffle per epoch, metrics at its end
- stock Lightning: torchvision's dataset and transforms, DataLoader, torchmetrics; bar, logger and checkpoint by default
- Keras: the article's script, where keras is installed (``pip install '.[bench]'``). It is better to install it in an
  environment of its own, because TensorBoard imports TensorFlow where it finds it, and that costs both Lightning
  contestants seconds and 500 MiB at the start: ``python -m venv keras; keras/bin/pip install keras tensorflow``, then
  ``--keras keras/bin/python``

Each run is a process of its own (contestants.py) on a terminal of its own, where Lightning and lenet_pl show their
progress bars. It prints a line with its accuracies after every epoch. This process holds the clock: an epoch lasts from
line to line, so the time includes everything, and a GPU has finished its work. The first epoch of a run warms up and
does not count; with --quick it is the only one and counts.

In a round each contestant runs once. The order of the contestants and the seed change from round to round, and ratios
are taken within a round, because the speed of a shared machine drifts from minute to minute. The tables give medians
with the smallest and the largest value. ms/step is the time of an epoch with its validation, divided by its steps.
Memory is the largest resident size of the process. If the accuracies of another PyTorch contestant differ from
lenet_pl's by more than three standard errors, the two do not train the same thing. The comparison is then void, and the
exit code is 1.

With --threads N every contestant gets N threads. Without it each library chooses, and lenet_pl takes at most 4. With
--busy another program, which this one starts, keeps one core busy all the time; compare it with --busy --threads 1.

Time to accuracy: ``fit --config configs/fast.yaml`` runs once a round. It is timed from process start and from the
first step to the end of the last epoch, and from there until the 10,000 test images are scored. Each run must score the
article's 90.67 %. Inference: images per second, from uint8 pixels in memory to classes. Linearity: ``fit`` on 1/6, 2/6,
4/6 and all of the training images, without validation.
"""

import argparse
import atexit
import contextlib
import csv
import json
import os
import platform
import pty
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from contestants import BATCH, VAL
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ARTICLE = 0.9067  # its test accuracy
SEED_STD = {"train_acc": 0.004, "val_acc": 0.01}  # of one run's accuracy after 1 to 3 epochs, rounded up
console = Console(width=110, highlight=False)


class Run(NamedTuple):
    """What was seen of one child process; times in seconds since its start."""

    lines: list[tuple[float, str]]  # what it printed, and when
    start: float  # its first step
    ends: list[float]  # of its epochs
    train_acc: float  # in the last epoch, like the next, 0..1
    val_acc: float
    memory: float  # MiB

    def epochs(self) -> list[float]:
        """Returns the seconds of the epochs that count: all but the first if there are more."""
        seconds = [end - begin for begin, end in zip([self.start, *self.ends], self.ends, strict=False)]
        return seconds[1:] or seconds


def screen(terminal: int, started: float) -> Iterator[tuple[float, str]]:
    """Yields the lines that are written to a terminal, each with its time, until the last writer closes it."""
    text = ""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while data := os.read(terminal, 65536):
            *lines, text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text + data.decode(errors="replace")).split("\n")
            now = time.perf_counter() - started
            yield from ((now, line.rstrip().rpartition("\r")[2]) for line in lines)
    os.close(terminal)


def watch(command: list[str], args: argparse.Namespace, folder: str) -> Run:
    """Runs ``command`` in ``folder``; if it fails, ends this process with the command's own message."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TERM": "xterm", "COLUMNS": "200"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if args.threads:
        env |= dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), str(args.threads))
    if args.accelerator == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # Keras would take the GPU unasked
    with tempfile.TemporaryFile("w+") as errors:
        master, terminal = pty.openpty()
        started = time.perf_counter()
        with subprocess.Popen(command, env=env, cwd=folder, stdout=terminal, stderr=errors) as child:
            os.close(terminal)
            lines = list(screen(master, started))
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            sys.exit(f"error: exit code {child.returncode} of {' '.join(command)}:\n{errors.read()[-3000:]}")
    epochs = [(t, line) for t, line in lines if re.match(r"epoch \S+  \w", line)]  # a bar follows one space
    last = dict(re.findall(r"(\w+) ([\d.]+)%", epochs[-1][1])) if epochs else {}
    train_acc, val_acc = (float(last.get(key, "nan")) / 100 for key in SEED_STD)
    start = next((t for t, line in lines if line == "ready"), 0.0)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is at least what this process takes: 50 MiB
    return Run(lines, start, [t for t, _ in epochs], train_acc, val_acc, usage.ru_maxrss / unit)


def fit(recipe: str, args: argparse.Namespace, *options: str) -> Run:
    """Runs the real command; its first step is the moment from which results.csv counts the first epoch."""
    command = [sys.executable, "-m", "lenet_pl", "fit", "--config", str(ROOT / f"configs/{recipe}.yaml")]
    command += ["--data.data_dir", args.data_dir, "--trainer.accelerator", args.accelerator, "--trainer.devices", "1"]
    with tempfile.TemporaryDirectory() as folder:
        run = watch([*command, *options], args, folder)
        with (Path(folder) / f"runs/{recipe}/version_0/results.csv").open(newline="") as file:
            return run._replace(start=run.ends[0] - float(next(csv.DictReader(file))["seconds"]))


def contest(name: str, args: argparse.Namespace, seed: int) -> Run:
    """Runs one contestant."""
    if name.startswith("lenet_pl"):
        options = ["--trainer.max_epochs", str(args.epochs), "--data.val_size", str(args.val_size)]
        options += ["--model.compile", "true"] if "compiled" in name else []
        return fit("lenet", args, *options, "--seed_everything", str(seed))
    script = str(Path(__file__).with_name("contestants.py").resolve())
    command = [args.keras if name == "Keras" else sys.executable, script, name, "--seed", str(seed)]
    for option in ("epochs", "val_size", "data_dir", "accelerator", "workers"):
        command += [f"--{option}", str(getattr(args, option))]
    with tempfile.TemporaryDirectory() as folder:
        return watch(command, args, folder)


def spread(values: list[float]) -> dict[str, float]:
    """Returns median, smallest and largest value."""
    return {key: round(f(values), 4) for key, f in (("median", statistics.median), ("min", min), ("max", max))}


def training(args: argparse.Namespace, images: int) -> dict[str, Any]:
    """Runs the contestants, prints the table, and returns its content by contestant."""
    names = ["lenet_pl", "plain loop", "best loop", "stock Lightning"]
    names += ["lenet_pl, compiled"] if args.accelerator == "gpu" else []
    names += ["Keras"] if args.keras else []
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for r in range(args.rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            runs[name].append(contest(name, args, seed=r))
            console.print(f"round {r + 1}, {name}: {', '.join(f'{s:.2f}' for s in runs[name][-1].epochs())} s an epoch")
    by_round = {name: [statistics.median(run.epochs()) for run in runs[name]] for name in names}
    reference = min(("plain loop", "best loop"), key=lambda name: statistics.median(by_round[name]))
    columns = ("s/epoch", "min - max", "ms/step", f"x {reference}", "memory, MiB", "train_acc", "val_acc")
    table = Table("training", *columns, caption=f"accuracies: after epoch {args.epochs}, mean of {args.rounds} runs")
    result: dict[str, Any] = {}
    for name in names:
        seconds = spread([s for run in runs[name] for s in run.epochs()])
        row: dict[str, Any] = {
            "seconds_per_epoch": seconds,
            "ms_per_step": round(1000 * seconds["median"] / -(-images // BATCH), 3),
            "ratio": spread([a / b for a, b in zip(by_round[name], by_round[reference], strict=True)]),
            "memory_mib": round(max(run.memory for run in runs[name])),
            "train_acc": round(statistics.fmean(run.train_acc for run in runs[name]), 4),
            "val_acc": round(statistics.fmean(run.val_acc for run in runs[name]), 4),
        }
        result[name] = row
        cells = [f"{seconds['median']:.2f}", f"{seconds['min']:.2f} - {seconds['max']:.2f}"]
        cells += [f"{row['ms_per_step']:.2f}", f"{row['ratio']['median']:.2f}", str(row["memory_mib"])]
        table.add_row(name, *cells, f"{row['train_acc']:.2%}", f"{row['val_acc']:.2%}")
    if args.keras:
        result["Keras"]["version"] = runs["Keras"][0].lines[0][1]
        table.caption = f"{table.caption}; {result['Keras']['version']}"
    console.print(table)
    return result


def differing(result: dict[str, Any], rounds: int) -> list[str]:
    """Lists the accuracies of the other PyTorch contestants that differ from lenet_pl's by more than chance."""
    found = []
    for name in ("plain loop", "best loop", "stock Lightning"):  # Keras draws its first weights another way
        for key, std in SEED_STD.items():
            bound = 3 * std * (2 / rounds) ** 0.5
            if not abs(result[name][key] - result["lenet_pl"][key]) <= bound:
                found.append(f"{key} of {name} is not within {bound:.2%} of lenet_pl's")
    return found


def fast(args: argparse.Namespace) -> dict[str, Any]:
    """Times the fast recipe to the end of its last epoch, and its scoring on the test set after that."""
    runs = [fit("fast", args, "--seed_everything", str(seed)) for seed in range(args.rounds)]
    scored = [next((t, line) for t, line in run.lines if line.startswith("Test accuracy")) for run in runs]
    result: dict[str, Any] = {
        "from process start": spread([run.ends[-1] for run in runs]),
        "from the first step": spread([run.ends[-1] - run.start for run in runs]),
        "to score 10,000 images": spread([t - run.ends[-1] for (t, _), run in zip(scored, runs, strict=True)]),
    }
    table = Table("fast.yaml", "median", "min", "max")
    for key, values in result.items():
        table.add_row(f"seconds {key}", *(f"{v:.2f}" for v in values.values()))
    result["test_acc"] = spread([float(line.split()[2].rstrip("%")) / 100 for _, line in scored])
    table.add_row("test accuracy", *(f"{v:.2%}" for v in result["test_acc"].values()))
    console.print(table)
    return result


def linearity(args: argparse.Namespace, total: int) -> dict[str, Any]:
    """Times ``fit`` on growing numbers of images."""
    times: dict[int, list[float]] = {total * k // 6: [] for k in (1, 2, 4, 6)}
    for _ in range(args.rounds):
        for n, seconds in times.items():
            size = ("--data.val_size", str(total - n), "--trainer.limit_val_batches", "0")
            seconds += fit("lenet", args, *size, "--trainer.max_epochs", str(args.epochs)).epochs()
    result = {n: spread([1e6 * s / n for s in seconds]) for n, seconds in times.items()}
    table = Table("images", "µs per image", "min", "max")
    for n, values in result.items():
        table.add_row(f"{n:,}", *(f"{v:.1f}" for v in values.values()))
    medians = [values["median"] for values in result.values()]
    off = max(medians) / min(medians) - 1
    console.print(table, f"The slowest takes {off:.1%} more than the quickest.")
    return {"us_per_image": result, "off": round(off, 4)}


def main() -> int:
    """Runs the benchmark; returns 1 if the comparison is void or ``fast.yaml`` misses the article's accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, one epoch, half the images: under 2 minutes")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contestant (default 5)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of a run; the first does not count (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the libraries' choice)")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="of stock Lightning's DataLoader (default 0)")
    parser.add_argument("--busy", action="store_true", help="keep one core busy with another program")
    parser.add_argument("--linearity", action="store_true", help="only the time per image by number of images")
    here = sys.executable if find_spec("keras") else None
    parser.add_argument("--keras", metavar="PYTHON", default=here, help="one that has keras (default: this, if it has)")
    parser.add_argument("--data_dir", default="data", help="folder with the images (default data)")
    args = parser.parse_args()
    args.data_dir = str(Path(args.data_dir).absolute())
    if args.quick:
        args.rounds = args.epochs = 1
    if min(args.rounds, args.epochs, 1 if args.threads is None else args.threads) < 1 or args.workers < 0:
        parser.error("--rounds, --epochs and --threads: expected at least 1; --workers: at least 0")
    download = "import sys; from lenet_pl import download; download.ensure(sys.argv[1])"
    if args.keras:  # a full path: the children run in other folders
        found = shutil.which(args.keras) or parser.error(f"--keras {args.keras}: expected a python program")
        args.keras = str(Path(found).absolute())
    watch([sys.executable, "-c", download, args.data_dir], args, ".")
    total = (Path(args.data_dir) / "FashionMNIST/raw/train-labels-idx1-ubyte").stat().st_size - 8
    args.val_size = total // 2 if args.quick else VAL

    speed = json.loads(contest("inference", args, 0).lines[-1][1])
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    machine = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": speed.pop("threads"),
        "device": speed.pop("device"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "lightning")},
    }
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()))
    result: dict[str, Any] = {"machine": machine, "rounds": args.rounds, "epochs": args.epochs, "busy": args.busy}
    if args.busy:
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        atexit.register(other.kill)
    faults = []
    if args.linearity:
        result["linearity"] = linearity(args, total)
    else:
        result["training"] = training(args, total - args.val_size)
        faults = differing(result["training"], args.rounds)
        result["fast"] = fast(args)
        if result["fast"]["test_acc"]["min"] < ARTICLE:
            faults.append(f"a run of fast.yaml ended below {ARTICLE:.2%}")
        result["inference"] = speed["images_per_second"]
        table = Table("inference, batch", *speed["images_per_second"])
        table.add_row("images per second", *(f"{rate:,}" for rate in speed["images_per_second"].values()))
        console.print(table)
    for fault in faults:
        console.print(f"void: {fault}")
    print(json.dumps(result | {"void": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
