"""Several processes have disjoint shares, see every test image once, and get the weights of one process."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEST, same, weights

TINY = ("--data.val_size", 60, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu")
# float64: Adam makes whole steps of a gradient that is 0 but for rounding, and rounding differs with the batch
EXACT = (*TINY, "--trainer.precision", "64-true")
RICH = (*TINY, "--data.batch_size", 5, "--data.flip", "true", "--model.dropout", 0.2)
DDP = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
RUN = Path("runs/lenet/version_0")
long = pytest.mark.long

SCRIPT = """\
import os, sys, torch
from lenet_pl import download
from lenet_pl.__main__ import main
from lenet_pl.module import LitLeNet

download.FILES = {files!r}
real, calls = LitLeNet._logits_and_loss, 0


def forward(self, *args):
    global calls
    calls += 1
    signum, rank, nth, whom = os.environ.get("HIT", "0 0 0 0").split()
    if (self.global_rank, calls) == (int(rank), int(nth)):
        os.kill(os.getpid() if whom == "itself" else os.getppid(), int(signum))
    return real(self, *args)


LitLeNet._logits_and_loss = forward
LitLeNet.on_train_end = lambda self: torch.save(self.state_dict(), f"rank{{self.global_rank}}.pt")
sys.exit(main(sys.argv[1:]))
"""


def prepare(folder, tiny):
    """Makes a script that is ``python -m lenet_pl`` on the tiny data, for launchers that start a file.

    Each rank saves its weights. In its nth optimizer step it sends the signal that ``HIT`` describes.
    """
    path = folder / "tiny_lenet_pl.py"
    path.write_text(SCRIPT.format(files=tiny[1]))
    return path


@pytest.fixture
def script(workdir, tiny):
    return prepare(workdir, tiny)


def start(*command, hit="", **options):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env |= {"HIT": hit} if hit else {}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **options)


def finish(process, timeout=120):
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:  # also where a rank outlives its launcher: it holds the pipe
        os.killpg(process.pid, signal.SIGTERM)
        raise
    return process.returncode, out


def torchrun(script, processes, *args, options=("--standalone",), **more):
    command = ("-m", "torch.distributed.run", *options, "--nproc_per_node", processes, script, "fit")
    return start(*command, "--trainer.devices", processes, *args, **more)


def lightning(script, processes, *args, **more):
    return start(script, "fit", "--trainer.devices", processes, "--trainer.strategy", "ddp", *args, **more)


def rows(run):
    with (run / "results.csv").open(newline="") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def outcome(run):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return [state["state_dict"], state["optimizer_states"], rows(run), weights(run / "checkpoints/best.ckpt")]


def check_ranks_agree(processes):
    first, *others = (torch.load(f"rank{i}.pt", weights_only=True) for i in range(processes))
    assert len(others) == processes - 1
    assert all(same(first, other) for other in others)


def check_like_one_process(run, single):
    assert json.loads((run / "test.json").read_text())["n"] == TEST
    for row, other in zip(rows(run), rows(single), strict=True):
        assert row["step"] == other["step"]
        for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=2e-5), name
    ours, theirs = (weights(r / "checkpoints/last.ckpt") for r in (run, single))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@long
@pytest.mark.parametrize("k", [1, 50])
def test_lightnings_own_launcher_trains_like_one_process(cli, script, k):
    # 270 images in global batches of 10: no rest, so no image is repeated to fill the shares
    code, _, err = cli("fit", *EXACT, "--data.batch_size", 10, "--name", "single", "--data.flip", "true")
    assert code == 0, err
    flags = ("--data.batch_size", 5, "--data.steps_per_execution", k, "--data.flip", "true")
    code, out = finish(lightning(script, 2, *EXACT, *flags))
    assert code == 0, out
    assert [p.name for p in Path("runs/lenet").iterdir()] == ["version_0"]
    assert out.count("Test accuracy") == 1
    check_ranks_agree(2)
    check_like_one_process(RUN, Path("runs/single/version_0"))


@long
@pytest.mark.parametrize("processes", [2, 3])
def test_torchrun_fetches_the_data_once_and_counts_every_test_image_once(script, processes, tiny, monkeypatch):
    Path("data").unlink()  # a fresh machine, and the files in another folder of it
    monkeypatch.setenv("LENET_PL_DATA_SOURCE", str(tiny[0] / "FashionMNIST/raw"))
    code, out = finish(torchrun(script, processes, *TINY, "--data.batch_size", 4))
    assert code == 0, out
    assert [p.name for p in Path("runs/lenet").iterdir()] == ["version_0"]
    assert json.loads((RUN / "test.json").read_text())["n"] == TEST
    assert out.count("Test accuracy") == 1
    assert out.count("train-images-idx3-ubyte") == 1, out
    check_ranks_agree(processes)


@long
def test_two_nodes_on_loopback(cli, script):
    cli("fit", *EXACT, "--data.batch_size", 10, "--name", "single")
    flags = ("--trainer.num_nodes", 2, "--data.batch_size", 5, "--data.steps_per_execution", 50)
    port = 29500 + os.getpid() % 1000
    nodes = []
    for rank in (0, 1):
        place = ("--nnodes", 2, "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port)
        nodes.append(torchrun(script, 1, *EXACT, *flags, options=place))
    for node in nodes:
        code, out = finish(node)
        assert code == 0, out
    assert [p.name for p in Path("runs/lenet").iterdir()] == ["version_0"]
    check_ranks_agree(2)
    check_like_one_process(RUN, Path("runs/single/version_0"))


@pytest.fixture(scope="session")
def undisturbed(tiny, tmp_path_factory):
    """The outcome of an undisturbed job of two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "data").symlink_to(tiny[0])
    code, out = finish(torchrun(prepare(folder, tiny), 2, *RICH, cwd=folder))
    assert code == 0, out
    return outcome(folder / RUN)


def check_goes_on(launcher, script, undisturbed):
    code, out = finish(launcher(script, 2, "--ckpt_path", "last"))
    assert code == 0, out
    check_ranks_agree(2)
    assert same(outcome(RUN), undisturbed)


@long
@pytest.mark.parametrize(
    ("launcher", "rank", "whom", "k"),
    [
        (torchrun, 0, "its parent", 4),  # as a cluster does it, or a terminal
        (torchrun, 1, "itself", 1),
        (lightning, 0, "itself", 4),
    ],
)
def test_a_job_stops_in_good_order_and_goes_on(cli, script, undisturbed, launcher, rank, whom, k):
    hit = f"{int(signal.SIGTERM)} {rank} 34 {whom.split()[-1]}"
    code, out = finish(launcher(script, 2, *RICH, "--data.steps_per_execution", k, hit=hit), timeout=60)
    assert code != 0
    assert out.count("resume with: python -m lenet_pl fit --ckpt_path") <= 1, out  # rank 0 says it, if it was told
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 27  # the first epoch's
    check_goes_on(launcher, script, undisturbed)


@long
def test_one_process_may_go_on_with_what_two_began(cli, script):
    flags = ("--data.batch_size", 5, "--data.flip", "true")
    code, out = finish(lightning(script, 2, *EXACT, *flags, hit=f"{int(signal.SIGKILL)} 0 34 itself"), timeout=60)
    assert code != 0, out
    alone = ("--trainer.devices", 1, "--trainer.strategy", "auto", "--data.batch_size", 10)
    code, _, err = cli("fit", "--ckpt_path", "last", *alone)
    assert code == 0, err
    cli("fit", *EXACT, "--data.batch_size", 10, "--data.flip", "true", "--name", "single")
    check_like_one_process(RUN, Path("runs/single/version_0"))


@long
@pytest.mark.parametrize(("launcher", "rank"), [(torchrun, 1), (lightning, 0), (lightning, 1)])
def test_a_killed_rank_ends_the_job_and_the_run_goes_on(script, undisturbed, launcher, rank):
    job = launcher(script, 2, *RICH, "--data.steps_per_execution", 4, hit=f"{int(signal.SIGKILL)} {rank} 40 itself")
    code, out = finish(job, timeout=60)
    assert code != 0, out
    check_goes_on(launcher, script, undisturbed)
