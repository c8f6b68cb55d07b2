"""Fashion-MNIST for Lightning: the files, the split into training and validation images, the loaders."""

import warnings
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lenet_pl import blocks, download
from lenet_pl.errors import require
from lenet_pl.loader import EVAL_BATCH_SIZE, Batch, EvalLoader, TrainLoader, normalise
from lenet_pl.pictures import files, prepare
from lenet_pl.seeds import generator, training_seed


class FashionMNIST(torchvision.datasets.FashionMNIST):  # type: ignore[misc]
    """torchvision's reader, which would otherwise prefer an unverified ``processed/`` folder to the verified files."""

    def _check_legacy_exist(self) -> bool:
        return False


class FashionMNISTDataModule(LightningDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28×28 grey pixels, ten classes.

    The images stay in the memory of the training device, as bytes. A whole block of mini-batches is indexed, augmented
    and normalised at once.

    Args:
        data_dir: Folder with ``FashionMNIST/raw``; the four files are downloaded to it where they are missing.
        batch_size: Images per optimizer step and process, at least 1.
        val_size: Training images held out for validation, 0 to 59,999. With 0 all images train, and none validate.
        split_seed: Seed of the training/validation split, separate from the training seed.
        steps_per_execution: Optimizer steps in one Lightning training step, at least 1. The weights are the same to
            the bit, and only the time between the steps shrinks. It becomes 1 by itself if something has to see single
            steps.
        mean: Mean that is subtracted from the pixels after scaling to 0..1 (the training images have 0.2860).
        std: Standard deviation by which the pixels are divided after that (the training images have 0.3530).
        flip: Whether to mirror each training image left-right with probability one half.
        shift: Largest random shift of a training image in pixels, 0 to 27. Each image and axis draws its own.
        images: For ``predict``: pictures, folders or patterns such as ``*.png``; the test images by default.

    Raises:
        UsageError: If an argument is out of its range.
    """

    knows_blocks = True  # see blocks.py
    train_set: Batch  # uint8 images and labels, like the next two; setup makes them
    val_set: Batch
    test_set: Batch

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 32,
        val_size: int = 5000,
        split_seed: int = 0,
        steps_per_execution: int = 50,
        mean: float = 0.2860,
        std: float = 0.3530,
        flip: bool = False,
        shift: int = 0,
        images: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images"])
        for name, is_fine, expected in (
            ("batch_size", 1 <= batch_size <= 60_000, "an integer from 1 to 60000"),
            ("val_size", 0 <= val_size <= 59_999, "an integer from 0 to 59999"),
            ("split_seed", 0 <= split_seed < 2**63, f"an integer from 0 to {2**63 - 1}"),
            ("steps_per_execution", 1 <= steps_per_execution <= 60_000, "an integer from 1 to 60000"),
            ("mean", isfinite(mean), "a finite number, such as 0.286"),
            ("std", isfinite(std) and std > 0, "a finite number above 0, such as 0.353"),
            ("shift", 0 <= shift <= 27, "an integer from 0 to 27"),
        ):
            require(is_fine, f"data.{name}={self.hparams[name]}", expected)
        # Attributes, because callbacks such as BatchSizeFinder set them.
        self.data_dir = data_dir
        self.batch_size, self.steps_per_execution = batch_size, steps_per_execution
        self.val_size, self.split_seed = val_size, split_seed
        self.mean, self.std = mean, std
        self.flip, self.shift = flip, shift
        self.files = files.find(images) if images else []  # the pictures to predict
        self.errors: dict[Path, str] = {}  # the pictures that could not be read, and why
        self.seed = 0  # the training seed; setup sets it

    def prepare_data(self) -> None:
        """Puts the verified files in place, and raises ``download.DataError`` if that fails."""
        only_pictures = self.files and self.trainer and self.trainer.predicting
        if not only_pictures:
            download.ensure(self.data_dir)

    def setup(self, stage: str) -> None:
        """Reads the images that the stage needs, and takes the seed of a training."""
        if stage in ("fit", "validate") and not hasattr(self, "train_set"):
            images, labels = self._read(train=True)
            order = torch.randperm(len(labels), generator=generator(self.split_seed))
            train, val = order[self.val_size :], order[: self.val_size]
            self.train_set, self.val_set = (images[train], labels[train]), (images[val], labels[val])
        wants_test_images = stage == "test" or (stage == "predict" and not self.files)
        if wants_test_images and not hasattr(self, "test_set"):
            self.test_set = self._read(train=False)
        if stage == "fit":
            self.seed = training_seed(self.trainer)

    def _read(self, train: bool) -> Batch:
        data = FashionMNIST(self.data_dir, train=train)
        return data.data.unsqueeze(1), data.targets

    def train_dataloader(self) -> TrainLoader:
        """Returns shuffled, augmented mini-batches, in blocks if module and trainer allow them.

        A loop without a Trainer calls ``set_epoch`` of the loader before each epoch; otherwise all have the same order.
        """
        return TrainLoader(
            **self._shared_arguments(self.train_set),
            batch_size=self.batch_size,
            seed=self.seed,
            flip=self.flip,
            max_shift=self.shift,
            steps_per_block=blocks.prepare(self.trainer, self.steps_per_execution),
            shuffle=not (self.trainer and self.trainer.overfit_batches),  # type: ignore[attr-defined]
        )

    def val_dataloader(self) -> EvalLoader | list[Any]:
        """Returns the validation batches, or nothing where no images are held out for them."""
        val_set = getattr(self, "val_set", None)  # a derived class may make its own, or none
        if val_set is None or not len(val_set[1]):
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # that is meant
            return []
        return EvalLoader(**self._shared_arguments(val_set))

    def test_dataloader(self) -> EvalLoader:
        """Returns the test batches. All processes together see every image once."""
        return EvalLoader(**self._shared_arguments(self.test_set))

    def predict_dataloader(self) -> EvalLoader | DataLoader[Path]:
        """Returns batches of the user's pictures, with black for an unreadable one, or by default the test batches."""
        if not self.files:
            return self.test_dataloader()
        return DataLoader(self.files, batch_size=EVAL_BATCH_SIZE, collate_fn=self._load_pictures)  # type: ignore[arg-type]

    def _shared_arguments(self, images_and_labels: Batch) -> dict[str, Any]:
        """Returns what both loaders take. On the trainer's device the images need at most 47 MB."""
        images, labels = images_and_labels
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else "cpu"
        return {
            "images": images.to(device),
            "labels": labels.to(device),
            "mean": self.mean,
            "std": self.std,
            "rank": trainer.global_rank if trainer else 0,
            "world": trainer.world_size if trainer else 1,
        }

    def _load_pictures(self, paths: list[Path]) -> Batch:
        images = torch.zeros(len(paths), 1, 28, 28, dtype=torch.uint8)
        for image, path in zip(images, paths, strict=True):
            try:
                image.copy_(prepare.to_uint8(files.load(path)))
            except (OSError, ValueError) as error:
                self.errors[path] = str(error)
        return normalise(images, self.mean, self.std), torch.zeros(len(paths), dtype=torch.int64)
