"""The batches of an epoch: order, augmentation, normalisation."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from lenet_pl.blocks import Block
from lenet_pl.seeds import generator

Batch = tuple[Tensor, Tensor]  # images [B, 1, 28, 28] float32, labels [B] int64

# Scoring needs no small batches. The size is fixed, so that the sums of a score are the same to the last digit.
EVAL_BATCH_SIZE = 1000


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Scales uint8 pixels to 0..1 and standardises them to float32, bit-equal to torchvision's ToTensor and Normalize.

    ``images`` have any shape; ``mean`` and ``std`` are those of pixels in 0..1.
    """
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def shift(images: Tensor, offsets: Tensor, max_shift: int) -> Tensor:
    """Moves each image by its own offset, and fills the uncovered border with black.

    Args:
        images: uint8, ``[N, 1, 28, 28]``, like the result.
        offsets: Rows down and columns right, ``[N, 2]``, int64, from -``max_shift`` to ``max_shift``.
        max_shift: The largest offset in pixels.
    """
    padded = F.pad(images[:, 0], (max_shift,) * 4)  # [N, 28 + 2 max_shift, 28 + 2 max_shift]
    windows = padded.unfold(1, 28, 1).unfold(2, 28, 1)  # [N, 1 + 2 max_shift, 1 + 2 max_shift, 28, 28]
    row, column = (max_shift - offsets).unbind(1)
    return windows[torch.arange(len(images), device=images.device), row, column].unsqueeze(1)


@dataclass(eq=False)
class TrainLoader:
    """Shuffled, augmented mini-batches. An epoch depends only on the seed and the number of the epoch.

    Order and augmentation belong to an image's place in the epoch. So they depend neither on the size of a block nor on
    the number of processes: the mini-batches of all ranks together are those of one process with the same global batch.
    All processes get shares of the same size. Where the images cannot be divided evenly, the last shares are filled up
    with the first images of the epoch.
    """

    images: Tensor  # uint8, [N, 1, 28, 28], on the CPU or on the device that trains
    labels: Tensor  # int64, [N], on the same device
    batch_size: int  # images per mini-batch and process
    mean: float  # for normalise, like std
    std: float
    seed: int = 0  # of the training
    flip: bool = False  # mirrors an image with probability one half
    max_shift: int = 0  # in pixels; each image and axis draws its own shift
    steps_per_block: int = 1  # with 1 the loader yields the mini-batches themselves
    shuffle: bool = True  # draws a new order for each epoch
    rank: int = 0  # the number of this process
    world: int = 1  # the number of processes
    epoch: int = 0
    batch_sampler = None  # Lightning asks for it where it finds a ``sampler``

    def __post_init__(self) -> None:
        self.dataset = TensorDataset(self.images, self.labels)  # callbacks ask a loader for it
        self.yields_blocks = False
        if self.shuffle:
            self.sampler = self  # before each epoch Lightning calls ``loader.sampler.set_epoch``, which is ours

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counted from 0, for the next iteration.

        Only the iteration after this call yields blocks. So a callback that goes through the loader of a training gets
        mini-batches, as from any other loader.
        """
        self.epoch = epoch
        self.yields_blocks = self.steps_per_block > 1

    @property
    def share(self) -> int:
        """The number of images of an epoch in each process."""
        return ceil(len(self.labels) / self.world)

    @property
    def steps(self) -> int:
        """The number of mini-batches of an epoch in each process. The last may be smaller."""
        return ceil(self.share / self.batch_size)

    def __len__(self) -> int:
        """Returns the number of blocks of an epoch in each process."""
        return ceil(self.steps / self.steps_per_block)

    def __iter__(self) -> Iterator[Batch | Block]:
        # This is a generator function, because Lightning makes the iterator before it calls ``set_epoch``.
        order, flips, offsets = self.draw()
        yields_blocks = self.yields_blocks
        self.yields_blocks = False
        size = self.batch_size * (self.steps_per_block if yields_blocks else 1)
        for start in range(0, len(order), size):
            part = slice(start, start + size)
            images, labels = self.images[order[part]], self.labels[order[part]]
            if self.flip:
                images = torch.where(flips[part, None, None, None], images.flip(-1), images)
            if self.max_shift:
                images = shift(images, offsets[part], self.max_shift)
            images = normalise(images, self.mean, self.std)
            yield Block([images, labels], self.batch_size) if yields_blocks else (images, labels)

    def draw(self) -> tuple[Tensor, ...]:
        """Draws the epoch for all processes, and returns this one's indices, flips and offsets on the device."""
        rng = generator(self.seed, self.epoch)
        n = len(self.labels)
        order = torch.randperm(n, generator=rng) if self.shuffle else torch.arange(n)
        flips = torch.rand(n, generator=rng) < 0.5
        offsets = torch.randint(-self.max_shift, self.max_shift + 1, (n, 2), generator=rng)
        places = torch.arange(self.rank, self.share * self.world, self.world) % n
        return tuple(drawn[places].to(self.images.device) for drawn in (order, flips, offsets))


class EvalLoader:
    """Normalised batches of about ``EVAL_BATCH_SIZE`` images in order. All processes together get every image once.

    The arguments are those of :class:`TrainLoader`.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: float, std: float, rank: int = 0, world: int = 1) -> None:
        self.images, self.labels = images[rank::world], labels[rank::world]
        self.mean, self.std = mean, std
        self.dataset = TensorDataset(self.images, self.labels)
        # Every process takes equally many batches, because synchronised batch normalisation waits for all of them. A
        # share may be empty.
        self.batches = ceil(max(len(labels) // world, 1) / EVAL_BATCH_SIZE)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        parts = zip(self.images.tensor_split(self.batches), self.labels.tensor_split(self.batches), strict=True)
        for images, labels in parts:
            yield normalise(images, self.mean, self.std), labels
