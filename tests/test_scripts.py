"""The benchmark: its clock, its verdict, and a whole one on tiny data."""

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

NOTHING = Namespace(threads=None, accelerator="cpu")


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
