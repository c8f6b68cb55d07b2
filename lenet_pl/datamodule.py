"""Fashion-MNIST in memory: the files, the training/validation split, and a run's place in its epoch."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lenet_pl import download
from lenet_pl.apps import pictures
from lenet_pl.checkpoint import CheckpointError
from lenet_pl.loader import EVAL_BATCH_SIZE, Batch, Loader, generator, normalise


class FashionMNIST(torchvision.datasets.FashionMNIST):  # type: ignore[misc]
    """torchvision's reader, which must not prefer an unverified ``processed/`` folder over the verified files."""

    def _check_legacy_exist(self) -> bool:
        return False


class FashionMNISTDataModule(LightningDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28×28 grey pixels, ten classes.

    The images stay uint8 in memory, on the device when they fit, and are indexed, augmented and normalised a block of
    mini-batches at a time.

    Args:
        data_dir: Folder that holds, or gets, ``FashionMNIST/raw`` with the four files.
        batch_size: Images per optimizer step and process, at least 1.
        val_size: Training images held out for validation, 0 to 59,999. 0 trains on all and validates on none.
        split_seed: Seed of the training/validation split, separate from the training seed.
        steps_per_execution: Optimizer steps that one Lightning training step runs, at least 1. The result is the same
            to the bit, only the time around the steps shrinks. 1 is Lightning's automatic optimization, which also
            takes over when a Trainer option counts batches or touches single steps (``limit_train_batches``,
            ``max_steps``, ``gradient_clip_val``, ``accumulate_grad_batches`` …).
        mean: Pixel mean subtracted after scaling to 0..1 (0.2860 is the training set's).
        std: Pixel standard deviation divided by (0.3530 is the training set's).
        flip: Whether to mirror each training image left-right with probability one half.
        shift: Largest random shift of a training image in pixels, 0 to 27, drawn per image and axis.
        images: For ``predict``: a picture or a folder of pictures; the test images by default.
        preprocess: Whether to turn those pictures into what the training data look like, see ``pictures``.

    Raises:
        ValueError: If an argument is out of its range.
    """

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
        images: str | None = None,
        preprocess: bool = True,
    ) -> None:
        super().__init__()
        for name, value, low, high in (
            ("batch_size", batch_size, 1, 60_000),
            ("val_size", val_size, 0, 59_999),
            ("split_seed", split_seed, 0, 2**63 - 1),
            ("steps_per_execution", steps_per_execution, 1, 60_000),
            ("shift", shift, 0, 27),
        ):
            if not low <= value <= high:
                raise ValueError(f"data.{name}={value}: expected an integer from {low} to {high}")
        if not abs(mean) < float("inf"):
            raise ValueError(f"data.mean={mean}: expected a finite number, such as 0.286")
        if not 0 < std < float("inf"):
            raise ValueError(f"data.std={std}: expected a finite number above 0, such as 0.353")
        self.save_hyperparameters(ignore=["images", "preprocess"])
        self.files = pictures.find(images) if images else []
        self.preprocess, self.errors = preprocess, dict[Path, str]()  # the pictures that could not be read, and why
        self.data_dir, self.batch_size, self.val_size, self.split_seed = data_dir, batch_size, val_size, split_seed
        self.mean, self.std, self.flip, self.shift = mean, std, flip, shift
        self.block = steps_per_execution
        self.seed = 0  # the training seed, known when training starts
        self.resume_at = 0  # blocks of the current epoch that a resumed run has behind it
        self.train_set: Batch | None = None  # uint8 images and labels, like the next two
        self.val_set: Batch | None = None
        self.test_set: Batch | None = None

    def prepare_data(self) -> None:
        """Puts the verified files in place; raises ``download.DataError`` where that fails."""
        if not (self.files and self.trainer and self.trainer.predicting):
            download.ensure(self.data_dir)

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: training and validation images, or the test images."""
        if stage in ("fit", "validate") and self.train_set is None:
            images, labels = self._read(train=True)
            if self.val_size >= len(labels):
                raise ValueError(f"data.val_size={self.val_size}: expected less than the {len(labels)} training images")
            order = torch.randperm(len(labels), generator=generator(self.split_seed))
            train, val = order[self.val_size :], order[: self.val_size]
            self.train_set, self.val_set = (images[train], labels[train]), (images[val], labels[val])
        if (stage == "test" or (stage == "predict" and not self.files)) and self.test_set is None:
            self.test_set = self._read(train=False)
        if stage == "fit":
            self.seed = torch.initial_seed() % 2**63
            self.block = self._block_size()
            if self.trainer and not self.val_size:
                self.trainer.limit_val_batches = 0  # or Lightning warns of an empty loader

    def _read(self, train: bool) -> Batch:
        data = FashionMNIST(self.data_dir, train=train)
        return data.data.unsqueeze(1), data.targets

    def _block_size(self) -> int:
        """Returns ``steps_per_execution``, or 1 where a Trainer option needs Lightning's own view of each step."""
        trainer = self.trainer
        single = (
            trainer is None  # a plain loop over train_dataloader() gets plain mini-batches
            or trainer.max_steps != -1
            or trainer.limit_train_batches != 1.0
            or trainer.val_check_interval != 1.0
            or trainer.overfit_batches  # type: ignore[attr-defined]
            or trainer.fast_dev_run  # type: ignore[attr-defined]
            or trainer.gradient_clip_val is not None
            or trainer.accumulate_grad_batches != 1
            or trainer.precision == "16-mixed"  # its loss scaler watches each step
            or type(trainer.strategy).__name__ not in ("SingleDeviceStrategy", "DDPStrategy")
        )
        return 1 if single else self.hparams["steps_per_execution"]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a training epoch, the last on fewer images where the division leaves a rest."""
        assert self.train_set is not None
        world = self.trainer.world_size if self.trainer else 1
        return -(-len(self.train_set[1]) // (self.batch_size * world))

    def train_dataloader(self) -> Loader:
        """Returns blocks of shuffled, augmented mini-batches."""
        assert self.train_set is not None
        return Loader(self, *self.train_set, train=True)

    def first_images(self, n: int) -> Batch:
        """Returns the first n uint8 training images of the first epoch's order, and their labels."""
        assert self.train_set is not None
        order = torch.randperm(len(self.train_set[1]), generator=generator(self.seed, 0))[:n]
        return self.train_set[0][order], self.train_set[1][order]

    def val_dataloader(self) -> Loader:
        """Returns the validation batches."""
        assert self.val_set is not None
        return Loader(self, *self.val_set)

    def test_dataloader(self) -> Loader:
        """Returns the test batches: every image once, over all processes together."""
        assert self.test_set is not None
        return Loader(self, *self.test_set)

    def predict_dataloader(self) -> Loader | DataLoader[Path]:
        """Returns the user's pictures in batches, black in place of one that cannot be read; or the test batches."""
        if not self.files:
            return self.test_dataloader()
        return DataLoader(self.files, batch_size=EVAL_BATCH_SIZE, collate_fn=self._load_pictures)  # type: ignore[arg-type]

    def _load_pictures(self, paths: list[Path]) -> Batch:
        images = torch.zeros(len(paths), 1, 28, 28, dtype=torch.uint8)
        for image, path in zip(images, paths, strict=True):
            try:
                image.copy_(pictures.to_uint8(pictures.load(path), self.preprocess))
            except (OSError, ValueError) as error:
                self.errors[path] = str(error)
        return normalise(images, self.mean, self.std), torch.zeros(len(paths), dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the current epoch is, in blocks, and what that count depends on."""
        trainer = self.trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress if trainer else None
        mid_epoch = progress is not None and not progress.is_last_batch
        return {"blocks_done": progress.current.ready if progress and mid_epoch else 0, "counted_in": self._units()}

    def _units(self) -> dict[str, int]:
        """Returns the settings that say which images come in which block of an epoch."""
        names = ("batch_size", "val_size", "split_seed")
        own = {f"data.{name}": getattr(self, name) for name in names}
        world = self.trainer.world_size if self.trainer else 1
        return {"data.steps_per_execution": self.block, **own, "processes": world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the first epoch of a resumed run go on where the checkpoint was written.

        Raises:
            CheckpointError: If that is in mid-epoch and the blocks are no longer the same.
        """
        self.resume_at = state["blocks_done"]
        for name, value in self._units().items():
            if self.resume_at and value != (old := state["counted_in"][name]):
                remedy = f"--{name} {old}" if name.startswith("data.") else f"{old} processes"
                raise CheckpointError(
                    f"{name}={value}: the checkpoint stopped in mid-epoch with {old}; resume with {remedy}"
                )
