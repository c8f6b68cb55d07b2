"""What in a training must see each optimizer step by itself, so that no blocks can be used, see blocks.py."""

import inspect
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.profilers import PassThroughProfiler

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
# Options of the Trainer that count or change single steps, each with the value with which blocks may be used.
_NEUTRAL: dict[str, Any] = {
    "fast_dev_run": False,
    "overfit_batches": 0.0,
    "max_steps": -1,
    "min_steps": None,
    "limit_train_batches": 1.0,
    "val_check_interval": 1.0,
    "gradient_clip_val": None,
    "accumulate_grad_batches": 1,
}


def reason(trainer: Trainer) -> str | None:
    """Returns why a training must run in single steps, as the end of a sentence, or None if it need not."""
    for option, neutral in _NEUTRAL.items():
        value = getattr(trainer, option, None)  # val_check_interval is absent where a time was given
        is_one_batch = type(value) is int and type(neutral) is float and value == 1  # whereas 1.0 means all batches
        if value != neutral or is_one_batch:
            return f"trainer.{option} counts or changes single steps"
    if trainer.precision == "16-mixed":
        return "the loss scaler of 16-mixed precision looks at each step"
    epoch: Any = trainer.fit_loop.epoch_progress.current
    if epoch.processed != epoch.started:
        return "the checkpoint was written within an epoch"
    profiler = type(trainer.profiler)  # type: ignore[attr-defined]
    if profiler is not PassThroughProfiler:
        return f"{profiler.__name__} measures single steps"
    precision = type(trainer.precision_plugin)
    if not precision.__module__.startswith("lightning."):
        return f"{precision.__name__} may change a step"
    strategy = type(trainer.strategy).__name__
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        return f"{strategy} was not tried with blocks"
    if not trainer.optimizers:  # nothing else needs the loader before them
        return "configure_optimizers asks for the number of steps"
    if len(trainer.optimizers) != 1 or trainer.lr_scheduler_configs:
        return "Lightning steps several optimizers, or a scheduler"
    optimizer = type(trainer.optimizers[0])
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        return f"{optimizer.__name__} needs a closure"
    pieces: list[Any] = [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]
    if trainer.datamodule:  # type: ignore[attr-defined]
        pieces.append(trainer.datamodule)  # type: ignore[attr-defined]
    for piece in pieces:
        known = _known_class(piece)
        step_hooks = [name for name in dir(known) if name.startswith(_STEP_HOOKS)]
        for hook in step_hooks:
            own = getattr(piece, hook, None)  # LambdaCallback sets its hooks on the instance
            if getattr(own, "__func__", own) is not getattr(known, hook):
                return f"{type(piece).__name__} overrides {hook}, which may concern single steps"
    return None


def _known_class(piece: Any) -> type:
    """Returns the nearest class of a callback, module or datamodule whose hooks work with blocks.

    These are Lightning's empty base classes, classes with ``knows_blocks``, and some callbacks of Lightning.
    """
    ignores_steps = isinstance(piece, ProgressBar | Timer)  # they only draw, or look at the clock
    if isinstance(piece, ModelCheckpoint):  # its hook returns at once unless it counts steps or seconds
        ignores_steps = not piece._every_n_train_steps and piece._train_time_interval is None
    for kind in type(piece).__mro__:
        is_base = kind in (Callback, LightningModule, LightningDataModule)
        if is_base or "knows_blocks" in vars(kind):
            return kind
        if ignores_steps and kind.__module__.startswith(("lightning.", "lenet_pl.")):
            return kind
    return Callback
