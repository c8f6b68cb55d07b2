"""Which epochs of a training are saved: the callbacks that write best.ckpt and last.ckpt."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lenet_pl import runs

# How our own checkpoints are written: after each epoch, over the previous file.
EACH_EPOCH: dict[str, Any] = {"save_on_train_epoch_end": True, "enable_version_counter": False}


def is_unfinished(trainer: Trainer) -> bool:
    """Says whether a callback, such as a Timer, has ended the training within this epoch or before its first step.

    Such an epoch does not count: a resumed run trains it again. ``max_steps`` may end a training within an epoch, too;
    its last weights were asked for.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress
    is_asked_for = 0 < trainer.max_steps <= trainer.global_step
    return trainer.should_stop and not is_asked_for and (batches.current.ready == 0 or not batches.is_last_batch)


class BestCheckpoint(ModelCheckpoint):
    """Writes best.ckpt: the epoch with the highest ``val_acc``, of equal ones the earliest; none without validation."""

    def __init__(self) -> None:
        super().__init__(filename=Path(runs.BEST).stem, monitor="val_acc", mode="max", **EACH_EPOCH)
        self.validated_step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Notes which weights have the score."""
        self.validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves if that was the best epoch, and if its last weights are those that were validated."""
        if self.validated_step == trainer.global_step and not is_unfinished(trainer):
            super().on_train_epoch_end(trainer, pl_module)


class LastCheckpoint(ModelCheckpoint):
    """Writes last.ckpt after each epoch. Lightning's ``save_last`` writes only when it saves another checkpoint."""

    def __init__(self) -> None:
        super().__init__(filename=Path(runs.LAST).stem, **EACH_EPOCH)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves, unless the epoch is unfinished: no run could resume from there."""
        if not is_unfinished(trainer):
            super().on_train_epoch_end(trainer, pl_module)
