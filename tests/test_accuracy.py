"""The fast recipe reaches its accuracy on the real data, and training reads no test image."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from lenet_pl import cli as _cli  # noqa: F401 (takes hold of the real print before a test replaces it)
from lenet_pl import datamodule
from lenet_pl.__main__ import main


@pytest.mark.data
def test_fast_reaches_its_accuracy(real_data):
    assert main(["fit", "--config", str(ROOT / "configs/fast.yaml")]) == 0
    result = json.loads(Path("runs/fast/version_0/test.json").read_text())
    assert result["n"] == 10_000
    assert result["test_acc"] >= 0.9115  # ten seeds gave 91.65 to 92.15 %


def test_the_test_images_are_first_read_when_training_has_ended(cli, monkeypatch):
    events, real = [], datamodule.FashionMNISTDataModule._read
    monkeypatch.setattr(
        datamodule.FashionMNISTDataModule,
        "_read",
        lambda self, train: events.append("train images" if train else "test images") or real(self, train),
    )
    monkeypatch.setattr("builtins.print", lambda *args, **k: events.append(str(args[0]).split("  ")[0]))
    assert cli("fit", "--data.val_size", 60, "--trainer.max_epochs", 2)[0] == 0
    order = [e for e in events if e.endswith("images") or e.startswith(("epoch", "Test"))]
    assert [e.split(":")[0] for e in order] == [
        "train images",
        "epoch 1/2",
        "epoch 2/2",
        "test images",
        "Test accuracy",
    ]
