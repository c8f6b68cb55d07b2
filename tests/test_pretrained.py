"""The weights that come with the package: usable before any training, and as good as is claimed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TEST

from lenet_pl import LitLeNet, checkpoint, runs

CLAIMED = 0.9394  # of the 10,000 test images


@pytest.fixture
def packaged():
    if not runs.PRETRAINED.is_file():
        pytest.fail("lenet_pl/pretrained.ckpt is missing: see scripts/pretrained.py")


def test_it_is_small_and_holds_weights_alone(packaged):
    content = checkpoint.load_ours(runs.PRETRAINED, resume=False)
    assert runs.PRETRAINED.stat().st_size < 500_000
    assert "optimizer_states" not in content
    assert sum(weight.numel() for weight in content["state_dict"].values()) == 107_786
    assert (content["seed"], content["hyper_parameters"]["variant"]) == (0, "article")


def test_from_python(packaged):
    model = LitLeNet.pretrained()
    assert not model.training
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.long
def test_every_command_works_before_any_training(cli, packaged):
    for command in ("test", "predict", "report", "export"):
        code, out, err = cli(command)
        assert (code, err) == (0, ""), err
        assert out.startswith(f"checkpoint: {runs.PRETRAINED}"), out
    assert json.loads(Path("test.json").read_text())["n"] == TEST
    for name in ("predictions.csv", "report.html", "lenet.onnx"):
        assert Path(name).is_file()
    assert cli("test", "--ckpt_path", "pretrained")[0] == 0


def test_a_run_comes_before_the_package(cli, packaged):
    assert cli("fit", "--data.val_size", 60, "--trainer.max_epochs", 1)[0] == 0
    _, out, _ = cli("test")
    assert out.startswith("checkpoint: runs/lenet/version_0/checkpoints/best.ckpt")
    _, out, _ = cli("test", "--ckpt_path", "pretrained")
    assert out.startswith(f"checkpoint: {runs.PRETRAINED}")


def test_a_name_that_no_run_has_is_a_mistake(cli, packaged):
    for args in (("test", "--name", "typo"), ("report", "--config", "fast")):
        code, out, err = cli(*args)
        assert (code, out) == (2, "")
        assert f"there is no run of the name {args[2]!r} in 'runs'" in err


def test_no_training_goes_on_from_it(cli, packaged):
    code, _, err = cli("fit", "--ckpt_path", "pretrained")
    assert code == 2
    assert "holds no training to resume" in err


@pytest.mark.data
def test_it_scores_what_is_claimed(real_data, packaged):
    from lenet_pl.__main__ import main

    assert main(["test", "--ckpt_path", "pretrained"]) == 0
    assert json.loads(Path("test.json").read_text())["test_acc"] == pytest.approx(CLAIMED, abs=0.0002)
