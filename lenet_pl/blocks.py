"""Many optimizer steps in one Lightning step, with the same result to the bit.

For a small net the work around an optimizer step (hooks, logging, progress bars, the host waiting for a device) takes
longer than the step. A *block* holds several mini-batches, which Lightning handles as one batch. :func:`run` takes an
optimizer step on each of them: the weights are those of automatic optimization, bit for bit. Keras calls the number of
steps ``steps_per_execution``.

To use it in another project:

1. A datamodule has ``makes_blocks = True`` in its class. Its loader yields ``Block([images, labels], size)``
   where :func:`prepare` allows more than one step, and plain batches otherwise.
2. The LightningModule has ``takes_blocks = True`` in its class, and its ``training_step`` hands a ``Block`` to
   :func:`run` and returns None. It sets its learning rate in ``on_before_optimizer_step``.

Private names of Lightning stand in this file; two others are in cli.py (signals) and console.py (progress bar). Most
are needed here because of three gaps in Lightning, each with the number of its issue or pull request:

- Lightning does not count the steps of an optimizer that it has not wrapped (17281), so this file counts them.
- It counts automatic and manual optimization apart (11848), so :func:`prepare` copies one count into the other.
- ``_batches_that_stepped`` is the step that loggers show (11805). A block adds all its steps to it.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lenet_pl import adam
from lenet_pl.graph import BlockGraph

# Hooks whose names begin like this see each batch or step, or can change what a step does.
_STEP_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "forward",
    "lr_scheduler_step",
    "on_after",
    "on_before",
    "on_train_batch",
    "on_train_epoch_start",
    "optimizer_",
    "train_dataloader",
    "training_step",
    "transfer_batch",
)


@dataclass
class Block:
    """Mini-batches for as many optimizer steps, in one piece, which Lightning moves to the device."""

    fields: list[Tensor]  # of the same N samples, each [N, …], such as images and labels
    batch_size: int  # the last mini-batch may be smaller

    def __len__(self) -> int:
        """Returns the number of mini-batches."""
        return ceil(len(self.fields[0]) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(field.split(self.batch_size) for field in self.fields), strict=True)


def prepare(trainer: Trainer | None, wanted: int) -> int:
    """Decides how many optimizer steps one Lightning step runs, and prepares trainer and module for it.

    A datamodule calls this when it makes a loader. It returns ``wanted``, or 1 where something in the training looks at
    single steps; a line says what it is. Without a trainer, or outside of its run, there are only plain batches.
    """
    if trainer is None or trainer.state.status != "running":  # the loader is for a loop by hand, or another trainer
        return 1
    if not getattr(trainer.lightning_module, "takes_blocks", False):
        return 1
    reason = _objection(trainer) if wanted > 1 else None
    if reason:
        rank_zero_only(print)(f"steps_per_execution: 1 instead of {wanted}, because {reason}")
    steps = 1 if reason else wanted
    switch(trainer.lightning_module, on=steps > 1)
    loop = trainer.fit_loop
    automatic, manual = loop.epoch_loop.automatic_optimization, loop.epoch_loop.manual_optimization
    manual.optim_step_progress.total = automatic.optim_progress.optimizer.step.total
    epoch: Any = loop.epoch_progress.current
    if epoch.processed == epoch.started:
        # A run that resumes after a finished epoch starts the next one afresh. Lightning sees to that, except where
        # max_steps ends the training: there it would first go through the old epoch again, without a batch.
        loop._restarting = loop.epoch_loop.restarting = False
    return steps


def switch(module: LightningModule, on: bool) -> None:
    """Switches blocks on or off. A module that optimizes by hand without blocks is left alone."""
    if getattr(module, "runs_blocks", False) != on:
        module.automatic_optimization = not on
        module.runs_blocks = on  # type: ignore[assignment]


def _objection(trainer: Trainer) -> str | None:
    """Returns what needs to see each step by itself, as the end of a sentence, or None."""
    defaults = {
        "fast_dev_run": False,
        "overfit_batches": 0.0,
        "max_steps": -1,
        "min_steps": None,
        "limit_train_batches": 1.0,  # all batches, whereas the integer 1 is one batch
        "val_check_interval": 1.0,
        "gradient_clip_val": None,
        "accumulate_grad_batches": 1,
    }
    for option, default in defaults.items():
        value = getattr(trainer, option, None)  # val_check_interval is absent where a time was given
        if value != default or type(value) is not type(default):
            return f"trainer.{option} counts or changes single steps"
    if trainer.precision == "16-mixed":
        return "the loss scaler of 16-mixed precision looks at each step"
    epoch: Any = trainer.fit_loop.epoch_progress.current
    if epoch.processed != epoch.started:
        return "the checkpoint was written within an epoch"
    precision = type(trainer.precision_plugin)
    if not precision.__module__.startswith("lightning."):
        return f"{precision.__name__} may change a step"
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        return f"{strategy} was not tried with blocks"
    if len(trainer.optimizers) != 1 or trainer.lr_scheduler_configs:
        return "Lightning steps several optimizers, or a scheduler"
    optimizer = type(trainer.optimizers[0])
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        return f"{optimizer.__name__} needs a closure"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "takes_blocks", False):
            continue
        # The nearest class that is Lightning's or ours. What that class overrides is known to be harmless.
        known = next(kind for kind in type(callback).__mro__ if kind.__module__.startswith(("lightning.", "lenet_pl.")))
        if hook := _overridden_hook(callback, known if _ignores_steps(callback) else Callback):
            return f"{type(callback).__name__} looks at single steps ({hook})"
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    # The class that takes blocks knows what it does in its own hooks; a class derived from it need not.
    taker = next((kind for kind in type(module).__mro__ if "takes_blocks" in vars(kind)), LightningModule)
    maker = next((kind for kind in type(data).__mro__ if "makes_blocks" in vars(kind)), LightningDataModule)
    for owner, base in ((module, taker), (data, maker)):
        if owner and (hook := _overridden_hook(owner, base)):
            return f"{type(owner).__name__} overrides {hook}"
    return None


def _overridden_hook(owner: Any, base: type) -> str | None:
    """Returns the first step hook that a callback, a module or a datamodule overrides, or None."""
    hooks = [name for name in dir(base) if name.startswith(_STEP_HOOKS)]
    for hook in hooks:
        own = getattr(owner, hook)  # LambdaCallback sets its hooks on the instance
        if getattr(own, "__func__", own) is not getattr(base, hook):
            return hook
    return None


def _ignores_steps(callback: Callback) -> bool:
    """Says whether a callback of a library works with blocks, although it overrides a step hook."""
    if isinstance(callback, ModelCheckpoint):  # its hook returns at once unless it counts steps or seconds
        return not callback._every_n_train_steps and callback._train_time_interval is None
    # A progress bar only draws, and a timer only looks at the clock.
    return isinstance(callback, ProgressBar | Timer)


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
        module: The module, in its ``training_step``; its single optimizer is an ``Adam`` or any other.
        block: The mini-batches, on the module's device.
        forward: Returns the outputs ``[B, …]`` and the mean loss of a mini-batch of B samples.
        compiled: Whether a GPU may run fused kernels, see :class:`BlockGraph`.

    Returns:
        The outputs of all mini-batches, one below the other, and their losses, ``[K]``; both without gradients.
    """
    trainer = module.trainer
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    trainer.fit_loop.epoch_loop._batches_that_stepped += len(block) - 1  # Lightning adds 1 for the block
    # Several processes: Lightning sums their gradients. Anomaly detection: it cannot be recorded in a graph.
    direct = trainer.world_size == 1 and adam.is_ready(optimizer) and not torch.is_anomaly_enabled()
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
        losses.append(loss.detach())
    return torch.cat(all_outputs), torch.stack(losses)


def _run_as_graph(
    module: LightningModule, optimizer: Any, block: Block, forward: Callable[[Any], Any], compiled: bool
) -> tuple[Tensor, Tensor]:
    """Takes the steps of a block as one CUDA graph, to which the learning rates are an input."""
    rates = []
    for _ in block:
        module.on_before_optimizer_step(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        _count_step(module.trainer)
    if not hasattr(optimizer, "graph"):
        optimizer.graph = BlockGraph(optimizer, forward, compiled)
    outputs, losses = optimizer.graph(block.fields, block.batch_size, rates)
    return outputs, losses


def _count_step(trainer: Trainer) -> None:
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.increment_by(1)
