"""Lightning's own callbacks, loggers, profilers and tuners work here as in a stock training."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import same, weights
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from lenet_pl import FashionMNISTDataModule, LitLeNet
from lenet_pl.blocks import Block

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 2)
PLAIN = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
RUN = Path("runs/lenet/version_0")
LAST = RUN / "checkpoints/last.ckpt"

PIECES = {  # flags, and whether blocks give way
    "ModelCheckpoint every_n_train_steps=10": True,
    "ModelCheckpoint every_n_epochs=1 save_top_k=-1": False,
    "ModelCheckpoint monitor=val_loss save_last=true": False,
    "StochasticWeightAveraging swa_lrs=0.01 swa_epoch_start=1": True,
    "EMAWeightAveraging decay=0.9": True,
    'GradientAccumulationScheduler scheduling={"0":2}': True,
    "LearningRateFinder num_training_steps=20": False,  # in its own steps alone
    "BatchSizeFinder max_trials=2 steps_per_trial=2": False,
    "LearningRateMonitor": True,
    "DeviceStatsMonitor cpu_stats=false": True,
    "EarlyStopping monitor=val_acc": False,
    "Timer duration=01:00:00:00": False,
    "RichModelSummary": False,
    "ModelSummary max_depth=2": False,
    "TQDMProgressBar": False,
    "RichProgressBar": False,
    "OnExceptionCheckpoint dirpath=crash": False,
    "ModelPruning pruning_fn=l1_unstructured amount=0.1": False,
}


QUICK = ("ModelCheckpoint every_n_train_steps=10", "EarlyStopping monitor=val_acc")


def flags(piece):
    """Turns ``"Name key=value"`` into flags."""
    name, *options = piece.split()
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{option}" for option in options)]


@pytest.mark.filterwarnings("ignore")  # what a piece says about itself
@pytest.mark.parametrize(
    ("piece", "gives_way"),
    [pytest.param(*item, marks=[] if item[0] in QUICK else pytest.mark.long) for item in PIECES.items()],
)
def test_a_callback_does_the_same_in_blocks_as_step_by_step(cli, piece, gives_way):
    outs = []
    for k in (50, 1):
        code, out, err = cli("fit", *TINY, *flags(piece), "--data.steps_per_execution", k, "--name", f"k{k}")
        assert code == 0, err
        outs.append(out)
    folders = [Path(f"runs/k{k}/version_0") for k in (50, 1)]
    names = [sorted(p.name for p in folder.glob("checkpoints/*")) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        states = [torch.load(folder / "checkpoints" / name, weights_only=True) for folder in folders]
        for key in ("state_dict", "optimizer_states", "global_step"):
            assert same(states[0][key], states[1][key]), (name, key)
    name = piece.split()[0]
    assert bool(re.search(rf"steps_per_execution: 1 instead of 50, because {name}", outs[0])) == gives_way
    assert "steps_per_execution" not in outs[1]


def test_every_callback_of_lightning_is_known():
    """If Lightning adds a callback, add it to the table above, or to this list with a reason."""
    elsewhere = {
        "Callback": "has no hooks",
        "Checkpoint": "a base class",
        "LambdaCallback": "below",
        "ProgressBar": "a base class",
        "WeightAveraging": "EMAWeightAveraging is one",
        "BackboneFinetuning": "needs a module with a backbone",
        "BaseFinetuning": "a base class",
        "BasePredictionWriter": "a base class, for predict",
        "SpikeDetection": "Lightning 2.6.6 cannot save its state: it has no attribute 'running'",
        "ThroughputMonitor": "needs a batch size function, so it comes from Python only",
    }
    known = {piece.split()[0] for piece in PIECES} | elsewhere.keys()
    assert {name for name, kind in vars(callbacks).items() if inspect.isclass(kind)} <= known


class Watcher(Callback):
    """A user's own callback that looks at batches."""

    def __init__(self) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


class Epochs(Callback):
    """A user's own callback that looks at epochs."""

    def __init__(self) -> None:
        self.losses = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def fit(callback, capsys, module=None, **options):
    seed_everything(0)
    data = FashionMNISTDataModule(batch_size=8, val_size=60)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, callbacks=callback, **quiet, **options)
    capsys.readouterr()
    trainer.fit(module or LitLeNet(), data)
    return trainer, capsys.readouterr().out


def test_own_callbacks(workdir, capsys):
    watcher, epochs = Watcher(), Epochs()
    _, out = fit([watcher, epochs], capsys)
    assert len(watcher.losses) == 34
    assert "because Watcher overrides on_train_batch_end" in out
    assert epochs.losses[0] == pytest.approx(
        sum(loss * size for loss, size in zip(watcher.losses, [8] * 33 + [6], strict=True)) / 270, rel=1e-5
    )
    alone = Epochs()
    _, out = fit(alone, capsys)
    assert "steps_per_execution" not in out
    assert alone.losses == pytest.approx(epochs.losses)
    steps = []
    _, out = fit(callbacks.LambdaCallback(on_train_batch_start=lambda *args: steps.append(args[-1])), capsys)
    assert steps == list(range(34))


def test_a_module_that_overrides_a_hook_of_the_step(workdir, capsys):
    class Mine(LitLeNet):
        steps = 0

        def optimizer_step(self, *args, **kwargs):
            self.steps += 1
            super().optimizer_step(*args, **kwargs)

    module = Mine()
    _, out = fit([], capsys, module)
    assert module.steps == 34
    assert "because Mine overrides optimizer_step" in out


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_a_module_that_looks_at_batches_after_their_transfer(workdir, capsys):
    class Mine(LitLeNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch
            return images.flip(-1), labels

    _, out = fit([], capsys, Mine())
    assert "because Mine overrides on_after_batch_transfer" in out


def test_a_datamodule_that_looks_at_batches_after_their_transfer(workdir, capsys):
    class Mirrored(FashionMNISTDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = batch
            return images.flip(-1), labels

    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(LitLeNet(), Mirrored(batch_size=8, val_size=60))
    assert "because Mirrored overrides on_after_batch_transfer" in capsys.readouterr().out


def test_one_module_trains_with_blocks_and_without_in_turn(workdir, capsys):
    module = LitLeNet()
    fit([], capsys, module)
    fit([], capsys, module, gradient_clip_val=0.5)
    trainer, _ = fit([], capsys, module)
    assert trainer.global_step == 34


def test_the_rate_finder_finds_the_same_rate_step_by_step(workdir, capsys):
    rates = []
    for k in (50, 1):
        seed_everything(0)
        data, module = FashionMNISTDataModule(batch_size=8, val_size=60, steps_per_execution=k), LitLeNet()
        trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        finder = Tuner(trainer).lr_find(module, datamodule=data, num_training=30)
        assert all(loss == loss for loss in finder.results["loss"])
        rates.append((finder.suggestion(), module.hparams["lr"]))
        trainer.fit(module, data)
        rates.append(float(trainer.callback_metrics["train_loss"]))
    assert rates[0] == rates[2]
    assert rates[1] == pytest.approx(rates[3], rel=1e-7)
    assert rates[0][0] == rates[0][1] != 1e-3


def test_the_module_trains_on_anybodys_loader(workdir):
    images, labels = torch.rand(96, 1, 28, 28), torch.randint(0, 10, (96,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(LitLeNet(schedule="one_cycle"), loader, loader)
    assert trainer.global_step == 24
    assert {"train_loss", "train_acc", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()


class Anybody(LightningModule):
    """A module that knows nothing about blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        self.seen = []

    def training_step(self, batch, batch_idx):
        assert not isinstance(batch, Block)
        images, labels = batch
        self.seen.append(len(labels))
        return torch.nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        assert batch[0].shape[1:] == (1, 28, 28)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_data_serve_anybodys_module(workdir, capsys):
    module = Anybody()
    trainer, out = fit([], capsys, module)
    assert module.seen == [8] * 33 + [6]
    assert trainer.global_step == 34
    assert out == ""


def test_a_second_checkpoint_lives_beside_best_and_last(cli):
    for piece in ("ModelCheckpoint", "ModelCheckpoint monitor=val_acc mode=max filename=best-{epoch} save_last=true"):
        name = "plain" if piece == "ModelCheckpoint" else "monitored"
        code, _, err = cli("fit", *TINY, *flags(piece), "--name", name)
        assert code == 0, err
        names = {p.name for p in Path(f"runs/{name}/version_0/checkpoints").iterdir()}
        assert {"best.ckpt", "last.ckpt"} < names
        code, _, err = cli(
            "fit", *TINY, *flags(piece), "--name", name, "--ckpt_path", "last", "--trainer.max_epochs", 3
        )
        assert code == 0, err


def test_a_checkpoint_within_an_epoch_is_written_but_no_place_to_go_on_from(cli):
    steps = flags("ModelCheckpoint every_n_train_steps=10 save_top_k=-1")
    assert cli("fit", *TINY, *steps)[0] == 0
    found = sorted(int(re.search(r"step=(\d+)", p.name)[1]) for p in RUN.glob("checkpoints/*step=*"))
    assert found == [10, 20, 30, 40, 50, 60]
    path = next(RUN.glob("checkpoints/*step=10.ckpt"))
    assert cli("test", "--ckpt_path", path)[0] == 0
    code, _, err = cli("fit", "--ckpt_path", path)
    assert code == 2
    assert "within an epoch" in err


def test_a_checkpoint_of_the_last_batch_belongs_to_an_epoch_that_is_not_finished(cli):
    before_the_end = flags("ModelCheckpoint save_on_train_epoch_end=false monitor=val_acc filename=early")
    assert cli("fit", *TINY, *before_the_end)[0] == 0
    code, _, err = cli("fit", "--ckpt_path", RUN / "checkpoints/early.ckpt", "--trainer.max_epochs", 3)
    assert code == 2
    assert "within an epoch" in err


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
@pytest.mark.filterwarnings("ignore")
def test_the_users_bar_replaces_ours(cli, bar, monkeypatch):
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda answer=terminal: answer, raising=False)
        code, _, err = cli("fit", *TINY, *flags(bar))
        assert code == 0, err


def test_barebones(cli):
    code, _, err = cli("fit", *TINY, "--trainer.barebones", "true")
    assert code == 0, err
    assert not Path("runs").exists()


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
@pytest.mark.filterwarnings("ignore")  # of DeviceStatsMonitor, about other processes
def test_a_logger_of_the_user(cli, logger):
    device = flags("DeviceStatsMonitor cpu_stats=false")
    code, _, err = cli("fit", *TINY, f"--trainer.logger+={logger}", "--trainer.logger.save_dir=logs", *device)
    assert code == 0, err
    assert any(Path("logs").rglob("*"))
    assert not list(RUN.glob("events*"))  # theirs, not ours


@pytest.mark.filterwarnings("ignore")
def test_our_logger_is_there_for_the_trainers_own_checks(cli):
    code, _, err = cli("fit", *TINY, *flags("LearningRateMonitor"), *flags("DeviceStatsMonitor cpu_stats=false"))
    assert code == 0, err
    assert list(RUN.glob("events*"))


@pytest.mark.parametrize(
    "profiler", ["simple", *(pytest.param(name, marks=pytest.mark.long) for name in ("advanced", "pytorch"))]
)
@pytest.mark.filterwarnings("ignore")
def test_a_profilers_report_is_seen(cli, profiler, caplog):
    caplog.set_level("INFO", "lightning.pytorch")
    code, _, err = cli("fit", *TINY, "--trainer.max_epochs", 1, "--trainer.profiler", profiler)
    assert code == 0, err
    assert "run_training_batch" in caplog.text or "Self CPU time total" in caplog.text


@pytest.mark.long
def test_what_was_asked_for_is_heard(spawn):
    stop = flags("EarlyStopping monitor=val_acc patience=1 verbose=true")
    process = spawn("fit", *TINY, "--trainer.max_epochs", 30, "--trainer.profiler", "simple", *stop)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Metric val_acc improved" in err
    assert "Profiler Report" in err
    assert re.search(
        r"^The training ended after epoch \d+: EarlyStopping: Monitored metric val_acc did not improve", out, re.M
    )
    assert "GPU available" not in err + out
    assert "Tip" not in err + out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--trainer.max_steps", 40), r"trainer.max_steps=40 is reached"),
        (
            ("--trainer.max_time", "00:00:00:01", "--trainer.max_epochs", 100000),
            "the time limit is reached",
        ),
    ],
)
def test_why_a_training_ended_early(cli, options, reason):
    code, out, err = cli("fit", *TINY, *options)
    assert code == 0, err
    assert re.search(rf"^The training ended after epoch \d+: {reason}$", out, re.M), out


def test_the_command_that_began_a_run_goes_on_with_it_and_doubles_nothing(cli):
    many = [*flags("EarlyStopping monitor=val_acc patience=20"), *flags("ModelCheckpoint every_n_epochs=1")]
    many += [
        *flags("ModelCheckpoint monitor=val_loss"),
        "--trainer.logger+=CSVLogger",
        "--trainer.logger.save_dir=logs",
    ]
    assert cli("fit", *TINY, *many)[0] == 0
    before = yaml.safe_load((RUN / "config.yaml").read_text())
    for word in ("last", "auto"):
        code, _, err = cli("fit", *TINY, *many, "--ckpt_path", word, "--trainer.max_epochs", 3)
        assert code == 0, err
        after = yaml.safe_load((RUN / "config.yaml").read_text())
        assert after["trainer"]["callbacks"] == before["trainer"]["callbacks"]
        assert after["trainer"]["logger"] == before["trainer"]["logger"]
    assert len(before["trainer"]["callbacks"]) == 3


def test_what_is_said_now_counts_now(cli):
    stop = "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_acc"
    assert cli("fit", *TINY, *stop, "--trainer.callbacks.patience=30")[0] == 0
    command = ("fit", "--ckpt_path", "last", *stop, "--trainer.callbacks.patience=2", "--trainer.max_epochs", 50)
    code, out, err = cli(*command)
    assert code == 0, err
    assert "The training ended after epoch" in out
    (callback,) = yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["callbacks"]
    assert callback["init_args"]["patience"] == 2


@pytest.mark.filterwarnings("ignore")
def test_a_saved_configuration_can_always_be_read_back(cli):
    assert cli("fit", *TINY, *flags("StochasticWeightAveraging swa_lrs=0.01 swa_epoch_start=1"))[0] == 0
    assert "Unable to serialize" not in (RUN / "config.yaml").read_text()
    code, _, err = cli("fit", "--config", RUN / "config.yaml")
    assert code == 0, err
    assert same(weights(LAST), weights(RUN.with_name("version_1") / "checkpoints/last.ckpt"))


def test_own_checkpoint_from_python(workdir, capsys):
    kept = ModelCheckpoint(dirpath="mine", every_n_train_steps=10, save_top_k=-1)
    seed_everything(0)
    trainer = Trainer(max_epochs=1, callbacks=kept, logger=False, enable_progress_bar=False)
    trainer.fit(LitLeNet(), FashionMNISTDataModule(batch_size=8, val_size=60))
    assert sorted(p.name for p in Path("mine").iterdir()) == [f"epoch=0-step={n}.ckpt" for n in (10, 20, 30)]


def test_what_searches_at_the_beginning_does_not_begin_a_resumed_run_again(cli, workdir):
    finder = ("--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=20")
    assert cli("fit", *TINY, *finder, "--trainer.max_epochs", 1)[0] == 0
    found = torch.load("runs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]["lr"]
    code, _, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert code == 2
    remedy = f"--trainer.callbacks null --model.lr {found} --data.batch_size 8"
    assert remedy in err
    code, out, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2, *remedy.split())
    assert code == 0, err
    assert "epoch 2/2" in out
    assert "epoch 1/2" not in out


def test_a_derived_piece_of_lightning_sees_single_steps(workdir, capsys):
    class Bar(callbacks.TQDMProgressBar):
        steps = 0

        def on_train_batch_end(self, *args, **kwargs):
            super().on_train_batch_end(*args, **kwargs)
            self.steps += 1

    bar = Bar()
    data = FashionMNISTDataModule(batch_size=8, val_size=60)
    Trainer(max_epochs=1, callbacks=bar, logger=False, enable_checkpointing=False, accelerator="cpu").fit(
        LitLeNet(), data
    )
    assert "because Bar overrides on_train_batch_end" in capsys.readouterr().out
    assert bar.steps == 34


def test_a_derived_optimizer_takes_its_own_steps(workdir, capsys):
    class Counting(torch.optim.Adam):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    class Mine(LitLeNet):
        def configure_optimizers(self):
            self.optimizer = Counting(self.parameters(), 0.001)
            return self.optimizer

    module = Mine()
    _, out = fit([], capsys, module)
    assert "steps_per_execution" not in out
    assert module.optimizer.steps == 34


class Cut(Callback):
    """Clamps all weights after each step of the optimizer, as a user's constraint may."""

    def on_train_start(self, trainer, pl_module):
        def clamp(*args):
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight.clamp_(-0.05, 0.05)

        trainer.optimizers[0].register_step_post_hook(clamp)


def test_hooks_of_the_optimizer_are_called_in_every_block(workdir):
    model, data = LitLeNet(), FashionMNISTDataModule(batch_size=8, val_size=60, steps_per_execution=4)
    Trainer(max_epochs=2, callbacks=[Cut()], **PLAIN).fit(model, data)
    assert max(weight.abs().max() for weight in model.parameters()) <= 0.05


class Manual(LitLeNet):
    """Optimizes by hand, as Lightning allows."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self._logits_and_loss(batch)[1])
        optimizer.step()


def test_a_derived_module_may_optimize_by_hand(workdir):
    model, data = Manual(), FashionMNISTDataModule(batch_size=8, val_size=60)
    trainer = Trainer(max_epochs=1, **PLAIN)
    trainer.fit(model, data)
    assert trainer.global_step == 34
    assert not model.automatic_optimization


class OwnOptimizer(LitLeNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def test_a_resumed_optimizer_keeps_its_own_settings(workdir):
    data = FashionMNISTDataModule(batch_size=8, val_size=60)
    first = Trainer(max_epochs=1, **PLAIN)
    first.fit(OwnOptimizer(), data)
    first.save_checkpoint("own.ckpt")
    again = Trainer(max_epochs=2, **PLAIN)
    again.fit(OwnOptimizer(), data, ckpt_path="own.ckpt")
    (group,) = again.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 5e-4)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_the_loader_of_a_finished_training_gives_plain_batches(workdir):
    model, data = LitLeNet(), FashionMNISTDataModule(batch_size=8, val_size=60)
    trainer = Trainer(max_epochs=1, **PLAIN)
    trainer.fit(model, data)
    images, labels = next(iter(data.train_dataloader()))
    assert (len(images), len(labels)) == (8, 8)
    assert "val_acc" in trainer.validate(model, dataloaders=data.train_dataloader(), verbose=False)[0]
    Trainer(max_epochs=1, **PLAIN).fit(LitLeNet(), data.train_dataloader())


class Noisy(FashionMNISTDataModule):
    def train_dataloader(self):
        images, labels = zip(*super().train_dataloader(), strict=True)
        return DataLoader(TensorDataset(torch.cat(images), torch.cat(labels)), batch_size=8)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*is a `RandomSampler`")
def test_a_derived_datamodule_may_wrap_the_loader(workdir, capsys):
    trainer = Trainer(max_epochs=1, **PLAIN)
    trainer.fit(LitLeNet(schedule="one_cycle"), Noisy(batch_size=8, val_size=60))
    assert trainer.global_step == 34
    assert "because Noisy overrides train_dataloader" in capsys.readouterr().out


def test_no_validation_images_leave_the_trainer_as_it_is(workdir):
    trainer, model = Trainer(max_epochs=1, **PLAIN), LitLeNet()
    trainer.fit(model, FashionMNISTDataModule(batch_size=8, val_size=0))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, FashionMNISTDataModule(batch_size=8, val_size=60))
    assert "val_acc" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_predict_takes_images_without_labels(workdir):
    images = torch.rand(5, 1, 28, 28)
    model = LitLeNet().eval()
    (probabilities,) = Trainer(**PLAIN).predict(model, DataLoader(images, batch_size=5))
    torch.testing.assert_close(probabilities, model(images).softmax(-1))


def test_a_checkpoint_named_best_does_not_take_the_place_of_ours(cli):
    own = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=best")
    code, _, err = cli("fit", *TINY, *own, "--trainer.callbacks.monitor=val_loss")
    assert (code, err) == (0, "")
    assert {p.name for p in (RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "ModelCheckpoint-best.ckpt"}


def test_a_timer_of_the_user_replaces_max_time(cli):
    timer = ("--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00")
    code, _, err = cli("fit", *TINY, "--trainer.max_time", "00:01:00:00", *timer)
    assert (code, err) == (0, "")
