"""The scripts: their statistics, which seeds run again, and a whole benchmark on tiny data."""

import csv
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import conftest
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import benchmark  # noqa: E402
import seeds  # noqa: E402

TINY = "trainer: {max_epochs: 2}\ndata: {val_size: 60, batch_size: 8}\n"
NOTHING = Namespace(threads=None, accelerator="cpu")


def test_summary():
    half = 4.303 * 0.01 / math.sqrt(3)
    expected = {"mean": 0.91, "std": 0.01, "95 % from": 0.91 - half, "95 % to": 0.91 + half}
    assert seeds.summary([0.90, 0.91, 0.92]) == pytest.approx(expected)
    assert seeds.summary([0.9]) == {"mean": 0.9}
    assert seeds.summary([0.0, 1.0] * 10)["95 % to"] == pytest.approx(0.5 + 2.262 * math.sqrt(5 / 19 / 20))


@pytest.fixture
def run_seeds(cli, workdir, capsys, monkeypatch):
    """Runs seeds.py on 2 seeds of tiny.yaml with its children in-process; returns stdout and the fit commands."""
    (workdir / "tiny.yaml").write_text(TINY)
    started = []

    def train(command, env):
        started.append(command[3:])
        assert cli(*command[3:])[0] == 0

    def print_config(command, **options):
        code, out, _ = cli(*command[3:])
        return subprocess.CompletedProcess(command, code, out)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["scripts/seeds.py", "--config", "tiny.yaml", "--seeds", "2", *args])
        monkeypatch.setattr(seeds, "train", train)
        monkeypatch.setattr(subprocess, "run", print_config)
        started.clear()
        capsys.readouterr()
        seeds.main()
        return capsys.readouterr().out, started

    return run


def test_seeds_run_what_is_missing(run_seeds, workdir):
    out, started = run_seeds()
    assert [command[command.index("--seed_everything") + 1] for command in started] == ["0", "1"]
    folders = [workdir / f"runs/tiny-seed{seed}/version_0" for seed in (0, 1)]
    scores = [json.loads((f / "test.json").read_text())["test_acc"] for f in folders]
    stats = json.loads(out.splitlines()[-1])
    assert stats["test_acc"]["mean"] == pytest.approx(sum(scores) / 2)
    assert stats["test_acc"]["std"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
    with (folders[0] / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert seeds.result(folders[0])["val_acc"] == max(float(row["val_acc"]) for row in rows)
    assert f"| seed 0 | {scores[0]:.2%}" in " ".join((workdir / "runs/tiny-seeds.md").read_text().split())

    again, started = run_seeds()
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert not started


def test_seeds_go_on_with_an_interrupted_one(run_seeds, workdir):
    run_seeds("--trainer.max_epochs", "1")
    for folder in (workdir / f"runs/tiny-seed{seed}/version_0" for seed in (0, 1)):
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("max_epochs: 1", "max_epochs: 2"))
        (folder / "test.json").unlink()
    _, started = run_seeds()
    assert [command[command.index("--ckpt_path") + 1] for command in started] == [
        f"runs/tiny-seed{seed}/version_0/checkpoints/last.ckpt" for seed in (0, 1)
    ]
    assert [p.name for p in (workdir / "runs/tiny-seed0").iterdir()] == ["version_0"]
    assert len((workdir / "runs/tiny-seed0/version_0/results.csv").read_text().splitlines()) == 3


def test_seeds_refuse_results_of_other_settings(run_seeds):
    run_seeds()
    with pytest.raises(SystemExit, match=r"seed0/version_0 was made with other settings \(model.lr: 0.001 -> 0.01\)"):
        run_seeds("--model.lr", "0.01")


def test_watch(tmp_path):
    lines = "ready", "epoch 1  train_acc 80.00%  val_acc 70.00%", "epoch 2/2  train_loss 0.5  train_acc 90.00%  9.0 s"
    code = f"import time\nfor line in {lines!r}:\n    print(line)\n    time.sleep(0.2)\nb'x' * 2**26"
    run = benchmark.watch([sys.executable, "-c", code], NOTHING, str(tmp_path))
    assert [line for _, line in run.lines] == list(lines)
    assert run.start > 0
    assert run.epochs() == [pytest.approx(0.2, abs=0.15)]
    assert run._replace(ends=[run.start + 3]).epochs() == pytest.approx([3])
    assert run.train_acc == 0.9
    assert math.isnan(run.val_acc)
    assert run.memory > 64
    with pytest.raises(SystemExit, match=r"exit code 1 of .* -c (.|\n)*: no luck"):
        benchmark.watch([sys.executable, "-c", "import sys; sys.exit('why: no luck')"], NOTHING, str(tmp_path))


def test_differing():
    same = {"train_acc": 0.9, "val_acc": 0.88}
    result = {name: dict(same) for name in ("lenet_pl", "plain loop", "best loop", "stock Lightning")}
    assert benchmark.differing(result, rounds=5) == []
    result["plain loop"]["train_acc"] = 0.89
    result["best loop"]["val_acc"] = math.nan
    found = benchmark.differing(result, rounds=5)
    assert [fault.split(" is ")[0] for fault in found] == ["train_acc of plain loop", "val_acc of best loop"]
    assert len(benchmark.differing(result, rounds=1)) == 1  # one run alone may differ by a point


@pytest.mark.long
@pytest.mark.parametrize("what", ["--quick", "--linearity"])
def test_benchmark(tmp_path, monkeypatch, what):
    monkeypatch.setattr(conftest, "TRAIN", 6000)
    files = conftest.write_idx(tmp_path / "FashionMNIST" / "raw")
    # each child process finds the tiny files right
    (tmp_path / "sitecustomize.py").write_text(f"from lenet_pl import download\ndownload.FILES = {files!r}\n")
    path = os.pathsep.join([str(tmp_path), str(SCRIPTS.parent)])
    command = [sys.executable, SCRIPTS / "benchmark.py", what, "--threads", "1", "--data_dir", tmp_path]
    command += [] if what == "--quick" else ["--rounds", "1", "--epochs", "2"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert not done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == bool(result["void"])  # 94 steps of each kind of loop may well differ
    if what == "--linearity":
        assert list(result["linearity"]["us_per_image"]) == ["1000", "2000", "4000", "6000"]
        return
    assert result["machine"]["threads"] == 1
    assert {"lenet_pl", "plain loop", "best loop", "stock Lightning"} <= result["training"].keys()
    for row in result["training"].values():
        assert row["ms_per_step"] == pytest.approx(1000 * row["seconds_per_epoch"]["median"] / 94, abs=0.01)
        assert 0.05 < row["val_acc"] <= 1
        assert 100 < row["memory_mib"] < 2000
    assert all(rate > 10 for rate in result["inference"].values())
