"""A run that is stopped anywhere resumes from its last finished epoch, and ends like an undisturbed one, to the bit."""

import csv
import json
import os
import random
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import inside, same
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenet_pl import download, runs
from lenet_pl.__main__ import main
from lenet_pl.callbacks import RunWriter
from lenet_pl.checkpoint import BestCheckpoint
from lenet_pl.module import LitLeNet

# Python 3.12 warns of any fork where threads may live; the child here starts none before it is on its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

EPOCHS, STEPS = 3, 34
RICH = ["--data.val_size", "60", "--data.batch_size", "8", "--trainer.max_epochs", str(EPOCHS)]
RICH += ["--data.flip", "true", "--data.shift", "1", "--model.dropout", "0.2"]
RICH += ["--model.schedule", "one_cycle", "--model.lr", "0.01"]
RICH += ["--model.batch_norm", "true", "--model.composed_kernels", "true"]
RUN = Path("runs/lenet/version_0")
LAST = RUN / "checkpoints/last.ckpt"
SMALL = RICH[:6]
long = pytest.mark.long


def interrupted(args, target, name, nth, *signals):
    """Runs the command line in a forked child, which gets ``signals`` in the nth call of ``target.name``.

    If a file is being written then, it keeps only half of its bytes. Returns the exit code, which is negative for a
    signal, and what the child wrote to stderr.
    """
    pid = os.fork()
    if pid == 0:
        code, calls, real = 99, 0, getattr(target, name)

        def wrapper(*a, **k):
            nonlocal calls
            calls += 1
            if calls == nth:
                if name == "fsync" and stat.S_ISREG(os.fstat(a[0]).st_mode):
                    os.ftruncate(a[0], os.fstat(a[0]).st_size // 2)
                for signum in signals:
                    os.kill(os.getpid(), signum)
            return real(*a, **k)

        try:
            setattr(target, name, wrapper)
            with Path("child.err").open("w") as sys.stderr, Path(os.devnull).open("w") as sys.stdout:
                code = main(args)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), Path("child.err").read_text()


def outcome(run):
    """Everything that must be the same: weights, optimizer, counts, and all columns of the rows except seconds."""
    states = {p.name: torch.load(p, weights_only=True) for p in (run / "checkpoints").iterdir()}
    rows = [row | {"seconds": ""} for row in csv.DictReader((run / "results.csv").read_text().splitlines())]
    keys = ("state_dict", "optimizer_states", "global_step", "epoch", "seed")
    return {name: {k: state[k] for k in keys} for name, state in states.items()}, rows, (run / "test.json").read_text()


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory):
    """The outcome of an undisturbed run. Its block size does not matter, as test_training.py shows."""
    folder, before = tmp_path_factory.mktemp("whole"), Path.cwd()
    with inside(folder, tiny) as patch:
        patch.setattr("lenet_pl.commands.report", lambda *args: None)
        torch.set_num_threads(1)
        assert main(["fit", *RICH]) == 0
        result = outcome(RUN)
    assert Path.cwd() == before
    return result


def go_on(cli):
    """Resumes the run, or starts it again if it left no checkpoint, and returns its folder."""
    code, _, err = cli("fit", *RICH, "--ckpt_path", "auto")
    assert code == 0, err
    assert [folder.name for folder in RUN.parent.iterdir()] == ["version_0"]
    return RUN


# Where a kill can hit, and how often a run passes there
MOMENTS = {
    "in a block": (LitLeNet, "_logits_and_loss", EPOCHS * STEPS),
    "in validation": (LitLeNet, "validation_step", EPOCHS),
    "in a write": (os, "fsync", 20),  # results.csv, best.ckpt, last.ckpt, and their folders
    "before results.csv": (runs, "write_results", EPOCHS),
    "before best.ckpt": (BestCheckpoint, "on_train_epoch_end", EPOCHS),
    "before a rename": (Path, "replace", 10),
    "between epochs": (RunWriter, "on_train_epoch_start", EPOCHS),
    "after the last block of an epoch": (LitLeNet, "on_validation_model_zero_grad", EPOCHS),
    "before the events": (TensorBoardLogger, "log_metrics", 2 * EPOCHS),  # of validation, and after last.ckpt
    "before the end of the training": (RunWriter, "finish", 1),
    "in the test": (LitLeNet, "test_step", 1),
}


def kills(n, seed):
    draw = random.Random(seed)
    names = [*draw.sample(list(MOMENTS), k=min(n, len(MOMENTS))), *draw.choices(list(MOMENTS), k=n)][:n]
    return [(name, draw.randint(1, MOMENTS[name][2]), draw.choice([1, 4, 50])) for name in names]


def check(cli, undisturbed, name, nth, k, signum=signal.SIGKILL, code=-signal.SIGKILL):
    target, attribute, _ = MOMENTS[name]
    args = ["fit", *RICH, "--data.steps_per_execution", str(k)]
    left, err = interrupted(args, target, attribute, nth, signum)
    assert left == code, err
    assert same(outcome(go_on(cli)), undisturbed)
    return err


def test_kill_minus_nine(cli, undisturbed):
    check(cli, undisturbed, "before results.csv", nth=3, k=1)


@long
@pytest.mark.parametrize(("name", "nth", "k"), kills(20, seed=2))
def test_kill_minus_nine_at_twenty_moments(cli, undisturbed, name, nth, k):
    check(cli, undisturbed, name, nth, k)


@pytest.mark.long
def test_one_run_interrupted_again_and_again(cli, undisturbed):
    args = ["fit", *RICH, "--data.steps_per_execution", "4", "--ckpt_path", "auto"]
    for name, nth, signum in (
        ("in a block", 5, signal.SIGTERM),
        ("in a block", 39, signal.SIGTERM),
        ("in a block", 9, signal.SIGTERM),  # the same epoch once more
        ("before results.csv", 2, signal.SIGKILL),  # the first call drops rows of later epochs
        ("in a block", 30, signal.SIGTERM),
        ("in a write", 4, signal.SIGKILL),
        ("in the test", 1, signal.SIGTERM),
    ):
        code, err = interrupted(args, *MOMENTS[name][:2], nth, signum)
        assert code == (143 if signum == signal.SIGTERM else -signum), err
    assert same(outcome(go_on(cli)), undisturbed)


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 143, marks=long)]


@pytest.mark.parametrize(
    ("name", "nth", "k", "epochs"),
    [
        ("in a block", 40, 4, 1),
        pytest.param("in validation", 1, 4, 0, marks=long),
        *(pytest.param(*kill, None, marks=long) for kill in kills(20, seed=4)),
    ],
)
@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_signal_stops_at_once_and_says_how_to_go_on(
    cli, undisturbed, monkeypatch, signum, code, name, nth, k, epochs
):
    if signum == signal.SIGUSR1:
        monkeypatch.setenv("SLURM_JOB_ID", "1")
    target, attribute, _ = MOMENTS[name]
    left, err = interrupted(["fit", *RICH, "--data.steps_per_execution", str(k)], target, attribute, nth, signum)
    assert left == code, err
    (line,) = err.splitlines()
    assert line.startswith(f"stopped by {'Ctrl-C' if signum == signal.SIGINT else signal.Signals(signum).name}")
    if LAST.exists():
        assert line.endswith(f"; resume with: python -m lenet_pl fit --ckpt_path {LAST}")
        state = torch.load(LAST, weights_only=True)
        assert state["global_step"] == STEPS * (state["epoch"] + 1)  # always that of a finished epoch
    else:
        assert line.endswith("start the run again")
    if epochs is not None:
        assert LAST.exists() == bool(epochs)
        assert not epochs or state["epoch"] + 1 == epochs
    assert same(outcome(go_on(cli)), undisturbed)


def test_a_closed_terminal(workdir):
    code, err = interrupted(["fit", *SMALL], *MOMENTS["in a block"][:2], 5, signal.SIGHUP)
    assert code == 129
    assert err == "stopped by SIGHUP before the first epoch was finished; start the run again\n"


def test_a_second_signal_ends_without_a_word(workdir):
    code, err = interrupted(["fit", *RICH], LitLeNet, "_logits_and_loss", 3, signal.SIGTERM, signal.SIGTERM)
    assert (code, err) in ((-signal.SIGTERM, ""), (143, err))
    assert not LAST.exists()


def test_a_signal_before_the_first_step_leaves_nothing(workdir):
    code, err = interrupted(["fit", *RICH], RunWriter, "on_train_epoch_start", 1, signal.SIGTERM)
    assert (code, err.startswith("stopped by SIGTERM")) == (143, True)
    assert not RUN.exists()


@pytest.mark.parametrize(
    ("flags", "name", "nth", "signum"),
    [
        # amid an accumulation
        pytest.param(("--trainer.accumulate_grad_batches", "3"), "in a block", 35, signal.SIGTERM, marks=long),
        pytest.param(("--trainer.max_steps", "80"), "between epochs", 2, signal.SIGKILL, marks=long),
        pytest.param(("--trainer.max_steps", "80"), "in a block", 80, signal.SIGTERM, marks=long),
        pytest.param(("--trainer.max_steps", "80"), "in a block", 50, signal.SIGTERM, marks=long),
        pytest.param(("--trainer.val_check_interval", "0.5"), "in validation", 1, signal.SIGTERM, marks=long),
        pytest.param(("--trainer.check_val_every_n_epoch", "2"), "between epochs", 3, signal.SIGKILL, marks=long),
        pytest.param(("--trainer.limit_train_batches", "9"), "in a block", 12, signal.SIGTERM, marks=long),
        pytest.param(("--data.val_size", "0"), "between epochs", 2, signal.SIGKILL, marks=long),
        pytest.param(("--data.val_size", "0"), "in a block", 60, signal.SIGTERM, marks=long),
    ],
)
def test_other_ways_through_an_epoch(cli, flags, name, nth, signum):
    args = ["fit", *RICH, *flags]
    assert cli(*args, "--name", "whole")[0] == 0
    interrupted(args, *MOMENTS[name][:2], nth, signum)
    code, _, err = cli(*args, "--ckpt_path", "auto")
    assert code == 0, err
    whole, resumed = outcome(Path("runs/whole/version_0")), outcome(RUN)
    assert same(whole[:2], resumed[:2])


@long
def test_more_steps_for_a_run_that_max_steps_ended(cli):
    """The run resumes if it ended with an epoch. Otherwise it is refused: no checkpoint holds a part of an epoch."""
    assert cli("fit", *RICH, "--trainer.max_steps", 80, "--name", "whole")[0] == 0
    assert cli("fit", *RICH, "--trainer.max_steps", STEPS)[0] == 0
    code, _, err = cli("fit", "--ckpt_path", LAST, "--trainer.max_steps", 80, "--model.schedule", "one_cycle")
    assert code == 0, err
    steps = [row["step"] for row in csv.DictReader((RUN / "results.csv").read_text().splitlines())]
    assert steps == ["34", "68", "80"]
    code, _, err = cli("fit", "--ckpt_path", LAST, "--trainer.max_steps", 90)
    assert code == 2
    assert "was written within an epoch" in err


def test_a_training_from_another_checkpoint_than_the_last_is_a_new_run(cli):
    keep = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=1")
    keep += ("--trainer.callbacks.filename={epoch}", "--trainer.callbacks.save_top_k=-1")
    assert cli("fit", *SMALL, "--model.lr", 0.0003, *keep)[0] == 0
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    new = RUN.with_name("version_1")
    first = ["fit", "--ckpt_path", str(RUN / "checkpoints/epoch=0.ckpt")]
    code, err = interrupted(first, RunWriter, "on_train_epoch_start", 2, signal.SIGTERM)
    assert code == 143, err
    assert err.endswith(f"resume with: python -m lenet_pl fit --ckpt_path {new}/checkpoints/last.ckpt\n")
    assert cli("fit", "--ckpt_path", "last")[0] == 0
    assert [row["epoch"] for row in csv.DictReader((new / "results.csv").read_text().splitlines())] == ["2", "3"]
    assert (new / "checkpoints/best.ckpt").exists()
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_a_training_of_fewer_steps_than_the_checkpoint_is_refused(cli):
    assert cli("fit", *SMALL)[0] == 0
    code, _, err = cli("fit", "--ckpt_path", LAST, "--trainer.max_steps", STEPS)
    assert code == 2
    assert f"trainer.max_steps={STEPS}: expected at least {EPOCHS * STEPS}, because {LAST} has finished step" in err


@long
@pytest.mark.parametrize(("k", "size"), [(1, 8), (50, 8), (7, 16)])
def test_blocks_and_batch_size_may_change_between_a_stop_and_a_resume(cli, k, size):
    """The stop itself has no influence: an undisturbed run with the same change gives the same result."""
    first = ["fit", *SMALL, "--data.steps_per_execution", "50" if k == 1 else "1"]
    code, err = interrupted(first, *MOMENTS["in a block"][:2], STEPS + 3, signal.SIGTERM)
    assert code == 143, err
    changed = ("--data.steps_per_execution", k, "--data.batch_size", size)
    assert cli("fit", "--ckpt_path", "last", *changed)[0] == 0
    assert cli("fit", *SMALL, "--trainer.max_epochs", 1, "--name", "whole")[0] == 0
    more = ("--data.batch_size", size, "--trainer.max_epochs", EPOCHS)
    assert cli("fit", "--ckpt_path", "runs/whole/version_0/checkpoints/last.ckpt", *more)[0] == 0
    assert same(outcome(RUN)[:2], outcome(Path("runs/whole/version_0"))[:2])
    steps = [int(row["step"]) for row in csv.DictReader((RUN / "results.csv").read_text().splitlines())]
    assert steps == [STEPS, STEPS + -(-270 // size), STEPS + 2 * -(-270 // size)]


def test_auto_gives_one_finished_run_however_often_it_is_called(cli, undisturbed):
    command = ("fit", *RICH, "--ckpt_path", "auto")
    interrupted(list(command), *MOMENTS["in a block"][:2], 50, signal.SIGKILL)
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert same(outcome(RUN), undisturbed)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for _ in range(2):
        code, out, err = cli(*command)
        assert (code, err) == (0, "")
        assert f"{RUN} is finished" in out
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    code, _, err = cli(*command, "--seed_everything", 1)
    assert (code, "seed_everything: 0 before, 1 now" in err) == (2, True), err
    code, _, err = cli(*command, "--model.lr", 0.5)
    assert code == 2
    assert "model.lr: 0.01 before, 0.5 now" in err
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    assert cli(*command, "--trainer.max_epochs", EPOCHS + 1)[0] == 0  # longer: the run resumes
    assert len((RUN / "results.csv").read_text().splitlines()) == EPOCHS + 2


def test_auto_finishes_a_run_that_was_killed_between_its_last_epoch_and_its_score(cli):
    command = ("fit", *SMALL, "--ckpt_path", "auto")
    assert cli(*command)[0] == 0
    (RUN / "finished.txt").unlink()
    (RUN / "test.json").unlink()
    assert cli(*command)[0] == 0
    assert (RUN / "finished.txt").read_text() == f"trained to epoch {EPOCHS}\n"
    assert "is finished" in cli(*command)[1]


def test_a_longer_training_leaves_no_score_of_the_shorter_one(cli):
    assert cli("fit", *SMALL)[0] == 0
    (RUN / "report.html").touch()
    halves = [RUN / ".results.csv.0a.tmp", RUN / "checkpoints/.last.ckpt.0b.tmp"]
    for half in halves:
        half.touch()
    longer = ["fit", "--ckpt_path", "last", "--trainer.max_epochs", str(EPOCHS + 1)]
    interrupted(longer, *MOMENTS["in the test"][:2], 1, signal.SIGKILL)
    assert not (RUN / "test.json").exists()
    assert not (RUN / "report.html").exists()
    assert not any(half.exists() for half in halves)
    assert cli(*longer[:2], "auto", *longer[3:])[0] == 0
    assert json.loads((RUN / "test.json").read_text())["n"] == 53


def test_a_run_that_its_time_ended_goes_on(cli):
    assert cli("fit", *SMALL, "--trainer.max_epochs", 9999, "--trainer.max_time", "00:00:00:01")[0] == 0
    state = torch.load(LAST, weights_only=True)
    assert state["global_step"] == STEPS * (state["epoch"] + 1)  # an epoch that was cut short does not count
    more = ("--trainer.max_time", "00:01:00:00", "--trainer.max_epochs", state["epoch"] + 2)
    code, _, err = cli("fit", "--ckpt_path", "last", *more)
    assert code == 0, err


def test_a_stop_before_the_training_leaves_no_run(workdir):
    code, err = interrupted(["fit", *SMALL], download, "ensure", 1, signal.SIGINT)
    assert (code, err) == (130, "stopped by Ctrl-C before the first epoch was finished; start the run again\n")
    assert not Path("runs").exists()


def test_from_within_the_run_folder(cli, monkeypatch, tiny):
    assert cli("fit", *SMALL, "--data.data_dir", tiny[0])[0] == 0
    monkeypatch.chdir(RUN)
    code, _, err = cli("fit", "--ckpt_path", "checkpoints/last.ckpt", "--trainer.max_epochs", EPOCHS + 1)
    assert code == 0, err
    assert len(Path("results.csv").read_text().splitlines()) == EPOCHS + 2
    assert not Path("runs").exists()


def test_auto_knows_a_run_that_early_stopping_ended(cli):
    stop = (
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val_acc",
        "--trainer.callbacks.patience=1",
    )
    command = ("fit", *SMALL, "--trainer.max_epochs", 30, *stop, "--test", "false", "--ckpt_path", "auto")
    assert cli(*command)[0] == 0
    rows = (RUN / "results.csv").read_text()
    assert 2 < len(rows.splitlines()) < 30
    code, out, _ = cli(*command)
    assert code == 0
    assert "is finished: EarlyStopping" in out
    assert (RUN / "results.csv").read_text() == rows
    assert not (RUN / "test.json").exists()


@pytest.mark.parametrize(
    ("name", "nth", "signum"),
    [
        pytest.param("before best.ckpt", 2, signal.SIGKILL, marks=long),
        pytest.param("in validation", 2, signal.SIGTERM, marks=long),
        pytest.param("in a block", 40, signal.SIGTERM, marks=long),
        pytest.param("in the test", 1, signal.SIGKILL, marks=long),
    ],
)
def test_tensorboard_has_no_gap_and_no_double_point(cli, name, nth, signum):
    interrupted(["fit", *RICH, "--data.steps_per_execution", "4"], *MOMENTS[name][:2], nth, signum)
    time.sleep(1.1)  # event files are read in the order of their names, which begin with the second
    go_on(cli)
    events = EventAccumulator(str(RUN))
    events.Reload()
    rows = list(csv.DictReader((RUN / "results.csv").read_text().splitlines()))
    for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
        points = [(e.step, e.value) for e in events.Scalars(name)]
        assert points == [(STEPS * (i + 1) - 1, pytest.approx(float(rows[i][name]), abs=1e-6)) for i in range(EPOCHS)]


def test_the_best_score_survives_a_move_of_the_run_folder(cli, undisturbed):
    interrupted(["fit", *RICH], RunWriter, "on_train_epoch_start", 3, signal.SIGKILL)
    moved = RUN.parent.with_name("moved") / "version_7"
    moved.parent.mkdir()
    RUN.rename(moved)
    code, _, err = cli("fit", "--ckpt_path", moved / "checkpoints/last.ckpt")
    assert (code, err) == (0, "")
    assert same(outcome(moved)[:2], undisturbed[:2])  # test.json names the folder
    assert sorted(p.name for p in (moved / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_the_best_checkpoint_is_found_anew_where_it_is_missing(cli):
    """Otherwise a run that resumes elsewhere and never beats the old score would end without a best.ckpt."""
    cli("fit", *SMALL, "--model.lr", 0.01)
    LAST.rename("moved.ckpt")
    code, _, err = cli("fit", "--ckpt_path", "moved.ckpt", "--trainer.max_epochs", EPOCHS + 1, "--model.lr", 1e-12)
    assert code == 0, err
    assert "version_1" in json.loads(Path("runs/lenet/version_1/test.json").read_text())["ckpt_path"]
    assert Path("runs/lenet/version_1/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize("file", ["last.ckpt", *(pytest.param(f, marks=long) for f in ("best.ckpt", "results.csv"))])
def test_a_full_disk_keeps_the_previous_checkpoint(cli, undisturbed, file):
    """Once there is space again, the run resumes exactly from that checkpoint."""
    real, before = Path.open, b""

    def full(path, mode="r", *args, **options):
        nonlocal before
        if mode == "wb" and file in path.name and LAST.exists():
            before = LAST.read_bytes()
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        code, _, err = cli("fit", *RICH)
    assert code == 1
    assert f"{file}: No space left" in err
    assert LAST.read_bytes() == before != b""
    assert same(outcome(go_on(cli)), undisturbed)


def test_a_schedule_ends_with_the_run_whatever_the_size_of_a_batch_was_before(cli):
    for size in (4, 32):
        name = f"size{size}"
        assert cli("fit", *SMALL, "--model.schedule", "one_cycle", "--trainer.max_epochs", 2, "--name", name)[0] == 0
        flags = ("--trainer.max_epochs", 4, "--data.batch_size", size)
        code, _, err = cli("fit", "--name", name, "--ckpt_path", "last", *flags)
        assert code == 0, err
        with Path(f"runs/{name}/version_0/results.csv").open(newline="") as file:
            rates = [float(row["lr"]) for row in csv.DictReader(file)]
        assert min(rates) > 0
        assert rates[3] < rates[2]
        assert rates[3] == min(rates[2:])
        assert rates[3] < 0.001 / 10


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.batch_size", 269),  # the last mini-batch would be a single image
        ("--model.schedule", "one_cycle", "--trainer.max_epochs", "null", "--trainer.max_time", "00:00:01:00"),
    ],
)
def test_a_refused_resume_changes_nothing(cli, flags):
    assert cli("fit", *SMALL, "--model.batch_norm", "true")[0] == 0
    before = {p: p.read_bytes() for p in RUN.rglob("*") if p.is_file() and "events" not in p.name}
    code, _, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 4, *flags)
    assert code == 2, err
    assert {p: p.read_bytes() for p in RUN.rglob("*") if p.is_file() and "events" not in p.name} == before
    Path("moved.ckpt").write_bytes(LAST.read_bytes())
    assert cli("fit", "--ckpt_path", "moved.ckpt", "--trainer.max_epochs", 4, *flags)[0] == 2
    assert [p.name for p in RUN.parent.iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--trainer.max_steps", 5),
        ("--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=5"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_auto_knows_a_finished_run_from_which_nothing_can_be_resumed(cli, flags):
    command = ("fit", *SMALL, *flags, "--ckpt_path", "auto")
    assert cli(*command)[0] == 0
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert "is finished" in out


def test_auto_refuses_a_finished_run_with_other_options_of_the_trainer(cli):
    command = ("fit", *SMALL, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_acc")
    command += ("--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=logs", "--ckpt_path", "auto")
    assert cli(*command)[0] == 0
    for option, before, now in (("gradient_clip_val", None, 0.1), ("precision", None, "64-true")):
        code, _, err = cli(*command, f"--trainer.{option}", now)
        assert code == 2
        assert f"trainer.{option}: {before} before, {now} now" in err
    for harmless in (("--trainer.enable_progress_bar", "false"), ("--threads", 1), ("--data.data_dir", "data")):
        code, out, err = cli(*command, *harmless)
        assert (code, err) == (0, "")
        assert "is finished" in out


def test_a_run_that_early_stopping_ended_stays_ended(cli):
    stop = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_acc")
    stop += ("--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=1")
    args = ["fit", *SMALL, "--trainer.max_epochs", "30", *stop, "--test", "false"]
    interrupted([*map(str, args)], RunWriter, "finish", 1, signal.SIGKILL)
    before = LAST.read_bytes()
    for _ in range(2):
        code, out, err = cli("fit", "--ckpt_path", "last", "--test", "false")
        assert (code, err) == (0, "")
        assert "The training ended after epoch 2: EarlyStopping: Monitored metric val_acc did not improve" in out
        assert same(torch.load(LAST, weights_only=True)["global_step"], 68)
    assert LAST.read_bytes() == before
    more = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_acc")
    more += ("--trainer.callbacks.patience=2", "--trainer.callbacks.min_delta=1")
    assert "epoch 3/30" in cli("fit", "--ckpt_path", "last", "--test", "false", *more)[1]
