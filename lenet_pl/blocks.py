"""Many exact optimizer steps in one Lightning step.

For a small net the work around an optimizer step (hooks, logging, progress bars, the host waiting for a device) takes
longer than the step. A *block* is a list of mini-batches that Lightning handles as one batch. :func:`run` takes an
optimizer step on each of them: the weights are those of automatic optimization, bit for bit. Keras calls the number of
steps ``steps_per_execution``.

To use it in another project:

1. A loader yields ``Block([batch, batch, …])`` where :func:`prepare` allows more than one step, and plain batches
   otherwise.
2. The LightningModule sets ``takes_blocks = True`` and its ``training_step`` hands a ``Block`` to :func:`run`.

This is the file that touches private names of Lightning. Lightning does not count the steps of a bare optimizer (its
issue 17281), and keeps one count for automatic and one for manual optimization (pull request 11848): both are kept
equal here. ``_batches_that_stepped`` is the step that loggers show (issue 11805).
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar, Timer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.adam import Adam, adam

from lenet_pl.graph import BlockGraph

# A callback that overrides one of these sees, or changes, how single steps are taken.
_CALLBACK_HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
# A module that overrides one of these expects Lightning to call it around each step. (``run`` itself calls
# ``on_before_optimizer_step``.)
_MODULE_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "on_after_backward",
    "on_before_backward",
    "on_before_batch_transfer",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_train_batch_start",
    "optimizer_step",
    "optimizer_zero_grad",
    "transfer_batch_to_device",
)
# These override such a hook only to draw, to look at a clock, or not for training steps.
_HARMLESS = (ProgressBar, Timer, ModelSummary)


class Block(list[Any]):
    """A list of mini-batches for as many optimizer steps; Lightning moves them to the device like any list."""


def prepare(trainer: Trainer | None, wanted: int) -> int:
    """Decides how many optimizer steps one Lightning step runs, and prepares trainer and module for it.

    A datamodule calls this when it makes a loader. The answer is 1, and a line says why, where something in the
    training looks at single batches or steps.

    Args:
        trainer: The trainer that will run the loader; None for a loop by hand, which gets plain batches.
        wanted: Optimizer steps that are asked for, at least 1.

    Returns:
        ``wanted`` or 1.
    """
    if trainer is None or not getattr(trainer.lightning_module, "takes_blocks", False):
        return 1
    reason = _objection(trainer) if wanted > 1 else None
    if reason and not trainer.sanity_checking:
        rank_zero_only(print)(f"steps_per_execution: 1 instead of {wanted}, because {reason}")
    steps = 1 if reason else wanted
    trainer.lightning_module.automatic_optimization = steps == 1
    automatic, manual = _counts(trainer)
    done = max(automatic.completed, manual.completed)  # a resumed run may have been counted by the other one
    for count in (automatic, manual):
        count.ready = count.completed = done
    epoch_loop = trainer.fit_loop.epoch_loop
    if not epoch_loop.batch_progress.current.ready:  # a resumed run starts with a whole epoch
        epoch_loop.restarting = False
    return steps


def _objection(trainer: Trainer) -> str | None:
    """Returns what needs to see each step by itself, as the end of a sentence, or None."""
    module: Any = trainer.lightning_module
    options = {
        "max_steps": trainer.max_steps != -1,
        "min_steps": trainer.min_steps is not None,
        "limit_train_batches": trainer.limit_train_batches != 1.0,
        "val_check_interval": trainer.val_check_interval != 1.0,
        "overfit_batches": trainer.overfit_batches != 0,  # type: ignore[attr-defined]
        "fast_dev_run": bool(trainer.fast_dev_run),  # type: ignore[attr-defined]
        "gradient_clip_val": trainer.gradient_clip_val is not None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
    }
    for option, is_set in options.items():
        if is_set:
            return f"trainer.{option} counts or changes single steps"
    if trainer.precision == "16-mixed":
        return "the loss scaler of 16-mixed precision looks at each step"
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        return f"{strategy} was not tried with blocks"
    if len(trainer.optimizers) != 1 or trainer.lr_scheduler_configs:
        return "Lightning steps several optimizers, or a scheduler"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hook := _looks_at_steps(callback):
            return f"{type(callback).__name__} looks at single steps ({hook})"
    for hook in _MODULE_HOOKS:
        if getattr(type(module), hook) is not getattr(LightningModule, hook):
            return f"{type(module).__name__} overrides {hook}"
    return None


def _looks_at_steps(callback: Callback) -> str | None:
    """Returns the first hook by which a callback sees single steps, or None."""
    if isinstance(callback, _HARMLESS) or getattr(callback, "takes_blocks", False):
        return None
    if isinstance(callback, ModelCheckpoint):  # its hook returns at once unless it counts steps or seconds
        timed = callback._train_time_interval is not None
        return "on_train_batch_end" if callback._every_n_train_steps or timed else None
    for hook in _CALLBACK_HOOKS:
        own = getattr(callback, hook)  # LambdaCallback sets its hooks on the instance
        if getattr(own, "__func__", own) is not getattr(Callback, hook):
            return hook
    return None


def _counts(trainer: Trainer) -> tuple[Any, Any]:
    """Returns Lightning's two counts of optimizer steps: of automatic and of manual optimization."""
    loop = trainer.fit_loop.epoch_loop
    return loop.automatic_optimization.optim_progress.optimizer.step.total, (
        loop.manual_optimization.optim_step_progress.total
    )


def total_steps(trainer: Trainer) -> float:
    """Returns the optimizer steps of the whole training, or infinity where nothing but time ends it."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.estimated_stepping_batches
    if trainer.max_epochs in (None, -1):
        return float("inf")
    loader: Any = trainer.train_dataloader
    return trainer.max_epochs * int(loader.steps)  # Lightning would count blocks


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
    trainer: Any = module.trainer
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    groups = optimizer.param_groups
    # Adam makes its state in the first steps; several processes sum their gradients in Lightning's backward.
    quick = isinstance(optimizer, Adam) and optimizer.state and trainer.world_size == 1
    quick = quick and len(groups) == 1 and not groups[0].get("amsgrad")
    trainer.fit_loop.epoch_loop._batches_that_stepped += len(block) - 1  # Lightning adds 1 for the block
    if quick and module.device.type == "cuda":
        return _replay(module, optimizer, block, forward, compiled)
    all_outputs, losses = [], []
    for batch in block:
        outputs, loss = forward(batch)
        if not quick:
            optimizer.zero_grad()
            module.manual_backward(loss)
        module.on_before_optimizer_step(optimizer)
        if quick:
            adam_step(optimizer, loss)
        else:
            optimizer.step()
        _count_step(trainer)
        torch.clear_autocast_cache()  # it holds bfloat16 copies of the weights as they were before the step
        all_outputs.append(outputs.detach())
        losses.append(loss.detach())
    return torch.cat(all_outputs), torch.stack(losses)


def _replay(
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
    outputs, losses = optimizer.graph(block, rates)
    return outputs, losses


def _count_step(trainer: Trainer) -> None:
    for count in _counts(trainer):
        count.increment_by(1)


@torch.no_grad()
def adam_step(optimizer: Adam, loss: Tensor) -> None:
    """Does what ``zero_grad``, ``backward`` and ``step`` do from the second step on, to the bit.

    It calls the function that ``Adam.step`` calls. What is saved is the search for parameters, states and gradients
    around it: a seventh of an epoch of ``lenet.yaml`` on a CPU.

    Args:
        optimizer: Has one parameter group, without ``amsgrad``, and has taken a step before.
        loss: A scalar with a graph.
    """
    group = optimizer.param_groups[0]
    states = [optimizer.state[parameter] for parameter in group["params"]]
    gradients = []
    for parameter, gradient in zip(group["params"], torch.autograd.grad(loss, group["params"]), strict=True):
        if gradient.stride() != parameter.stride():  # fused Adam reads both as they lie in memory
            gradient = torch.empty_like(parameter).copy_(gradient)
        gradients.append(gradient)
    beta1, beta2 = group["betas"]
    options = ("foreach", "fused", "decoupled_weight_decay", "amsgrad", "lr", "weight_decay", "eps", "maximize")
    adam(
        group["params"],
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        beta1=beta1,
        beta2=beta2,
        **{name: group[name] for name in options},
    )


def start_at_epoch_end(checkpoint: dict[str, Any]) -> None:
    """Rewrites Lightning's loop state in a checkpoint of a finished epoch, so that the next epoch starts afresh.

    Lightning would compare the batches that it has seen with those of an epoch, and a batch may now hold another
    number of steps (Lightning issue 19367). The number of epochs is all that is needed. A checkpoint from within an
    epoch, such as a user's ``ModelCheckpoint(every_n_train_steps=…)`` writes, keeps Lightning's own meaning.

    Args:
        checkpoint: What ``Trainer.save_checkpoint`` wrote.
    """
    loop = checkpoint["loops"]["fit_loop"]
    if within_epoch(checkpoint):
        return
    for count in loop["epoch_progress"].values():
        count.update(dict.fromkeys(count, count["processed"]))
    for name, count in loop["epoch_loop.batch_progress"].items():
        if name != "total" and isinstance(count, dict):
            count.update(dict.fromkeys(count, 0))


def within_epoch(checkpoint: dict[str, Any]) -> bool:
    """Says whether a checkpoint was written between two steps of an epoch, and not at its end."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return bool(progress["current"]["ready"]) and not progress["is_last_batch"]
