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
does worse than the median. Bounds of digits alone draw whole numbers: ``0..3`` means 0, 1, 2 or 3. Others, such as
``0.0..3.0``, draw any number between them. Trials are compared by validation accuracy and read no test image;
``--final`` scores a recipe that is chosen on the test images. The table goes to the screen and to ``runs/<study>.md``;
the last line is JSON.

Where there is a GPU, ``fit`` chooses it by itself, and the trials of a machine share it; if its memory is too small for
so many, give fewer ``--workers``. Of several GPUs a trial would take all; give the command once for each GPU instead,
the first time as ``CUDA_VISIBLE_DEVICES=0 python scripts/trials.py …``: they take from one queue, too.
"""

import argparse
import os
import signal
import sys

from lenet_pl.errors import UsageError, shorten, tell

try:
    import optuna
    import sqlalchemy
    import trials_queue
    import trials_table
    from optuna.exceptions import StorageInternalError
    from trials_plan import Plan
except ImportError:  # Windows has no fcntl
    print("error: trials need Optuna, on Linux or macOS: pip install 'lenet_pl[trials]'", file=sys.stderr)
    sys.exit(2)

OWN = {"seed_everything", "name", "ckpt_path", "test"}  # options of fit that each trial sets for itself


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
    add(
        "--heartbeat",
        type=int,
        default=10,
        help="seconds; silent for six times as long is dead (default 10)",
    )
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
        signal.signal(number, lambda *_, code=code: trials_queue.stopped.append(code))
    study = None
    try:
        plan = Plan(args, rest)
        study = trials_queue.open_study(plan)
        print(f"study {plan.study}: {trials_queue.progress(study, plan)}, {args.workers} at a time", flush=True)
        trials_queue.work(study, plan)
        if trials_queue.stopped:
            print("Stopped; the same command goes on where this one ended.", file=sys.stderr)
            return trials_queue.stopped[0]
        return trials_table.report(study, plan)
    except UsageError as error:
        return tell(error, 2)
    except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, ImportError) as error:  # ImportError: no driver
        scheme = (args.storage or "sqlite").split(":")[0]
        return tell(UsageError(f"{scheme}: {shorten(str(error.__cause__ or error))}"), 1 if study else 2)
    except OSError as error:
        return tell(error, 1)


if __name__ == "__main__":
    sys.exit(main())
