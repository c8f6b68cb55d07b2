"""What researchers do with the parts from Python: nothing is skipped or changed without a word."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from test_own_pieces import QUIET, STEPS, data, train
from torch import nn

from lenet_pl import FashionMNISTDataModule, LeNet5, LitLeNet
from lenet_pl.errors import UsageError
from lenet_pl.lenet import fold


@pytest.mark.filterwarnings("ignore")  # what Lightning says about such a resume
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.long), 5, pytest.param(50, marks=pytest.mark.long)])
def test_a_checkpoint_of_a_validation_resumes_to_the_bit(workdir, k):
    seed_everything(0)
    saved = ModelCheckpoint("ck", filename="{step}", monitor="val_acc", save_top_k=-1)  # before the epoch's end
    options = {"check_val_every_n_epoch": 2, "enable_checkpointing": True}
    train(LitLeNet(), k, max_epochs=2, callbacks=[saved], **options)
    for other in (1, 5, 50):
        seed_everything(0)
        whole = LitLeNet()
        trainer = train(whole, other, max_epochs=4, check_val_every_n_epoch=2)
        assert trainer.global_step == 4 * STEPS
        seed_everything(0)
        resumed = LitLeNet()
        trainer = Trainer(max_epochs=4, check_val_every_n_epoch=2, **QUIET)
        trainer.fit(resumed, data(other), ckpt_path=f"ck/step={2 * STEPS}.ckpt", weights_only=True)
        assert trainer.global_step == 4 * STEPS
        assert same(whole.state_dict(), resumed.state_dict())


class Smooth(LitLeNet):
    """A module with another activation."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.net.features[2] = nn.GELU()


def test_a_derived_class_keeps_its_net(workdir):
    model = Smooth(batch_norm=True)
    train(model).save_checkpoint("smooth.ckpt")
    images = torch.randn(16, 1, 28, 28)
    assert torch.equal(Smooth.load("smooth.ckpt")(images), model.eval()(images))


def test_a_folded_net_keeps_its_dropout():
    net = LeNet5(dropout=0.25, batch_norm=True)
    assert fold(net).classifier[2].p == 0.25
    assert LitLeNet.pretrained().net.classifier[2].p == 0.05


def test_a_loaded_net_trains_on_and_is_loaded_again(workdir):
    trainer = train(LitLeNet(batch_norm=True, composed_kernels=True))
    trainer.save_checkpoint("first.ckpt")
    model = LitLeNet.load("first.ckpt").train()
    trainer = train(model)
    trainer.save_checkpoint("second.ckpt")
    assert same(LitLeNet.load("second.ckpt").state_dict(), model.state_dict())
    assert same(LitLeNet.load_from_checkpoint("second.ckpt", weights_only=True).state_dict(), model.state_dict())


class Mine(LitLeNet):
    """Takes other arguments than its base."""

    def __init__(self, *, width: int = 3) -> None:
        super().__init__(lr=2e-3)
        self.save_hyperparameters("width")


class Any(LitLeNet):
    """Hands all arguments on."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)


def test_a_derived_class_with_other_arguments_is_loaded(workdir):
    train(Mine(width=4)).save_checkpoint("mine.ckpt")
    assert Mine.load("mine.ckpt").hparams["width"] == 4
    train(Any(lr=0.01, variant="classic")).save_checkpoint("any.ckpt")
    assert Any.load("any.ckpt").hparams["lr"] == 0.01


class SoftLabels(FashionMNISTDataModule):
    """Gives a probability for each class, as mixup does."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, labels = batch
        return images, F.one_hot(labels, 10).float()


def test_soft_labels_have_an_accuracy(workdir):
    found = []
    for kind in (SoftLabels, FashionMNISTDataModule):
        seed_everything(0)
        trainer = Trainer(max_epochs=2, **QUIET)
        trainer.fit(LitLeNet(), kind(batch_size=8, val_size=60, steps_per_execution=1))
        found.append([float(trainer.callback_metrics[name]) for name in ("train_acc", "val_acc")])
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert min(found[0]) > 0


class Counted(Callback):
    """Replaces ``optimizer.step``, as some tools do."""

    calls = 0

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        step = optimizer.step

        def counted(closure=None):
            self.calls += 1
            return step(closure)

        optimizer.step = counted


def test_a_replaced_step_is_called_for_each_step(workdir):
    counter = Counted()
    train(LitLeNet(), callbacks=[counter])
    assert counter.calls == STEPS


class Break(Callback):
    """Ends a training as a tool for trials does."""

    def on_train_epoch_end(self, trainer, pl_module):
        raise RuntimeError("pruned")


def test_a_training_that_fails_leaves_no_traces(workdir):
    seed_everything(0)
    firsts = []
    for _ in range(3):
        module = LitLeNet()
        firsts.append(module.net.classifier[0].weight[0, 0].item())
        with pytest.raises(RuntimeError, match="pruned"):
            train(module, callbacks=[Break()])
        assert module.automatic_optimization
        assert module.seed == 0
    seed_everything(0)
    assert firsts == [LitLeNet().net.classifier[0].weight[0, 0].item() for _ in range(3)]
    train(module, gradient_clip_val=0.5)


def test_manual_seed_counts_after_seed_everything(workdir):
    seed_everything(7)
    seeds = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        module = LitLeNet()
        train(module)
        seeds.append(module.seed)
    assert seeds == [1, 2, 1]


@pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
def test_a_search_leaves_no_traces(workdir, search):
    seed_everything(3)
    module, images = LitLeNet(), data()
    options = {"num_training": 5} if search == "lr_find" else {"max_trials": 1, "steps_per_trial": 1}
    getattr(Tuner(Trainer(max_epochs=1, **QUIET)), search)(module, datamodule=images, **options)
    trainer = Trainer(max_epochs=1, gradient_clip_val=0.5, **QUIET)
    trainer.fit(module, images)
    assert module.seed == 3


@pytest.mark.report
def test_the_report_of_a_training_tells_how_it_was_trained(cli):
    flags = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 1)
    assert cli("fit", *flags, "--model.batch_norm", "linear")[0] == 0
    assert "batch normalisation while it trains" in Path("runs/lenet/version_0/report.html").read_text("utf-8")


class Groups(LitLeNet):
    """Has two rates."""

    def configure_optimizers(self):
        features, classifier = self.net.features.parameters(), self.net.classifier.parameters()
        return torch.optim.Adam([{"params": features, "lr": 1e-4}, {"params": classifier, "lr": 1e-2}])


def test_one_cycle_overwrites_no_rates_of_groups(workdir):
    with pytest.raises(UsageError, match="expected the same learning rate in all parameter groups"):
        train(Groups(schedule="one_cycle"))
    train(Groups())


class Looks(Callback):
    """Looks at training batches during a validation."""

    batches = 0

    def on_validation_epoch_end(self, trainer, pl_module):
        for images, labels in trainer.datamodule.train_dataloader():
            assert len(images) == len(labels)
            self.batches += 1


def test_a_callback_may_look_at_training_batches(workdir):
    states = []
    for callbacks in ([Looks()], []):
        seed_everything(0)
        module = LitLeNet()
        train(module, max_epochs=2, callbacks=callbacks)
        states.append(module.state_dict())
    assert same(*states)


class Skips(nn.Module):
    """A layer that is skipped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(84, 84)

    def forward(self, x):
        return x + self.layer(x) if torch.rand(()) < 0.5 else x


def test_a_layer_that_is_skipped_at_random(workdir):
    states = []
    for k in (5, 1):
        seed_everything(0)
        module = LitLeNet()
        module.net.classifier.insert(5, Skips())
        train(module, k)
        states.append(module.state_dict())
    assert same(*states)
