"""The batches of an epoch: its order, and normalised and augmented blocks of mini-batches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from lenet_pl.datamodule import FashionMNISTDataModule

Batch = tuple[Tensor, Tensor]  # images [N, 1, 28, 28] float32, labels [N] int64

# Validation, test and prediction need no small batches; a fixed size makes their sums repeatable to the digit.
EVAL_BATCH_SIZE = 1000


def generator(*key: int) -> torch.Generator:
    """Returns a CPU generator whose stream follows from ``key`` alone, such as (seed, epoch)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Scales uint8 pixels to 0..1 and standardises them, bit-equal to torchvision's ToTensor and Normalize."""
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def shift(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    """Moves each image by its own offset and fills the uncovered border with black.

    Args:
        images: uint8 images, ``[N, 1, 28, 28]``.
        offsets: Rows down and columns right, ``[N, 2]``, int64.
        most: No offset is larger, in either direction.
    """
    padded = F.pad(images[:, 0], (most,) * 4)  # [N, 28 + 2 most, 28 + 2 most]
    windows = padded.unfold(1, images.shape[2], 1).unfold(2, images.shape[3], 1)  # [N, 1 + 2 most, 1 + 2 most, 28, 28]
    row, column = (most - offsets).unbind(1)
    return windows[torch.arange(len(images), device=images.device), row, column].unsqueeze(1)


class Loader:
    """Iterates over one epoch of in-memory images.

    Yields ``(images, labels)`` mini-batches, or lists of up to ``block`` of them when ``block`` is more than one.
    The order and the augmentation belong to an image's place in the epoch, so they depend on neither ``block`` nor
    the number of processes: the mini-batches of all ranks together are those of one process with the same global batch.
    """

    def __init__(self, data: "FashionMNISTDataModule", images: Tensor, labels: Tensor, train: bool = False) -> None:
        trainer = data.trainer
        self.rank, self.world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        # 47 MB fit on nearly every device; where they do not, each block travels by itself
        fits = device.type != "cuda" or 4 * images.numel() < torch.cuda.mem_get_info(device)[0]
        self.images, self.labels = (t.to(device) if fits else t for t in (images, labels))
        self.data, self.train = data, train
        self.shuffle = train and not (trainer and trainer.overfit_batches)  # type: ignore[attr-defined]
        self.batch_size = data.batch_size if train else EVAL_BATCH_SIZE
        self.block = data.block if train else 1
        self.epoch = 0
        if self.shuffle:
            self.sampler = self  # whose set_epoch Lightning calls before each epoch, by torch's convention

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch (0, 1, …) whose order and augmentation the next iteration uses."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Counts the blocks of an epoch on this rank."""
        return -(-self._share() // (self.batch_size * self.block))

    def _share(self) -> int:
        """Counts this rank's images: padded to equal shares in training, exact in evaluation."""
        spare = self.world - 1 if self.train else self.world - 1 - self.rank
        return (len(self.labels) + spare) // self.world

    def __iter__(self) -> Iterator[Batch | list[Batch]]:
        data, n = self.data, len(self.labels)
        draw = generator(data.seed, self.epoch)
        order = torch.randperm(n, generator=draw) if self.shuffle else torch.arange(n)
        flips = torch.rand(n, generator=draw) < 0.5
        offsets = torch.randint(-data.shift, data.shift + 1, (n, 2), generator=draw)
        place = torch.arange(self.rank, self._share() * self.world, self.world) % n
        order, flips, offsets = (t[place].to(self.images.device) for t in (order, flips, offsets))
        size = self.batch_size * self.block
        first, data.resume_at = data.resume_at if self.train else 0, 0
        for start in range(first * size, len(place), size):
            piece = slice(start, start + size)
            images, labels = self.images[order[piece]], self.labels[order[piece]]
            if self.train and data.flip:
                images = torch.where(flips[piece, None, None, None], images.flip(-1), images)
            if self.train and data.shift:
                images = shift(images, offsets[piece], data.shift)
            images = normalise(images, data.mean, data.std)
            batches = list(zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True))
            yield batches if self.block > 1 else batches[0]

    # Lightning takes a loader with these two for one that can resume in mid-epoch. Ours can, but keeps no state of
    # its own: the datamodule's state says where to go on.
    def state_dict(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads nothing."""
