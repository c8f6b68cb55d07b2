"""Several processes: disjoint shares, every test image once, one run folder, the same weights as one process."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TEST, weights

TINY = ("--data.val_size", 60, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu")
DDP = ("--trainer.devices", 2, "--trainer.strategy", "ddp")


@pytest.fixture
def script(workdir, tiny):
    """A script that is ``python -m lenet_pl`` on the tiny data, for launchers that start a file."""
    path = workdir / "tiny_lenet_pl.py"
    path.write_text(
        "import sys\nfrom lenet_pl import download\nfrom lenet_pl.__main__ import main\n"
        f"download.FILES = {tiny[1]!r}\nsys.exit(main(sys.argv[1:]))\n"
    )
    return path


def start(*command):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=env, **options)


def finish(process, timeout=120):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def torchrun(script, processes, *args, options=("--standalone",)):
    return start("-m", "torch.distributed.run", *options, "--nproc_per_node", processes, script, "fit", *TINY, *args)


def rows(run):
    with (run / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_like_one_process(run, single, k=1):
    assert json.loads((run / "test.json").read_text())["n"] == TEST
    for row, other in zip(rows(run), rows(single), strict=True):
        assert row["step"] == other["step"]
        for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
            assert float(row[name]) == pytest.approx(float(other[name]), abs=2e-5), name
    ours, theirs = (weights(r / "checkpoints/last.ckpt") for r in (run, single))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("k", [1, 50])
def test_lightnings_own_launcher_trains_like_one_process(cli, script, k):
    # 270 images in global batches of 10: no rest, so no image is repeated to fill the shares
    code, _, err = cli("fit", *TINY, "--data.batch_size", 10, "--name", "single", "--data.flip", "true")
    assert code == 0, err
    flags = ("--data.batch_size", 5, "--data.steps_per_execution", k, "--data.flip", "true")
    code, out = finish(start(script, "fit", *TINY, *DDP, *flags))
    assert code == 0, out
    assert [p.name for p in Path("runs/lenet").iterdir()] == ["version_0"]
    assert out.count("Test accuracy") == 1
    check_like_one_process(Path("runs/lenet/version_0"), Path("runs/single/version_0"))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_torchrun_fetches_the_data_once_and_counts_every_test_image_once(script, processes, tiny, monkeypatch):
    Path("data").unlink()  # a fresh machine, and the files in another folder of it
    monkeypatch.setenv("LENET_PL_DATA_SOURCE", str(tiny[0] / "FashionMNIST/raw"))
    code, out = finish(torchrun(script, processes, "--trainer.devices", processes, "--data.batch_size", 4))
    assert code == 0, out
    assert [p.name for p in Path("runs/lenet").iterdir()] == ["version_0"]
    assert json.loads(Path("runs/lenet/version_0/test.json").read_text())["n"] == TEST
    assert out.count("Test accuracy") == 1
    assert out.count("train-images-idx3-ubyte") == 1, out


@pytest.mark.long
def test_two_nodes_on_loopback(cli, script):
    cli("fit", *TINY, "--data.batch_size", 10, "--name", "single")
    flags = ("--trainer.num_nodes", 2, "--trainer.devices", 1, "--data.batch_size", 5, "--data.steps_per_execution", 50)
    port = 29500 + os.getpid() % 1000
    nodes = []
    for rank in (0, 1):
        place = ("--nnodes", 2, "--node_rank", rank, "--master_addr", "127.0.0.1", "--master_port", port)
        nodes.append(torchrun(script, 1, *flags, options=place))
    for node in nodes:
        code, out = finish(node)
        assert code == 0, out
    check_like_one_process(Path("runs/lenet/version_0"), Path("runs/single/version_0"))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def ranks(process):
    """Returns the process ids of the launcher's children that run the command line."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


LONG = ("--trainer.max_epochs", 4000, "--data.batch_size", 4)


@pytest.mark.long
def test_a_killed_rank_ends_the_job_and_the_run_goes_on(script):
    job = torchrun(script, 2, "--trainer.devices", 2, *LONG)
    last = Path("runs/lenet/version_0/checkpoints/last.ckpt")
    wait_for(last.exists)
    os.kill(ranks(job)[-1], signal.SIGKILL)
    code, out = finish(job, timeout=60)
    assert code != 0, out
    epoch = torch.load(last, weights_only=True)["epoch"]
    more = ("--ckpt_path", "last", *DDP, "--trainer.max_epochs", epoch + 3)
    code, out = finish(start(script, "fit", *TINY, "--data.batch_size", 4, *more))
    assert code == 0, out
    assert [int(row["epoch"]) for row in rows(Path("runs/lenet/version_0"))] == list(range(1, epoch + 4))


@pytest.mark.long
def test_sigterm_to_the_job_writes_last(script):
    job = torchrun(script, 2, "--trainer.devices", 2, *LONG, "--data.steps_per_execution", 1)
    last = Path("runs/lenet/version_0/checkpoints/last.ckpt")
    wait_for(last.exists)
    for pid in ranks(job):
        os.kill(pid, signal.SIGTERM)
    code, out = finish(job, timeout=60)
    assert code != 0
    assert "go on with" in out
    state = torch.load(last, weights_only=True)
    assert state["global_step"] >= 34 * state["epoch"]
