"""A run that is killed or stopped anywhere, and goes on, ends as one that was not: bit by bit."""

import csv
import json
import os
import random
import shutil
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

from lenet_pl.__main__ import main
from lenet_pl.callbacks import BestCheckpoint, GracefulStop, RunFolder
from lenet_pl.module import LitLeNet

# Python 3.12 warns of any fork where threads may live; the child here starts none before it is on its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

EPOCHS, STEPS = 3, 34
RICH = ["--data.val_size", "60", "--data.batch_size", "8", "--trainer.max_epochs", str(EPOCHS)]
RICH += ["--data.flip", "true", "--data.shift", "1", "--model.dropout", "0.2"]
RICH += ["--model.schedule", "one_cycle", "--model.lr", "0.01"]
RUN = Path("runs/lenet/version_0")
LAST = RUN / "checkpoints/last.ckpt"
SMALL = RICH[:6]
long = pytest.mark.long


def interrupted(args, target, name, nth, *signals):
    """Runs the command line in a forked child that gets ``signals`` in the nth call of ``target.name``.

    A file that is being written then has only half of its bytes. Returns the exit code, negative for a signal, and
    what the child said on stderr.
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
    """Everything that has to be the same: weights, optimizer, scheduler, counts, and all rows but seconds."""
    states = {p.name: torch.load(p, weights_only=True) for p in (run / "checkpoints").iterdir()}
    rows = [row | {"seconds": ""} for row in csv.DictReader((run / "results.csv").read_text().splitlines())]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {name: {k: state[k] for k in keys} for name, state in states.items()}, rows, (run / "test.json").read_text()


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory):
    """The outcome of a run that nobody disturbed; its block size does not matter, as test_training.py shows."""
    folder, before = tmp_path_factory.mktemp("whole"), Path.cwd()
    with inside(folder, tiny):
        torch.set_num_threads(1)
        assert main(["fit", *RICH]) == 0
        result = outcome(RUN)
    assert Path.cwd() == before
    return result


def go_on(cli):
    """Resumes the run, or starts it anew where it left no checkpoint; returns its folder."""
    if LAST.exists():
        code, _, err = cli("fit", "--ckpt_path", "last")
        assert code == 0, err
        return RUN
    shutil.rmtree("runs", ignore_errors=True)
    assert cli("fit", *RICH, "--data.steps_per_execution", 4)[0] == 0
    return RUN


# Where a kill can hit, and how often a run passes there
MOMENTS = {
    "in a block": (LitLeNet, "_forward", EPOCHS * STEPS),
    "in validation": (LitLeNet, "validation_step", EPOCHS),
    "in a write": (os, "fsync", 20),  # results.csv, best.ckpt, last.ckpt, and their folders
    "before results.csv": (RunFolder, "_write", EPOCHS),
    "before best.ckpt": (BestCheckpoint, "on_train_epoch_end", EPOCHS),
    "before a rename": (Path, "replace", 10),
    "between epochs": (GracefulStop, "on_train_epoch_start", EPOCHS),
    "after the last block of an epoch": (LitLeNet, "on_validation_model_zero_grad", EPOCHS),
    "before the events": (TensorBoardLogger, "log_metrics", 2 * EPOCHS),  # of validation, and after last.ckpt
    "in the test": (LitLeNet, "test_step", 1),
}


def kills(n, seed):
    draw = random.Random(seed)
    names = [*draw.sample(list(MOMENTS), k=min(n, len(MOMENTS))), *draw.choices(list(MOMENTS), k=n)][:n]
    return [(name, draw.randint(1, MOMENTS[name][2]), draw.choice([1, 4, 50])) for name in names]


def check_kill(cli, undisturbed, name, nth, k):
    target, attribute, _ = MOMENTS[name]
    args = ["fit", *RICH, "--data.steps_per_execution", str(k)]
    code, err = interrupted(args, target, attribute, nth, signal.SIGKILL)
    assert code == -signal.SIGKILL, err
    assert same(outcome(go_on(cli)), undisturbed)


@pytest.mark.parametrize(("name", "nth", "k"), kills(3, seed=3))
def test_kill_minus_nine(cli, undisturbed, name, nth, k):
    check_kill(cli, undisturbed, name, nth, k)


@long
@pytest.mark.parametrize(("name", "nth", "k"), kills(20, seed=2))
def test_kill_minus_nine_at_twenty_moments(cli, undisturbed, name, nth, k):
    check_kill(cli, undisturbed, name, nth, k)


def test_one_run_interrupted_again_and_again(cli, undisturbed):
    args = ["fit", *RICH, "--data.steps_per_execution", "4"]
    for name, nth, signum in (
        ("in a block", 5, signal.SIGTERM),
        ("in a block", 9, signal.SIGTERM),  # the same epoch once more
        ("before results.csv", 2, signal.SIGKILL),  # the first call drops superseded rows
        ("in a block", 30, signal.SIGTERM),
        ("in a write", 4, signal.SIGKILL),
        ("in the test", 1, signal.SIGTERM),
    ):
        code, err = interrupted(args, *MOMENTS[name][:2], nth, signum)
        assert code == (143 if signum == signal.SIGTERM else -signum), err
        args = ["fit", "--ckpt_path", "last"]
    assert same(outcome(go_on(cli)), undisturbed)


@pytest.mark.parametrize(
    ("name", "nth", "k", "step"),
    [
        ("in a block", 40, 4, 42),  # the block of steps 39 to 42 is finished
        ("in a block", 40, 1, 40),
        ("in a block", 34, 4, 34),  # in the epoch's last block: validation and checkpoints still happen
        pytest.param("in a block", 102, 4, 102, marks=long),  # the very last
        pytest.param("in a block", 3, 4, 4, marks=long),  # there is no best.ckpt yet
        pytest.param("in validation", 1, 4, 34, marks=long),
        pytest.param("between epochs", 2, 50, 34, marks=long),
    ],
)
@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, *(pytest.param(s, marks=long) for s in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_stops_in_good_order(cli, undisturbed, monkeypatch, signum, name, nth, k, step):
    monkeypatch.setenv("SLURM_JOB_ID", "1") if signum == signal.SIGUSR1 else None
    args = ["fit", *RICH, "--data.steps_per_execution", str(k)]
    code, err = interrupted(args, *MOMENTS[name][:2], nth, signum)
    assert code == (130 if signum == signal.SIGINT else 143), err
    assert err.splitlines()[-1].endswith(f"go on with: python -m lenet_pl fit --ckpt_path {LAST.resolve()}")
    assert torch.load(LAST, weights_only=True)["global_step"] == step
    assert same(outcome(go_on(cli)), undisturbed)


def test_a_second_signal_stops_at_once(workdir):
    code, err = interrupted(["fit", *RICH], LitLeNet, "_forward", 3, signal.SIGTERM, signal.SIGTERM)
    assert code == -signal.SIGTERM, err
    assert not LAST.exists()


def test_a_signal_before_the_first_step_leaves_nothing(workdir):
    code, err = interrupted(["fit", *RICH], GracefulStop, "on_train_epoch_start", 1, signal.SIGTERM)
    assert (code, err) == (143, "stopped by SIGTERM\n")
    assert not RUN.exists()


@pytest.mark.parametrize(
    ("flags", "name", "nth", "signum"),
    [
        (("--trainer.accumulate_grad_batches", "3"), "in a block", 35, signal.SIGTERM),  # amid an accumulation
        (("--trainer.max_steps", "80"), "between epochs", 2, signal.SIGKILL),
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
    whole, resumed = outcome(Path("runs/whole/version_0")), outcome(go_on(cli))
    assert same(whole[:2], resumed[:2])


@pytest.mark.parametrize("steps", [10, pytest.param(34, marks=long), pytest.param(40, marks=long)])
def test_more_steps_for_a_run_that_max_steps_ended(cli, steps):
    """The epoch that it cut short goes on where it was."""
    for flags in (
        ("--name", "whole", "--trainer.max_steps", 80),
        ("--trainer.max_steps", steps),
        ("--ckpt_path", RUN / "checkpoints/last.ckpt", "--trainer.max_steps", 80),
    ):
        code, _, err = cli("fit", *SMALL, "--model.dropout", 0.2, *flags)
        assert code == 0, err
    assert same(outcome(Path("runs/whole/version_0"))[:2], outcome(RUN)[:2])


@pytest.mark.parametrize("mistake", ["the order of a wrong epoch", pytest.param("another seed", marks=long)])
def test_the_comparison_can_fail(cli, undisturbed, monkeypatch, mistake):
    """Negative control: a run that forgets where it was, or what its seed was, is noticed."""
    interrupted(["fit", *RICH], GracefulStop, "on_train_epoch_start", 2, signal.SIGKILL)
    if mistake == "another seed":
        assert cli("fit", "--ckpt_path", "last", "--seed_everything", 1)[0] == 0
    else:
        monkeypatch.setattr("lenet_pl.loader.Loader.set_epoch", lambda self, epoch: None)
        go_on(cli)
    states, rows, _ = outcome(RUN)
    assert not same(states["last.ckpt"]["state_dict"], undisturbed[0]["last.ckpt"]["state_dict"])
    assert not same(rows, undisturbed[1])


@pytest.mark.parametrize(
    ("name", "nth", "signum"),
    [
        ("before the events", 4, signal.SIGKILL),  # of an epoch whose checkpoint is written
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
    interrupted(["fit", *RICH], GracefulStop, "on_train_epoch_start", 3, signal.SIGKILL)
    moved = RUN.parent.with_name("moved") / "version_7"
    moved.parent.mkdir()
    RUN.rename(moved)
    code, _, err = cli("fit", "--ckpt_path", moved / "checkpoints/last.ckpt")
    assert (code, err) == (0, "")
    assert same(outcome(moved)[:2], undisturbed[:2])  # test.json names the folder
    assert sorted(p.name for p in (moved / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_damaged_last_falls_back_to_the_newest_sound_checkpoint(cli, undisturbed):
    interrupted(["fit", *RICH], GracefulStop, "on_train_epoch_start", 3, signal.SIGKILL)
    data = bytearray(LAST.read_bytes())
    data[len(data) // 2] ^= 1
    LAST.write_bytes(data)
    code, _, err = cli("fit", "--ckpt_path", "last")
    assert code == 0
    assert "last.ckpt" in err
    assert "best.ckpt" in err
    assert same(outcome(RUN), undisturbed)


def test_the_best_checkpoint_is_found_anew_where_it_is_missing(cli):
    """Else a run that goes on elsewhere, and never beats the old score, would end without a best.ckpt."""
    cli("fit", *SMALL, "--model.lr", 0.01)
    LAST.rename("moved.ckpt")
    code, _, err = cli("fit", "--ckpt_path", "moved.ckpt", "--trainer.max_epochs", EPOCHS + 1, "--model.lr", 1e-12)
    assert code == 0, err
    assert "version_1" in json.loads(Path("runs/lenet/version_1/test.json").read_text())["ckpt_path"]
    assert Path("runs/lenet/version_1/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize("file", ["last.ckpt", *(pytest.param(f, marks=long) for f in ("best.ckpt", "results.csv"))])
def test_a_full_disk_keeps_the_previous_checkpoint(cli, undisturbed, file):
    """Also with that checkpoint the run goes on exactly, once there is space."""
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


def test_the_order_of_the_images_may_not_change_in_mid_epoch(cli):
    interrupted(["fit", *RICH, "--data.steps_per_execution", "4"], LitLeNet, "_forward", 40, signal.SIGTERM)
    before = {p: p.read_bytes() for p in RUN.rglob("*.*") if "tfevents" not in p.name}
    for name, old, new in (("steps_per_execution", 4, 5), ("batch_size", 8, 4), ("val_size", 60, 30)):
        code, _, err = cli("fit", "--ckpt_path", "last", f"--data.{name}", new)
        assert code == 2
        assert f"data.{name}={new}: " in err
        assert err.endswith(f"--data.{name} {old}\n")
    assert {p: p.read_bytes() for p in before} == before
