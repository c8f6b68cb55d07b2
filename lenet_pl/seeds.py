"""The seeds of all that is random."""

import numpy as np
import torch
from lightning.pytorch import Trainer


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
