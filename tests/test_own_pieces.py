"""A user's own modules, callbacks and optimizers do in blocks what they do in single steps, and live on a resume."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import same, weights
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import Precision
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lenet_pl import FashionMNISTDataModule, LitLeNet

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 2)
RUN = Path("runs/lenet/version_0")
LAST = RUN / "checkpoints/last.ckpt"
STEPS = 34


def data(k=5):
    return FashionMNISTDataModule(batch_size=8, val_size=60, steps_per_execution=k)


def train(module, k=5, **options):
    """Trains an epoch, or as long as the options of the Trainer say; returns the trainer."""
    trainer = Trainer(**{"max_epochs": 1, **QUIET, **options})
    trainer.fit(module, data(k))
    return trainer


def rows():
    with (RUN / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_training_in_a_process_differs_from_the_first(workdir):
    seed_everything(0)
    first, second = LitLeNet(), None
    train(first)
    second = LitLeNet()
    third = LitLeNet()
    assert not torch.equal(second.net.classifier[0].weight, third.net.classifier[0].weight)
    train(third)
    assert not torch.equal(LitLeNet().net.classifier[0].weight, second.net.classifier[0].weight)


class Plateau(Callback):
    """Halves the rate after each epoch. Its state has the name of its argument."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def on_train_epoch_start(self, trainer, pl_module):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-3 * self.scale

    def on_train_epoch_end(self, trainer, pl_module):
        self.scale /= 2

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state_dict):
        self.scale = state_dict["scale"]


def test_the_state_of_a_callback_lives_on_a_resume(cli):
    flags = ("--trainer.callbacks+=test_own_pieces.Plateau", "--trainer.callbacks.scale=0.5")
    assert cli("fit", *TINY, *flags)[0] == 0
    assert cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 4)[0] == 0
    assert [float(row["lr"]) for row in rows()] == [5e-4, 2.5e-4, 1.25e-4, 6.25e-5]


class Smaller(Callback):
    """Makes the batches smaller after two epochs."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.datamodule.batch_size = 2


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_schedule_follows_a_batch_size_that_a_callback_changes(workdir):
    rates = []

    class Rates(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = LitLeNet(schedule="one_cycle", lr=0.01)
    train(module, max_epochs=4, callbacks=[Smaller(), Rates()], reload_dataloaders_every_n_epochs=1)
    assert min(rates) > 0
    assert rates[-1] < 1e-4


class Scaled(LitLeNet):
    """Has a forward of its own, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        return super().forward(images) / self.temperature


def test_a_derived_module_trains_with_its_own_forward_and_parameters(workdir):
    states = []
    for k in (5, 1):
        seed_everything(0)
        module = Scaled()
        train(module, k)
        assert module.calls == STEPS
        assert module.temperature != 1
        states.append(module.state_dict())
    assert same(*states)


class Scheduled(LitLeNet):
    """Has a scheduler that looks at each step."""

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 1e-2, total_steps=steps), "interval": "step"}]


def test_a_trainer_that_is_used_again_sees_the_scheduler_of_the_next_module(workdir, capsys):
    trainer = train(LitLeNet())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(Scheduled(), data())
    assert "because configure_optimizers asks for the number of steps" in capsys.readouterr().out
    (scheduler,) = trainer.lr_scheduler_configs
    assert (scheduler.scheduler.total_steps, scheduler.scheduler.last_epoch) == (3 * STEPS, 2 * STEPS)


@pytest.mark.filterwarnings("ignore")  # what Lightning says about such a resume
def test_a_checkpoint_within_an_epoch_resumes_with_single_steps(workdir):
    steps = ModelCheckpoint("steps", every_n_train_steps=20, save_top_k=-1)
    train(LitLeNet(), callbacks=[steps], enable_checkpointing=True)
    (path,) = Path("steps").glob("*.ckpt")
    states = []
    for k in (5, 1):
        module = LitLeNet()
        trainer = Trainer(max_epochs=2, **QUIET)
        trainer.fit(module, data(k), ckpt_path=path, weights_only=True)
        assert trainer.global_step == 2 * STEPS
        states.append(module.state_dict())
    assert same(*states)


def test_a_score_belongs_to_the_weights_that_were_validated(cli):
    code, out, err = cli("fit", *TINY, "--trainer.val_check_interval", 0.4)  # after 13 and 26 of 34 steps
    assert (code, err) == (0, "")
    assert "an epoch at whose end there is no validation cannot become best.ckpt" in out
    assert [(row["val_acc"], row["val_loss"]) for row in rows()] == [("", "")] * 2
    assert not (RUN / "checkpoints/best.ckpt").exists()
    assert cli("fit", *TINY, "--trainer.val_check_interval", 0.5, "--name", "half")[0] == 0
    assert Path("runs/half/version_0/checkpoints/best.ckpt").exists()


def test_gradients_at_the_end_of_an_epoch_are_those_of_the_last_step(workdir):
    norms = {1: [], 5: []}
    for k, found in norms.items():

        class Norm(Callback):
            def on_train_epoch_end(self, trainer, pl_module, found=found):
                found.append(pl_module.net.classifier[-1].weight.grad.norm().item())

        seed_everything(0)
        train(LitLeNet(), k, max_epochs=3, limit_val_batches=0, callbacks=[Norm()])
    assert norms[1] == norms[5]
    assert len(set(norms[5])) == 3


class Lenient(EarlyStopping):
    """Never ends a training."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        trainer.should_stop = False


def test_a_derived_early_stopping_may_go_on_after_a_resume(cli):
    flags = ["--trainer.callbacks+=test_own_pieces.Lenient", "--trainer.callbacks.monitor=val_acc"]
    flags += ["--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=1", "--trainer.callbacks.mode=max"]
    assert cli("fit", *TINY, *flags, "--trainer.max_epochs", 3)[0] == 0
    code, out, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 5)
    assert (code, err) == (0, "")
    assert "ended" not in out
    assert len(rows()) == 5


class Counting(Precision):
    """Counts the steps of the optimizer."""

    steps = 0

    def optimizer_step(self, *args, **kwargs):
        self.steps += 1
        return super().optimizer_step(*args, **kwargs)


def test_a_precision_plugin_of_the_user_sees_single_steps(workdir, capsys):
    plugin = Counting()
    train(LitLeNet(), plugins=[plugin])
    assert plugin.steps == STEPS
    assert "because Counting may change a step" in capsys.readouterr().out


class Stop(Callback):
    """Ends the training in the second epoch, before its first step or after its fourth."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1 and self.step == 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.current_epoch == 1 and batch_idx + 1 == self.step


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.long), 4])
def test_an_epoch_that_a_callback_cuts_short_does_not_count(cli, step):
    flags = ("--trainer.callbacks+=test_own_pieces.Stop", f"--trainer.callbacks.step={step}")
    code, out, err = cli("fit", *TINY, *flags, "--trainer.max_epochs", 3)
    assert (code, err) == (0, "")
    assert "The training ended after epoch 1: a callback asked for it" in out
    assert len(rows()) == 1
    assert cli("fit", "--ckpt_path", "last", "--trainer.callbacks", "null")[0] == 0
    assert cli("fit", *TINY, "--trainer.max_epochs", 3, "--name", "whole")[0] == 0
    assert same(weights(LAST), weights("runs/whole/version_0/checkpoints/last.ckpt"))
    assert len(rows()) == 3


def test_a_training_without_a_finished_epoch_is_a_failure(cli):
    code, _, err = cli("fit", *TINY, "--trainer.max_time", "00:00:00:00")
    assert code == 1
    assert "ended before its first epoch was finished" in err
    assert not Path("runs").exists()


class StopFirst(Callback):
    """Ends the training within its first epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = True


def test_auto_begins_a_run_again_that_has_finished_no_epoch(cli):
    command = ("fit", *TINY, "--ckpt_path", "auto")
    code, _, err = cli(*command, "--trainer.callbacks+=test_own_pieces.StopFirst")
    assert (code, "finished" in err) == (1, True)
    assert not (RUN / "finished.txt").exists()
    assert cli(*command, "--trainer.callbacks", "null")[0] == 0
    assert len(rows()) == 2


STOPPING = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss")


def test_a_training_that_diverges_within_an_epoch_is_a_failure(cli):
    flags = (*STOPPING, "--trainer.val_check_interval", 0.5)
    assert cli("fit", *TINY, *flags)[0] == 0
    code, _, err = cli("fit", "--ckpt_path", "last", "--model.lr", 1e30, "--trainer.max_epochs", 4)
    assert code == 1
    assert "the training diverged at lr 1e+30" in err
    assert not (RUN / "finished.txt").exists()


def test_the_steps_that_were_asked_for_are_kept(cli):
    flags = (*STOPPING, "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100")
    assert (
        cli("fit", *TINY, *flags, "--trainer.min_epochs", 5, "--trainer.max_epochs", 9, "--trainer.max_steps", 90)[0]
        == 0
    )
    assert torch.load(LAST, weights_only=True)["global_step"] == 90


def test_a_schedule_ends_at_the_end_also_where_max_steps_is_not_reached(cli):
    flags = (
        "--model.schedule",
        "one_cycle",
        "--model.lr",
        0.01,
        "--trainer.max_epochs",
        4,
        "--trainer.max_steps",
        1000,
    )
    stop = ("--trainer.callbacks+=test_own_pieces.Stop", "--trainer.callbacks.step=4")
    assert cli("fit", *TINY, *flags, *stop)[0] == 0
    assert cli("fit", "--ckpt_path", "last", "--data.batch_size", 32, "--trainer.callbacks", "null")[0] == 0
    rates = [float(row["lr"]) for row in rows()]
    assert len(rates) == 4
    assert min(rates) > 0
    assert rates[-1] < 1e-3


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_net_in_evaluation_mode_can_be_trained(workdir):
    module = LitLeNet(batch_norm=True)
    train(module)
    module.freeze()  # sets evaluation mode, too
    module.net.classifier[-1].weight.requires_grad_(True)
    before = {name: value.clone() for name, value in module.net.named_parameters()}
    train(module)
    changed = {name for name, value in module.net.named_parameters() if not torch.equal(value, before[name])}
    assert list(changed) == [list(before)[-2]]


@pytest.mark.parametrize("k", [5, 1])
def test_a_training_after_a_validation(workdir, k):
    module, trainer = LitLeNet(), Trainer(max_epochs=1, **QUIET)
    trainer.validate(module, data(k), verbose=False)
    trainer.fit(module, data(k))
    trainer.validate(module, data(k), verbose=False)
    train(module, k)


class Remembering(Callback):
    """Has a state that no checkpoint may hold, because reading it would run code."""

    def state_dict(self):
        return {"mean": np.mean([1.0, 2.0])}


class Cosine(Callback):
    """Sets a rate that no checkpoint may hold."""

    def on_train_epoch_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-3 * np.cos(trainer.current_epoch / 10)


@pytest.mark.parametrize("kind", ["Remembering", "Cosine"])
def test_a_state_that_could_not_be_read_back_is_refused_before_it_is_written(cli, kind):
    code, _, err = cli("fit", *TINY, f"--trainer.callbacks+=test_own_pieces.{kind}")
    assert code == 1
    assert "has a value of the kind numpy" in err
    assert len(err.splitlines()) <= 3
    assert not list(RUN.glob("checkpoints/*"))


class Closure(LitLeNet):
    """Has an optimizer that computes the loss itself."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.01, max_iter=1)


class LayerDrop(LitLeNet):
    """Leaves out a layer in every other step."""

    def forward(self, images):
        self.step = getattr(self, "step", 0) + self.training
        hidden = self.net.features(images)
        hidden = self.net.classifier[:3](hidden)
        middle = self.net.classifier[3](hidden) if self.step % 2 else hidden[:, :84].clone()
        return self.net.classifier[-1](middle.relu())


class ByHand(LitLeNet):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("kind", [Closure, LayerDrop, ByHand])
def test_other_ways_to_take_a_step(workdir, kind):
    states = []
    for k in (5, 1):
        seed_everything(0)
        module = kind()
        assert train(module, k).global_step == STEPS
        states.append(module.state_dict())
    assert same(*states)


def test_a_module_that_optimizes_by_hand_trains_on_anybodys_loader(workdir):
    loader = DataLoader(TensorDataset(torch.rand(16, 1, 28, 28), torch.arange(16) % 10), batch_size=8)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(ByHand(), loader, loader)
    assert trainer.global_step == 2
