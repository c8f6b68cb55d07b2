"""A CUDA graph takes the same optimizer steps. Without a GPU only the logic around the graph is tested."""

import contextlib
import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import same, weights
from torch.optim.adam import Adam

from lenet_pl import LeNet5, LitLeNet
from lenet_pl.blocks import Block
from lenet_pl.graph import BlockGraph

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of NVIDIA")
TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 3)
RICH = ("--data.flip", "true", "--data.shift", 1, "--model.dropout", 0.2)
RICH += ("--model.batch_norm", "true", "--model.composed_kernels", "true")
EXACT = ("--trainer.deterministic", "true")


class Recorded:
    """Stands for a CUDA graph. Without a GPU a recording takes the steps already, so the first replay takes none."""

    def __init__(self):
        self.runs = -1

    def replay(self):
        self.runs += 1
        if self.runs:
            shape, (_, inputs, results) = next(item for item in self.owner.graphs.items() if item[1][0] is self)
            for buffer, value in zip(results, self.owner._steps(shape[1], inputs), strict=True):
                buffer.copy_(value)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_its_steps_are_those_of_adam(monkeypatch, decay, batch_norm):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    close = {"rtol": 1e-4, "atol": 1e-4}  # the rates are rounded
    # With batch norm the gradients of biases are rounding errors. Adam blows them up, so the rate is small here.
    rate = 1e-5 if batch_norm else 1e-3
    torch.manual_seed(0)
    net = LeNet5(batch_norm=batch_norm)
    other = LeNet5(batch_norm=batch_norm)
    other.load_state_dict(net.state_dict())

    def forward_of(net):
        def forward(batch):
            logits = net(batch[0])
            return logits, F.cross_entropy(logits, batch[1])

        return forward

    def images(n, batch_size=8):
        return Block([torch.rand(n, 1, 28, 28), torch.randint(0, 10, (n,))], batch_size)

    ours, theirs = [
        Adam(n.parameters(), fused=True, weight_decay=decay, decoupled_weight_decay=True) for n in (net, other)
    ]
    forward_of(net)(next(iter(images(8))))[1].backward()
    ours.step()
    net.load_state_dict(other.state_dict())
    for state in ours.state.values():
        for tensor in state.values():
            tensor.zero_()
    Recorded.owner = BlockGraph(ours, forward_of(net), compiled=False)
    for n in 4 * [24, 13]:  # usual, recorded, replayed, replayed
        block = images(n)
        rates = [rate * (1 + k) for k in range(len(block))]
        outputs, losses = Recorded.owner(block.fields, block.batch_size, rates)
        expected = []
        for batch, lr in zip(block, rates, strict=True):
            theirs.param_groups[0]["lr"] = lr
            logits, loss = forward_of(other)(batch)
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            expected.append((logits.detach(), loss.detach()))
        expected_outputs, expected_losses = zip(*expected, strict=True)
        torch.testing.assert_close(outputs, torch.cat(expected_outputs), **close)
        torch.testing.assert_close(losses, torch.stack(expected_losses).repeat_interleave(8)[: len(losses)], **close)
    replayed = [recorded[0].runs for recorded in Recorded.owner.graphs.values()]
    assert replayed == [2, 2]
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        if not batch_norm or a.ndim > 1:
            torch.testing.assert_close(a, b, **close)
    states = [optimizer.state_dict()["state"] for optimizer in (ours, theirs)]
    assert {int(state["step"]) for state in states[0].values()} == {int(state["step"]) for state in states[1].values()}


def rows(name):
    with Path(f"runs/{name}/version_0/results.csv").open(newline="") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def last(name):
    return f"runs/{name}/version_0/checkpoints/last.ckpt"


@gpu
@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_blocks_and_single_steps_give_the_same_bits(cli, schedule):
    flags = (*TINY, *RICH, *EXACT, "--model.schedule", schedule)
    for k in (1, 7, 50):
        code, _, err = cli("fit", *flags, "--data.steps_per_execution", k, "--name", f"k{k}")
        assert code == 0, err
    assert same(weights(last("k1")), weights(last("k50")))
    assert same(weights(last("k7")), weights(last("k50")))


@gpu
def test_a_resumed_run_ends_with_the_same_bits(cli):
    assert cli("fit", *TINY, *EXACT, "--model.dropout", 0.2, "--name", "a")[0] == 0
    code, _, err = cli("fit", "--name", "a", "--ckpt_path", "last", "--trainer.max_epochs", 4)
    assert code == 0, err
    assert cli("fit", *TINY, *EXACT, "--model.dropout", 0.2, "--trainer.max_epochs", 4, "--name", "b")[0] == 0
    assert same(weights(last("a")), weights(last("b")))
    assert rows("a") == rows("b")


@gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_mixed_precision(cli, precision):
    code, _, err = cli("fit", *TINY, "--trainer.precision", precision)
    assert code == 0, err
    assert float(rows("lenet")[-1]["train_acc"]) > 0.5


@gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_a_compiled_step_is_the_same_within_tolerance(cli):
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        code, _, err = cli("fit", *TINY, "--model.compile", compiled, "--name", name, "--trainer.max_epochs", 1)
        assert code == 0, err
    for name in ("train_loss", "val_loss"):
        assert float(rows("plain")[0][name]) == pytest.approx(float(rows("compiled")[0][name]), abs=0.02)


@gpu
def test_one_epoch_is_that_of_the_cpu(cli):
    for name in ("cpu", "gpu"):
        code, _, err = cli("fit", *TINY, "--trainer.accelerator", name, "--trainer.max_epochs", 1, "--name", name)
        assert code == 0, err
    for ours, theirs in zip(weights(last("gpu")).values(), weights(last("cpu")).values(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0.01)
    results = []
    for accelerator in ("cpu", "gpu"):  # a checkpoint scores the same on both
        assert cli("test", "--ckpt_path", last("gpu"), "--trainer.accelerator", accelerator)[0] == 0
        results.append(Path("runs/gpu/version_0/test.json").read_text())
    assert results[0].split("test_loss")[0] == results[1].split("test_loss")[0]


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_step_of_a_block_waits_for_the_host(cli, monkeypatch):
    step = LitLeNet.training_step

    def checked(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if self.current_epoch == 2 else "default")  # blocks are recorded by then
        try:
            return step(self, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(LitLeNet, "training_step", checked)
    code, _, err = cli("fit", *TINY, *RICH)
    assert code == 0, err
