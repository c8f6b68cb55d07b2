"""What newcomers and practitioners did on their first day, and what broke then."""

import csv
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from conftest import same, weights
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from lenet_pl import FashionMNISTDataModule, LeNet5, LitLeNet, __version__
from lenet_pl.errors import CheckpointError
from lenet_pl.lenet import fold

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 2)
RUN = Path("runs/lenet/version_0")
BEST, LAST = RUN / "checkpoints/best.ckpt", RUN / "checkpoints/last.ckpt"


def trained_net(**arguments) -> LeNet5:
    """A net whose batch normalisation has seen some images."""
    torch.manual_seed(0)
    net = LeNet5(**arguments)
    for _ in range(3):
        net(torch.randn(32, 1, 28, 28))
    return net.eval()


def test_sync_batch_norm_is_folded():  # trainer.sync_batchnorm
    net = nn.SyncBatchNorm.convert_sync_batchnorm(trained_net(batch_norm=True, composed_kernels=True))
    plain, images = fold(net), torch.randn(16, 1, 28, 28)
    assert not [layer for layer in plain.modules() if isinstance(layer, nn.SyncBatchNorm)]
    with torch.no_grad():
        torch.testing.assert_close(plain(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("command", ["test", "validate", "predict", "report"])
def test_every_command_takes_a_runs_config(cli, command):
    assert cli("fit", *TINY)[0] == 0
    code, out, err = cli(command, "--config", RUN / "config.yaml")
    assert (code, err) == (0, "")
    assert str(BEST) in out


def test_print_config_shows_the_settings_of_the_checkpoint(cli):
    assert cli("fit", *TINY, "--model.lr", 0.01, "--model.dropout", 0.3)[0] == 0
    for command in ("fit --ckpt_path last --trainer.max_epochs 3", "test"):
        code, out, err = cli(*command.split(), "--print_config")
        assert (code, err) == (0, "")
        shown = yaml.safe_load(out)
        assert (shown["model"]["lr"], shown["model"]["dropout"], shown["data"]["val_size"]) == (0.01, 0.3, 60)
    assert not (RUN.parent / "version_1").exists()


def test_validate_keeps_the_split(cli):
    assert cli("fit", *TINY)[0] == 0
    for flag in (("--data.val_size", 100), ("--data.split_seed", 1)):
        code, _, err = cli("validate", *flag)
        assert code == 2
        assert f"{flag[0][2:]}={flag[1]}" in err
        assert "as in " in err
    code, _, err = cli("validate", "--ckpt_path", "pretrained")
    assert code == 2
    assert "so use test" in err


def test_a_part_of_the_test_images_is_no_score_of_the_run(cli, monkeypatch):
    monkeypatch.setattr("lenet_pl.loader.EVAL_BATCH_SIZE", 20)
    assert cli("fit", *TINY)[0] == 0
    before = (RUN / "test.json").read_text()
    assert json.loads(before)["n"] == 53
    code, out, _ = cli("test", "--trainer.limit_test_batches", 1)
    assert code == 0
    assert "53 images" not in out
    assert (RUN / "test.json").read_text() == before


def test_load_verifies_the_file(cli):
    assert cli("fit", *TINY)[0] == 0
    model = LitLeNet.load(BEST)
    assert not model.training
    assert same(model.state_dict(), weights(BEST))
    content = bytearray(BEST.read_bytes())
    content[len(content) // 2] ^= 64
    Path("flipped.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        LitLeNet.load("flipped.ckpt")


@pytest.mark.parametrize("name", ["1e-3", "1e3", "true", "null"])
def test_a_name_that_yaml_could_take_for_a_value(cli, name):
    assert cli("fit", *TINY, "--trainer.max_epochs", 1, "--name", name)[0] == 0
    code, _, err = cli("fit", "--config", f"runs/{name}/version_0/config.yaml")
    assert (code, err) == (0, "")
    assert Path(f"runs/{name}/version_1/test.json").is_file()


def test_config_names_the_versions(cli):
    assert cli("fit", *TINY)[0] == 0
    first = (RUN / "config.yaml").read_text().splitlines()[0]
    assert f"torch {torch.__version__.partition('+')[0]}" in first
    assert f"lenet_pl {__version__}" in first


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_empty_list_removes_the_callbacks(cli):
    stop = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss")
    assert cli("fit", *TINY, *stop)[0] == 0
    code, _, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--trainer.callbacks", "[]")
    assert (code, err) == (0, "")
    assert "EarlyStopping" not in (RUN / "config.yaml").read_text()


def test_a_checkpoint_plugin_of_the_users_replaces_ours(cli):
    plugin = f"{TorchCheckpointIO.__module__}.TorchCheckpointIO"
    code, _, err = cli("fit", *TINY, f"--trainer.plugins+={plugin}")
    assert (code, err) == (0, "")
    assert BEST.is_file()


def test_a_time_between_validations(workdir):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, val_check_interval=timedelta(hours=1), enable_model_summary=False, **options)
    trainer.fit(LitLeNet(), FashionMNISTDataModule(batch_size=8, val_size=60))
    assert trainer.global_step == 34


def test_a_checkpoint_of_a_stock_command_line(cli):
    assert cli("fit", *TINY)[0] == 0
    content = torch.load(BEST, weights_only=True)
    content["hyper_parameters"]["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
    torch.save(content, "theirs.ckpt")
    code, _, err = cli("test", "--ckpt_path", "theirs.ckpt")
    assert (code, err) == (0, "")


def test_barebones_has_no_scores(cli):
    code, _, err = cli("test", "--trainer.barebones", "true")
    assert code == 2
    assert "trainer.barebones=true" in err


def test_a_training_without_a_last_epoch_counts_without_an_end(cli):
    code, out, _ = cli("fit", *TINY[:4], "--trainer.max_epochs", "null", "--trainer.max_steps", 40)
    assert code == 0
    assert "epoch 2  train_loss" in out


@pytest.mark.report
def test_a_report_names_the_last_epoch_of_a_run_that_began_from_a_checkpoint(cli):
    assert cli("fit", *TINY, "--trainer.max_epochs", 1, "--name", "one")[0] == 0
    last = "runs/one/version_0/checkpoints/last.ckpt"
    code, _, err = cli("fit", "--ckpt_path", last, "--trainer.max_epochs", 3, "--name", "two")
    assert (code, err) == (0, "")
    with Path("runs/two/version_0/results.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["2", "3"]
    assert "of 3</td>" in Path("runs/two/version_0/report.html").read_text()
