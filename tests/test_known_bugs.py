"""Situations in which other projects on Lightning have had bugs, tried here."""

import csv
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import same
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from test_own_pieces import LAST, QUIET, RUN, STEPS, TINY, rows, train
from torch.optim.lr_scheduler import StepLR

from lenet_pl import FashionMNISTDataModule, LitLeNet, atomic, download
from lenet_pl.errors import Failure
from lenet_pl.pictures import files, prepare
from lenet_pl.runs import find


def config(callbacks):
    """Writes lenet.yaml with these callbacks, and returns the command that trains with it."""
    Path("lenet.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ("fit", "--config", "lenet.yaml", *TINY)


def stopping(monitor, **arguments):
    return {"class_path": "EarlyStopping", "init_args": {"monitor": monitor, **arguments}}


def callbacks_of(folder=RUN):
    """The class and arguments of the callbacks in config.yaml."""
    found = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["callbacks"]
    return [(piece["class_path"].split(".")[-1], piece.get("init_args", {})) for piece in found]


def test_a_single_callback_needs_no_list(cli):
    command = config(stopping("val_loss"))
    for resume in ((), ("--ckpt_path", "last"), ("--ckpt_path", "auto")):
        code, _, err = cli(*command, *resume)
        assert (code, err) == (0, "")
    assert cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)[0] == 0
    assert [name for name, _ in callbacks_of()] == ["EarlyStopping"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_callbacks_on_a_resume_replace_those_of_the_run_or_are_added_to_them(cli):
    assert cli(*config([stopping("val_loss"), stopping("val_acc", mode="max")]))[0] == 0
    added = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss")
    added += ("--trainer.callbacks.patience=7", "--trainer.callbacks+=Timer")
    assert cli("fit", "--ckpt_path", "last", *added)[0] == 0
    found = [(name, arguments.get("monitor"), arguments.get("patience")) for name, arguments in callbacks_of()]
    assert found == [("EarlyStopping", "val_acc", None), ("EarlyStopping", "val_loss", 7), ("Timer", None, None)]
    assert cli(*config([{"class_path": "LearningRateMonitor"}]), "--ckpt_path", "last")[0] == 0
    assert [name for name, _ in callbacks_of()] == ["LearningRateMonitor"]


def test_auto_goes_on_with_a_run_that_other_callbacks_would_not_have_ended(cli):
    def command(patience):
        stop = stopping("val_acc", mode="max", patience=patience, min_delta=1.0)
        return (*config([stop]), "--trainer.max_epochs", 5, "--ckpt_path", "auto")

    for patience, epochs in ((1, 2), (3, 4), (3, 4)):
        code, out, err = cli(*command(patience))
        assert (code, err) == (0, "")
        assert len(rows()) == epochs
    assert "is finished: EarlyStopping" in out


class Set(Callback):
    """Changes what a step does, after the training has begun."""

    def __init__(self, change):
        self.change = change

    def on_train_epoch_end(self, trainer, pl_module):
        self.change(trainer)


def add_scheduler(trainer):
    scheduler = StepLR(trainer.optimizers[0], 1)
    trainer.strategy.lr_scheduler_configs = [scheduler]


@pytest.mark.parametrize(
    "change",
    [
        lambda trainer: setattr(trainer, "accumulate_grad_batches", 4),
        lambda trainer: setattr(trainer, "gradient_clip_val", 0.1),
        add_scheduler,
    ],
)
def test_a_change_of_what_steps_do_is_not_ignored(workdir, change):
    with pytest.raises(Failure, match="which blocks would ignore"):
        train(LitLeNet(), callbacks=[Set(change)], max_epochs=2)


class Look(Callback):
    """Goes through the training images after an epoch, as normalisation statistics and plots need them."""

    def on_train_epoch_end(self, trainer, pl_module):
        for loader in (trainer.train_dataloader, trainer.datamodule.train_dataloader()):
            assert len(loader.dataset) == 270
            assert [len(labels) for _, labels in loader] == [8] * 33 + [6]
            images, _ = next(iter(loader))
            assert images.shape == (8, 1, 28, 28)


def test_a_callback_gets_mini_batches_from_the_loader_of_a_training(workdir):
    states = []
    for callbacks in ([], [Look()]):
        seed_everything(0)
        module = LitLeNet()
        trainer = train(module, callbacks=callbacks, max_epochs=3)
        assert trainer.global_step == 3 * STEPS
        states.append(module.state_dict())
    assert same(*states)


class Fold(FashionMNISTDataModule):
    """Validates on images of its own choice."""

    def setup(self, stage):
        super().setup(stage)
        images, labels = self.train_set
        self.train_set, self.val_set = (images[100:], labels[100:]), (images[:100], labels[:100])


def test_a_split_of_the_users_own_is_validated(workdir):
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(LitLeNet(), Fold(val_size=0, batch_size=8))
    assert "val_acc" in trainer.callback_metrics


def test_a_printed_config_can_be_read_back(cli):
    average = ("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.01")
    code, out, err = cli("fit", *TINY, *average, "--print_config")
    assert (code, err) == (0, "")
    Path("printed.yaml").write_text(out)
    code, _, err = cli("fit", "--config", "printed.yaml")
    assert (code, err) == (0, "")


def test_single_steps_are_logged_at_lightnings_interval(cli):
    monitor = ("--trainer.callbacks+=LearningRateMonitor", "--trainer.logger+=CSVLogger")
    assert cli("fit", *TINY, *monitor, "--trainer.logger.save_dir=logs")[0] == 0
    with next(Path("logs").rglob("metrics.csv")).open(newline="") as file:
        rates = [row["step"] for row in csv.DictReader(file) if row["lr-Adam"]]
    assert rates == ["0", "34", "49"]  # of 68 steps: at the start of each epoch, and after 50 steps


def test_a_profiler_sees_single_steps(cli):
    code, out, err = cli("fit", *TINY, "--trainer.profiler", "simple", "--trainer.max_epochs", 1)
    assert (code, err) == (0, "")
    assert "steps_per_execution: 1 instead of 50, because SimpleProfiler measures single steps" in out


def test_no_number_of_epochs_ends_a_training_but_time_does(cli):
    endless = ("--trainer.max_epochs", -1, "--trainer.max_time", "00:00:00:02")
    code, out, err = cli("fit", *TINY, *endless)
    assert (code, err) == (0, "")
    assert "the time limit is reached" in out
    assert torch.load(LAST, weights_only=True)["epoch"] + 1 == len(rows())


def copied(source, target):
    """Copies run folders in the order of their names, as many tools do, without their times."""
    for folder in sorted(source.iterdir()):
        shutil.copytree(folder, target / folder.name, copy_function=shutil.copyfile)
        time.sleep(0.01)


def test_the_newest_run_is_so_in_a_copy_too(cli, workdir):
    for _ in range(2):
        assert cli("fit", *TINY, "--test", "false")[0] == 0
    assert cli("fit", "--ckpt_path", RUN / "checkpoints/last.ckpt", "--trainer.max_epochs", 3)[0] == 0
    copied(RUN.parent, workdir / "elsewhere/runs/lenet")
    os.chdir(workdir / "elsewhere")
    assert find("last") == LAST  # version_0 was resumed after version_1


def test_a_run_without_its_settings_is_not_resumed_with_others(cli):
    assert cli("fit", *TINY)[0] == 0
    (RUN / "config.yaml").unlink()
    code, _, err = cli("fit", "--ckpt_path", "last")
    assert code == 2
    assert f"{RUN}/config.yaml does not exist" in err
    assert cli("test")[0] == 0


@pytest.mark.parametrize("row", ['3,51,0.001,"0,15","0,95",,,1.0', "mean,,,1,2,3,4,5"])
def test_results_that_are_no_numbers_are_refused_before_any_work(cli, row):
    assert cli("fit", *TINY)[0] == 0
    with (RUN / "results.csv").open("a") as file:
        file.write(row + "\n")
    for command in (("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3), ("report",)):
        code, _, err = cli(*command)
        assert code == 2
        assert f"line 4 of {RUN}/results.csv" in err


def test_a_run_resumed_through_a_link_keeps_its_name(cli):
    assert cli("fit", *TINY)[0] == 0
    Path("latest").symlink_to(RUN)
    again = ("fit", "--ckpt_path", "latest/checkpoints/last.ckpt", "--trainer.max_epochs", 3)
    for more in ((), ("--name", "lenet")):
        code, _, err = cli(*again, *more)
        assert (code, err) == (0, "")
    assert yaml.safe_load((RUN / "config.yaml").read_text())["name"] == "lenet"
    assert [folder.name for folder in RUN.parent.iterdir()] == ["version_0"]


def test_a_folder_whose_name_ends_in_a_colon_is_no_url(cli):
    root = ("--trainer.default_root_dir", "exp:")
    assert cli("fit", *TINY, *root)[0] == 0
    assert cli("test", *root)[0] == 0


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (28, 28)).save(path)
    return path


def test_every_picture_below_a_folder_is_read_or_counted(workdir, capsys):
    there = [picture(Path(name)) for name in ("album/b.png", "photos/a.png", "photos/deep/c.png")]
    Path("photos/linked").symlink_to(workdir / "album")
    Path("photos/deep/round").symlink_to(workdir / "photos")
    Path("photos/gone.png").symlink_to("nowhere")
    found = files.find("photos")
    assert [file.resolve() for file in found] == [workdir / file for file in (there[1], there[2], there[0])]
    assert "files that are not read: 1 (no readable file or folder 1)" in capsys.readouterr().out
    assert files.find("phot*") == found
    with pytest.raises(ValueError, match="empty"):
        files.find(["", "photos"])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_deep_grey_is_scaled_by_its_depth(bits):
    white = 2**bits - 1
    deep = Image.fromarray(np.full((40, 40), white, np.uint16))
    assert prepare.flatten(deep).getpixel((0, 0)) == (255, 255, 255)


def test_an_output_that_is_a_link_stays_one(workdir):
    Path("real.csv").write_text("old")
    Path("real.csv").chmod(0o600)
    Path("link.csv").symlink_to("real.csv")
    atomic.write_atomic(Path("link.csv"), b"new")
    assert Path("link.csv").is_symlink()
    assert Path("real.csv").read_text() == "new"
    assert Path("real.csv").stat().st_mode & 0o777 == 0o600
    name = 255 * "n"
    atomic.write_atomic(Path(name), b"new")
    assert Path(name).read_text() == "new"


def test_the_data_may_lie_one_level_higher_or_lower(tiny, workdir, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", ())
    root = tiny[0]
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("LENET_PL_DATA_SOURCE", f"~/{root.name}")
    assert len(list(download.ensure("one").iterdir())) == 4
    monkeypatch.delenv("LENET_PL_DATA_SOURCE")
    shutil.copytree(root / "FashionMNIST/raw", "flat")
    assert len(list(download.ensure("flat").iterdir())) == 4


def test_a_training_without_an_end_goes_on(cli):
    endless = ("--trainer.max_epochs", -1, "--trainer.max_time", "00:00:00:01")
    for resume in ("auto", "last", "auto"):
        code, _, err = cli("fit", *TINY, *endless, "--ckpt_path", resume)
        assert (code, err) == (0, "")


@pytest.mark.filterwarnings("ignore")  # what Lightning says about the callback that is not there
def test_a_checkpoint_of_stock_lightning_is_in_no_run_folder_of_ours(cli, workdir):
    folder = Path("lightning_logs/version_0/checkpoints")
    Trainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False).fit(
        LitLeNet(), FashionMNISTDataModule(val_size=60, batch_size=8)
    )
    path = next(folder.glob("*.ckpt"))
    assert cli("test", "--ckpt_path", path)[0] == 0
    assert (folder / "test.json").is_file()
    code, _, err = cli("fit", *TINY, "--ckpt_path", path)
    assert (code, err) == (0, "")
    assert [row["epoch"] for row in rows()] == ["2"]


def test_a_lost_best_checkpoint_is_found_anew(cli):
    assert cli("fit", *TINY, "--model.lr", 0.01)[0] == 0
    (RUN / "checkpoints/best.ckpt").unlink()
    resume = ("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert cli(*resume, "--model.lr", 1e-9)[0] == 0
    assert torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)["epoch"] == 2


def test_a_best_checkpoint_of_an_epoch_that_is_trained_again_is_replaced(cli):
    assert cli("fit", *TINY, "--model.lr", 0.0003, "--trainer.max_epochs", 1)[0] == 0
    last = LAST.read_bytes()
    assert cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3)[0] == 0
    newer = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)
    assert newer["epoch"] > 0
    LAST.write_bytes(last)  # as if it had been stopped between the two files
    assert cli("fit", "--ckpt_path", "last", "--model.lr", 0.5, "--trainer.max_epochs", 2)[0] == 0
    assert torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)["hyper_parameters"]["lr"] == 0.5


def stop(module):
    raise SystemExit(3)


def test_a_run_that_began_from_a_checkpoint_goes_on_from_there(cli, monkeypatch):
    assert cli("fit", *TINY)[0] == 0
    more = ("--name", "warm", "--trainer.max_epochs", 3)
    with monkeypatch.context() as patch:
        patch.setattr(LitLeNet, "on_validation_start", stop)  # in the first epoch
        assert cli("fit", "--ckpt_path", LAST, *more)[0] == 3
    assert cli("fit", "--ckpt_path", "auto", *more)[0] == 0
    with Path("runs/warm/version_0/results.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["3"]


def test_the_order_in_which_callbacks_were_added_does_not_matter(cli):
    monitor, timer = ("--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=Timer")
    assert cli("fit", *TINY, monitor, "--ckpt_path", "auto")[0] == 0
    assert cli("fit", timer, "--ckpt_path", "last")[0] == 0
    code, out, err = cli("fit", *TINY, monitor, "--ckpt_path", "auto")
    assert (code, err) == (0, "")
    assert "is finished" in out


def test_a_broken_link_does_not_cost_the_pictures_of_a_pattern(workdir, capsys):
    there = picture(Path("pics/a.png"))
    Path("pics/c.png").symlink_to("nowhere")
    assert files.find("pics/*.png") == [there]
    assert "no readable file or folder 1" in capsys.readouterr().out
