"""Training gives the same weights to the bit for every block size, and those of a plain PyTorch loop."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TEST, same, weights
from lightning.pytorch import Trainer, seed_everything

from lenet_pl import FashionMNISTDataModule, LitLeNet

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 2)
RICH = ("--data.flip", "true", "--data.shift", 1, "--model.dropout", 0.2)
RICHER = ("--model.batch_norm", "true", "--model.composed_kernels", "true", "--model.init", "orthogonal")


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("schedule", [pytest.param("constant", marks=pytest.mark.long), "one_cycle"])
def test_block_size_changes_nothing(cli, workdir, schedule):
    for k in (1, 7, 50):  # 34 steps an epoch: no multiple of 7, less than 50; the last mini-batch has 6 images
        args = (*TINY, *RICH, *RICHER, "--model.schedule", schedule, "--data.steps_per_execution", k, "--name", f"k{k}")
        code, _, err = cli("fit", *args)
        assert code == 0, err
    runs = [workdir / f"runs/k{k}/version_0" for k in (1, 7, 50)]
    states = [torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in runs]
    assert states[0]["global_step"] == 68
    for state, run in zip(states[1:], runs[1:], strict=True):
        for key in ("state_dict", "optimizer_states", "global_step"):
            assert same(states[0][key], state[key]), key
        for one, other in zip(rows(runs[0]), rows(run), strict=True):
            assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in other.items()})


@pytest.mark.long
@pytest.mark.report
def test_a_checkpoint_scores_the_same_everywhere(cli, workdir):
    lr = ("--model.lr", 0.02, "--trainer.max_epochs", 4)  # so large that the last epoch is not the best
    assert cli("fit", *TINY, *RICH, *RICHER, *lr)[0] == 0
    run = workdir / "runs/lenet/version_0"
    epochs = [torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)["epoch"] for name in ("best", "last")]
    assert epochs[0] < epochs[1]
    score = (run / "test.json").read_text()
    accuracy = f"{json.loads(score)['test_acc']:.2%}"
    assert f"{accuracy}" in (run / "report.html").read_text("utf-8")
    (run / "test.json").unlink()
    assert f"Test accuracy: {accuracy}" in cli("test")[1]
    assert (run / "test.json").read_text() == score
    best = rows(run)[epochs[0]]
    assert f"val_acc {float(best['val_acc']):.2%}  val_loss {float(best['val_loss']):.4f}" in cli("validate")[1]
    code, out, err = cli("export")
    assert code == 0, err
    assert f"Test accuracy: {accuracy}" in out
    assert cli("predict")[0] == 0
    with (workdir / "predictions.csv").open(newline="") as file:
        predicted = list(csv.DictReader(file))
    assert len(predicted) == TEST


def test_another_seed_changes_the_weights(cli, workdir):
    for seed in (0, 1):
        cli("fit", *TINY, "--seed_everything", seed, "--name", f"s{seed}")
    first, second = (weights(workdir / f"runs/s{seed}/version_0/checkpoints/last.ckpt") for seed in (0, 1))
    assert not same(first, second)


def test_bfloat16_blocks_use_fresh_weights(cli, workdir):
    for k in (1, 5):
        args = (*TINY, "--trainer.precision", "bf16-mixed", "--data.steps_per_execution", k, "--name", f"k{k}")
        assert cli("fit", *args)[0] == 0
    first, second = (weights(workdir / f"runs/k{k}/version_0/checkpoints/last.ckpt") for k in (1, 5))
    assert same(first, second)


def test_a_frozen_layer_stays_as_it_is(workdir):
    states = []
    for k in (1, 50):
        seed_everything(0)
        data, model = FashionMNISTDataModule(batch_size=8, val_size=60, steps_per_execution=k), LitLeNet()
        frozen = next(model.net.parameters()).requires_grad_(False)
        before = frozen.clone()
        trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.fit(model, data)
        assert torch.equal(frozen, before)
        states.append(model.net.state_dict())
    assert same(*states)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--trainer.max_steps", 5), 5),
        (("--trainer.limit_train_batches", 3), 6),
        (("--trainer.limit_train_batches", 1), 2),  # one batch, not 100 per cent
        (("--trainer.overfit_batches", 2), 4),
        (("--trainer.accumulate_grad_batches", 2), 34),
        (("--trainer.gradient_clip_val", 0.5), 68),
    ],
)
def test_trainer_options_that_touch_single_steps_keep_their_meaning(cli, workdir, flags, steps):
    code, _, err = cli("fit", *TINY, *flags)
    assert code == 0, err
    state = torch.load(workdir / "runs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == steps


def test_matches_a_plain_pytorch_loop(workdir):
    seed_everything(3)
    data, model = FashionMNISTDataModule(batch_size=8, val_size=60, steps_per_execution=4), LitLeNet()
    net = LitLeNet().net
    net.load_state_dict(model.net.state_dict())
    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(model, data)
    data.trainer = None  # without a trainer the loader gives plain mini-batches
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)  # the last mini-batch has 6 images
    assert same(net.state_dict(), model.net.state_dict())
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(total / 270, rel=1e-12)


def test_steps_and_rates_are_counted_in_optimizer_steps(cli, workdir):
    cli("fit", *TINY, "--model.schedule", "one_cycle", "--model.lr", 0.01)
    results = rows(workdir / "runs/lenet/version_0")
    assert [r["step"] for r in results] == ["34", "68"]
    rates = [float(r["lr"]) for r in results]  # of the last step: a line down from step 0.3 × 68 to the end, 68
    assert rates == pytest.approx([0.01 * (68 - 33) / (68 - 20.4), 0.01 * 1 / (68 - 20.4)])


def test_divergence_stops_the_run(cli, workdir):
    cli("fit", *TINY)
    last = workdir / "runs/lenet/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()
    code, _, err = cli("fit", "--ckpt_path", "last", "--model.lr", 1e30, "--trainer.max_epochs", 4)
    assert code == 1
    assert "train_loss is NaN or infinite in epoch 3" in err
    assert "--model.lr" in err
    assert last.read_bytes() == before


def test_weights_broken_by_the_last_step_are_not_kept(cli, workdir):
    code, _, err = cli(
        "fit", "--data.val_size", 60, "--data.batch_size", 270, "--model.lr", 1e38, "--trainer.max_epochs", 1
    )
    assert code == 1
    assert "is NaN or infinite in epoch 1" in err
    assert not list(workdir.glob("runs/*/*/checkpoints/*"))


def test_a_warmup_of_one_step(cli, workdir):
    code, _, err = cli("fit", *TINY, "--model.schedule", "one_cycle", "--model.warmup", 0.1, "--trainer.max_steps", 9)
    assert (code, err) == (0, "")
    assert [float(row["lr"]) for row in rows(workdir / "runs/lenet/version_0")] == pytest.approx([0.001 / 8])


def test_explicit_settings_win_on_resume(cli, workdir):
    cli("fit", *TINY, "--model.schedule", "one_cycle", "--model.lr", 0.01)
    flags = ("--model.lr", 0.002, "--model.weight_decay", 0.1, "--trainer.max_epochs", 4)
    code, _, err = cli("fit", "--ckpt_path", "last", *flags)
    assert code == 0, err
    state = torch.load(workdir / "runs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    group = state["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == pytest.approx(0.002 / (136 - 0.3 * 136))  # the last step of a cycle of 4 epochs
    assert group["weight_decay"] == 0.1
    assert state["epoch"] == 3


def test_block_size_may_change_between_epochs(cli, workdir):
    cli("fit", *TINY, "--data.steps_per_execution", 50)
    code, _, err = cli("fit", "--ckpt_path", "last", "--data.steps_per_execution", 1, "--trainer.max_epochs", 3)
    assert code == 0, err
    cli("fit", *TINY, "--trainer.max_epochs", 3, "--name", "whole")
    first, second = (weights(workdir / f"runs/{n}/version_0/checkpoints/last.ckpt") for n in ("lenet", "whole"))
    assert same(first, second)
    assert [r["step"] for r in rows(workdir / "runs/lenet/version_0")] == ["34", "68", "102"]


@pytest.mark.parametrize("size", [1, 269])  # 270 images train
def test_batch_norm_refuses_a_single_image(cli, workdir, size):
    code, _, err = cli("fit", "--data.val_size", 60, "--data.batch_size", size, "--model.batch_norm", "true")
    assert code == 2
    assert f"data.batch_size={size}: expected another size, because batch normalisation" in err
    assert not (workdir / "runs").exists()


def test_batch_norm_after_the_linear_layers_alone(cli, workdir):
    assert cli("fit", *TINY, "--model.batch_norm", "linear")[0] == 0
    assert cli("test")[0] == 0
    state = torch.load(workdir / "runs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert sum(name.endswith("running_mean") for name in state["state_dict"]) == 2
    code, _, err = cli("fit", "--ckpt_path", "last", "--model.batch_norm", "true", "--trainer.max_epochs", 3)
    assert code == 2
    assert "model.batch_norm=True: " in err


class Careful(LitLeNet):
    """Overrides what a textbook says; each override needs to see single steps."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.norms = [*getattr(self, "norms", []), float(self.net.features[0].weight.grad.norm())]


class Own(LitLeNet):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)


@pytest.mark.parametrize(("kind", "hook"), [(Careful, "on_before_optimizer_step"), (Own, "training_step")])
def test_a_derived_module_sees_single_steps(workdir, capsys, kind, hook):
    data, module = FashionMNISTDataModule(batch_size=8, val_size=60), kind()
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, **options).fit(module, data)
    reason = f"{kind.__name__} overrides {hook}"
    assert f"steps_per_execution: 1 instead of 50, because {reason}" in capsys.readouterr().out
    assert kind is Own or len(module.norms) == 34
