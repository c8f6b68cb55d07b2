"""Many optimizer steps in one Lightning step, with the same result to the bit.

For a small net the work around an optimizer step (hooks, logging, progress bars, the host waiting for a device) takes
longer than the step. A *block* holds several mini-batches, which Lightning handles as one batch. :func:`run` takes an
optimizer step on each of them: the weights are those of automatic optimization, bit for bit. Keras calls the number of
steps ``steps_per_execution``.

To use it in another project:

1. A datamodule has ``knows_blocks = True`` in its class. In a training its loader yields
   ``Block([images, labels], size)`` where :func:`prepare` allows more than one step, and plain batches otherwise.
2. The LightningModule has ``knows_blocks = True`` in its class. It calls :func:`begin` before a training, and
   :func:`count_batches` when it saves a checkpoint. A callback calls :func:`end` after the training or an error. The
   ``training_step`` hands a ``Block`` to :func:`run` and returns None. The module sets its learning rate in
   ``on_before_optimizer_step``.
3. A callback, too, may say ``knows_blocks = True``, if what it does at each Lightning step is right for blocks.

``trainer.global_step`` counts optimizer steps. What Lightning calls a batch is a block: ``batch_idx``,
``num_training_batches`` and ``estimated_stepping_batches`` count blocks. :func:`total_steps` counts steps.

This file uses private names of Lightning, mostly because of three gaps (the numbers are those of its GitHub issues and
pull requests). Four others are in single_steps.py, cli.py (signals) and console.py (progress bar).

- Lightning does not count the steps of an optimizer that it has not wrapped (17281), so this file counts them.
- It counts automatic and manual optimization apart (11848), so :func:`prepare` makes both use one count.
- ``_batches_that_stepped`` is the step that loggers show (11805). A block adds all its steps to it.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lenet_pl import adam, single_steps
from lenet_pl.errors import Failure
from lenet_pl.graph import BlockGraph


@dataclass
class Block:
    """Several mini-batches in one piece, one for each optimizer step. Lightning moves it to the device."""

    fields: list[Tensor]  # of the same N samples, each [N, …], such as images and labels
    batch_size: int  # the last mini-batch may be smaller

    def __len__(self) -> int:
        """Returns the number of mini-batches."""
        return ceil(len(self.fields[0]) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(field.split(self.batch_size) for field in self.fields), strict=True)


def prepare(trainer: Trainer | None, wanted: int) -> int:
    """Decides how many optimizer steps one Lightning step runs, and prepares trainer and module for it.

    A datamodule calls this when it makes a loader. It returns ``wanted``, or 1 if something must see single steps, and
    prints what that is. Unless a trainer is training, it returns 1.
    """
    if trainer is None or not trainer.training:  # the loader is for a loop by hand, or for a callback
        return 1
    if not getattr(trainer.lightning_module, "knows_blocks", False):
        return 1
    reason = single_steps.reason(trainer) if wanted > 1 else None
    if reason:
        rank_zero_only(print)(f"steps_per_execution: 1 instead of {wanted}, because {reason}")
    steps = 1 if reason else wanted
    _switch(trainer.lightning_module, on=steps > 1)
    # A module that knows blocks logs once an epoch, however few batches that has.
    warnings.filterwarnings("ignore", ".*smaller than the logging interval")
    loop = trainer.fit_loop.epoch_loop
    loop.manual_optimization.optim_step_progress.total = loop.automatic_optimization.optim_progress.optimizer.step.total
    _start_a_new_epoch(trainer)
    return steps


def _start_a_new_epoch(trainer: Trainer) -> None:
    """Lets a run that resumes after a finished epoch start the next one.

    Where ``max_steps`` ends the training, Lightning would first go through the finished epoch again, without a batch.
    """
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    if epoch.processed == epoch.started:
        loop._restarting = loop.epoch_loop.restarting = False


def begin(module: LightningModule) -> None:
    """Prepares a module for a training. Its loader decides about blocks only later, in :func:`prepare`."""
    end(module)  # an earlier training may have failed
    module.trainer.optimizers = []  # otherwise single_steps would judge those of the trainer's earlier training


def end(module: LightningModule) -> None:
    """Brings a module back to single steps. A Trainer checks how it optimizes before the next training."""
    _switch(module, on=False)


def count_batches(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Lets a checkpoint count the mini-batches of its epoch: Lightning has counted blocks.

    A ModelCheckpoint of Lightning's may save during a validation, before the epoch has ended. Such a checkpoint is
    resumed in single steps, and Lightning skips as many batches of its epoch as are counted.
    """
    loader: Any = module.trainer.train_dataloader
    if getattr(loader, "steps_per_block", 1) > 1:
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        for name, number in counts.items():
            counts[name] = min(number * loader.steps_per_block, loader.steps)


def _switch(module: LightningModule, on: bool) -> None:
    """Switches blocks on or off. A module that optimizes by hand without blocks is left alone."""
    if getattr(module, "runs_blocks", False) != on:
        module.automatic_optimization = not on
        module.runs_blocks = on  # type: ignore[assignment]


def total_steps(trainer: Trainer) -> float:
    """Returns the optimizer steps of the whole training, or infinity where nothing but time ends it."""
    most = float("inf") if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs == -1 or trainer.num_training_batches == float("inf"):
        return most
    steps = ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if getattr(trainer.lightning_module, "runs_blocks", False):
        loader: Any = trainer.train_dataloader
        steps = loader.steps  # Lightning counts blocks
    # The epochs before a resume may have had more or fewer steps, because the size of a batch may change.
    return min(most, trainer.global_step + steps * ((trainer.max_epochs or 1) - trainer.current_epoch))


def run(
    module: LightningModule,
    block: Block,
    forward: Callable[[Any], tuple[Tensor, Tensor]],
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Takes an optimizer step on each mini-batch of a block.

    Args:
        module: The module, in its ``training_step``; it has one optimizer, of any kind; Adam takes a faster way.
        block: The mini-batches, on the module's device.
        forward: Returns the outputs ``[B, …]`` and the mean loss of a mini-batch of B samples.
        compiled: Whether a GPU may run fused kernels, see :class:`BlockGraph`.

    Returns:
        The outputs of all N samples, ``[N, …]``, and for each the mean loss of its mini-batch, ``[N]``; both without
        gradients.

    Raises:
        Failure: If a callback has changed what a step does, after the training began in blocks.
    """
    trainer = module.trainer
    changed = trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val or trainer.lr_scheduler_configs
    if changed:  # by a callback, after ``prepare`` has looked
        raise Failure(
            "a callback has set accumulate_grad_batches, gradient_clip_val or a scheduler, which blocks would ignore\n"
            "Set it before the training begins, or let each step run by itself: --data.steps_per_execution 1"
        )
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    trainer.fit_loop.epoch_loop._batches_that_stepped += len(block) - 1  # Lightning adds 1 for the block
    is_alone = trainer.world_size == 1  # otherwise Lightning sums the gradients of all processes
    # Anomaly detection watches ``loss.backward``, and cannot be recorded in a graph.
    direct = is_alone and adam.is_ready(optimizer) and not torch.is_anomaly_enabled()
    if direct and module.device.type == "cuda" and optimizer.param_groups[0]["fused"]:
        return _run_as_graph(module, optimizer, block, forward, compiled)
    all_outputs, losses = [], []
    for number, batch in enumerate(block, 1):
        outputs, loss = forward(batch)
        module.on_before_optimizer_step(optimizer)  # it only sets the learning rate
        if direct and number < len(block):  # the last one leaves its gradients for callbacks that look at them
            adam.step(optimizer, loss)
        else:
            optimizer.zero_grad()
            module.manual_backward(loss)
            optimizer.step()
        _count_step(trainer)
        torch.clear_autocast_cache()  # it holds bfloat16 copies of the weights as they were before the step
        all_outputs.append(outputs.detach())
        losses.append(loss.detach().expand(len(outputs)))
    return torch.cat(all_outputs), torch.cat(losses)


def _run_as_graph(
    module: LightningModule, optimizer: Any, block: Block, forward: Callable[[Any], Any], compiled: bool
) -> tuple[Tensor, Tensor]:
    """Takes the steps of a block as one CUDA graph, to which the learning rates are an input."""
    rates = []
    for _ in range(len(block)):
        module.on_before_optimizer_step(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        _count_step(module.trainer)
    if not hasattr(optimizer, "graph"):
        optimizer.graph = BlockGraph(optimizer, forward, compiled)
    outputs, losses = optimizer.graph(block.fields, block.batch_size, rates)
    return outputs, losses


def _count_step(trainer: Trainer) -> None:
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.increment_by(1)
