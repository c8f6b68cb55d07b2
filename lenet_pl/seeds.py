"""The seeds of all that is random, and what a training does to torch's random numbers."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lenet_pl import blocks


def generator(*key: int) -> torch.Generator:
    """Returns a CPU generator whose random numbers depend only on ``key``, such as (seed, epoch)."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """Mixes numbers into one seed of 63 bits. Similar keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def training_seed(trainer: Trainer | None) -> int:
    """Returns the seed of a training: the one that ``seed_everything`` or ``torch.manual_seed`` set in process 0."""
    seed = torch.initial_seed() % 2**63
    return trainer.strategy.broadcast(seed) if trainer else seed


class LeaveAsBefore(Callback):
    """Leaves torch's random numbers on the CPU, and how the module optimizes, as they were before the training.

    A training seeds dropout anew in each epoch. Without this, the nets that are made after it would begin alike, and
    the next training would have another seed. It is a callback, because after an error or Ctrl-C Lightning calls no
    hook of a module. With several processes, Lightning itself goes back to the seed of ``seed_everything``.
    """

    state: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Takes the state of the random numbers."""
        if stage == "fit":
            self.state = torch.get_rng_state()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Gives it back, and ends blocks."""
        if self.state is not None:
            torch.set_rng_state(self.state)
            self.state = None
            blocks.end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Does the same after an error or Ctrl-C."""
        self.teardown(trainer, pl_module, "fit")
