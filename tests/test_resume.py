"""A run that is killed or stopped anywhere, and goes on, ends as one that was not: bit by bit."""

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenet_pl import checkpoint
from lenet_pl.__main__ import main
from lenet_pl.callbacks import BestCheckpoint, GracefulStop, RunFolder
from lenet_pl.module import LitLeNet

# Python 3.12 warns of any fork where threads may live; the child here starts none before it is on its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

EPOCHS, STEPS = 3, 34
RICH = ["--data.val_size", "60", "--data.batch_size", "8", "--trainer.max_epochs", str(EPOCHS)]
RICH += ["--data.flip", "true", "--data.shift", "1", "--model.dropout", "0.2", "--model.ema_decay", "0.9"]
RICH += ["--model.schedule", "one_cycle", "--model.lr", "0.01"]
RUN = Path("runs/lenet/version_0")
LAST = RUN / "checkpoints/last.ckpt"


def interrupted(args, target, name, nth, *signals):
    """Runs the command line in a forked child that gets ``signals`` in the nth call of ``target.name``.

    Returns its exit code, negative for a signal, and what it said on stderr.
    """
    pid = os.fork()
    if pid == 0:
        code, calls, real = 99, 0, getattr(target, name)

        def wrapper(*a, **k):
            nonlocal calls
            calls += 1
            if calls == nth:
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
    """Everything that has to be the same: weights, averages, optimizer, scheduler, counts, and all rows but seconds."""
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    rows = [row | {"seconds": ""} for row in csv.DictReader((run / "results.csv").read_text().splitlines())]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return [{k: state[k] for k in keys}, best["state_dict"], rows]


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory):
    """The outcome of a run that nobody disturbed; its block size does not matter, as test_training.py shows."""
    folder, before = tmp_path_factory.mktemp("whole"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lenet_pl.download.FILES", tiny[1])
        patch.chdir(folder)
        (folder / "data").symlink_to(tiny[0])
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


@pytest.mark.parametrize(("name", "nth", "k"), kills(4, seed=3))
def test_kill_minus_nine(cli, undisturbed, name, nth, k):
    check_kill(cli, undisturbed, name, nth, k)


@pytest.mark.long
@pytest.mark.parametrize(("name", "nth", "k"), kills(20, seed=2))
def test_kill_minus_nine_at_twenty_moments(cli, undisturbed, name, nth, k):
    check_kill(cli, undisturbed, name, nth, k)


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGINT, signal.SIGUSR1))],
)
@pytest.mark.parametrize(
    ("name", "nth", "k", "step"),
    [
        ("in a block", 40, 4, 42),  # the block of steps 39 to 42 is finished
        ("in a block", 40, 1, 40),
        ("in a block", 34, 4, 34),  # in the epoch's last block: validation and checkpoints still happen
        ("in validation", 1, 4, 34),
        ("between epochs", 2, 50, 34),
    ],
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


def test_the_comparison_can_fail(cli, undisturbed, monkeypatch):
    """Negative control: the order of the wrong epoch, as in a run that forgets where it was, is noticed."""
    interrupted(["fit", *RICH], GracefulStop, "on_train_epoch_start", 2, signal.SIGKILL)
    monkeypatch.setattr("lenet_pl.datamodule.Loader.set_epoch", lambda self, epoch: None)
    assert not same(outcome(go_on(cli)), undisturbed)


def test_tensorboard_has_no_gap_and_no_double_point(cli):
    interrupted(["fit", *RICH], BestCheckpoint, "on_train_epoch_end", 2, signal.SIGKILL)
    time.sleep(1.1)  # event files are read in the order of their names, which begin with the second
    go_on(cli)
    events = EventAccumulator(str(RUN))
    events.Reload()
    for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
        assert [e.step for e in events.Scalars(name)] == [STEPS * (i + 1) - 1 for i in range(EPOCHS)], name


def test_the_best_score_survives_a_move_of_the_run_folder(cli, undisturbed):
    interrupted(["fit", *RICH], GracefulStop, "on_train_epoch_start", 3, signal.SIGKILL)
    moved = RUN.parent.with_name("moved") / "version_7"
    moved.parent.mkdir()
    RUN.rename(moved)
    code, _, err = cli("fit", "--ckpt_path", moved / "checkpoints/last.ckpt")
    assert (code, err) == (0, "")
    assert same(outcome(moved), undisturbed)
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


def test_a_full_disk_keeps_the_previous_checkpoint(cli, monkeypatch):
    cli("fit", *RICH)
    before = LAST.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    code, _, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", EPOCHS + 1)
    assert code == 1
    assert "No space left" in err
    assert LAST.read_bytes() == before
    assert json.loads((RUN / "test.json").read_text())["n"] > 0


def test_the_block_size_may_not_change_in_mid_epoch(cli):
    args = ["fit", *RICH, "--data.steps_per_execution", "4"]
    interrupted(args, LitLeNet, "_forward", 40, signal.SIGTERM)
    code, _, err = cli("fit", "--ckpt_path", "last", "--data.steps_per_execution", 5)
    assert code == 2
    assert "--data.steps_per_execution 4" in err
