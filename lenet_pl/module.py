"""Training LeNet-5 with Lightning: loss, metrics, optimizer, learning rate."""

import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import Adam, Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lenet_pl import blocks, checkpoint, runs
from lenet_pl.errors import require
from lenet_pl.lenet import LeNet5, fold
from lenet_pl.loader import Batch, TrainLoader
from lenet_pl.seeds import LeaveAsBefore, seed_of, training_seed


class LitLeNet(LightningModule):
    """LeNet-5 with cross-entropy and Adam.

    It logs ``train_loss train_acc val_loss val_acc test_loss test_acc`` once an epoch: the loss in nats per image, the
    accuracy as a fraction. The training metrics are running ones as in Keras: they are taken while the weights change.
    A test also logs ``n``, the number of images. A derived class that overrides a hook must call ``super()``.

    Args:
        variant: ``"article"`` (107,786 parameters) or ``"classic"`` (1998; 61,706), see ``LeNet5``.
        dropout: Dropout after the two hidden linear layers, 0 ≤ p < 1.
        init: First weights: ``"uniform"``, which is PyTorch's default, or ``"orthogonal"``, see ``LeNet5``.
        lr: Adam's learning rate, above 0. A one-cycle schedule has its peak there.
        weight_decay: Decoupled weight decay (Loshchilov & Hutter 2019), at least 0.
        schedule: ``"constant"``, or ``"one_cycle"`` (Smith & Topin 2017), a straight line up to ``lr`` and one down.
        warmup: Share of the one-cycle schedule in which the rate rises, above 0 and below 1.
        label_smoothing: Share of the target that is spread evenly over the classes in training, 0 to 1.
        batch_norm: Whether to normalise batches in training, see ``LeNet5``. Each process uses its own mini-batches.
        composed_kernels: Whether to build each 5×5 kernel from two 3×3 kernels in training, see ``LeNet5``.
        compile: Whether to use ``torch.compile`` in training. It pays only in long trainings. On a GPU it uses TF32.

    Raises:
        UsageError: If an argument is out of its range.
    """

    knows_blocks = True  # see blocks.py

    def __init__(
        self,
        variant: Literal["article", "classic"] = "article",
        dropout: float = 0.0,
        init: Literal["uniform", "orthogonal"] = "uniform",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "one_cycle"] = "constant",
        warmup: float = 0.3,
        label_smoothing: float = 0.0,
        batch_norm: bool | Literal["linear"] = False,
        composed_kernels: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        for name, value, fine, expected in (
            ("lr", lr, 0 < lr < float("inf"), "a finite number above 0, such as 0.001"),
            ("weight_decay", weight_decay, 0 <= weight_decay < float("inf"), "a finite number of at least 0"),
            ("schedule", schedule, schedule in ("constant", "one_cycle"), "'constant' or 'one_cycle'"),
            ("warmup", warmup, 0 < warmup < 1, "a number between 0 and 1"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "a number from 0 to 1"),
        ):
            require(fine, f"model.{name}={value!r}", expected)
        self.save_hyperparameters()
        self.net = LeNet5(variant, dropout, init, batch_norm, composed_kernels)
        loss = MeanMetric(nan_strategy="disable")  # to look for NaN, the host would wait for a GPU
        accuracy = MulticlassAccuracy(10, average="micro", validate_args=False)
        metrics = MetricCollection({"loss": loss, "acc": accuracy}, compute_groups=False)
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")
        self.seed = 0  # of the training
        self.total_steps = float("inf")  # of the training, for the one-cycle schedule

    @classmethod
    def pretrained(cls) -> "LitLeNet":
        """Returns the net of ``best.yaml``, seed 0, in evaluation mode. The package contains its weights.

        It takes images that ``normalise`` in loader.py has scaled with mean 0.2860 and standard deviation 0.3530.
        """
        return cls.load(runs.PRETRAINED)

    @classmethod
    def load(cls, path: str | Path) -> "LitLeNet":
        """Returns the net of a checkpoint, folded into the plain LeNet-5, in evaluation mode.

        A derived class keeps its own net. Lightning's ``load_from_checkpoint`` returns the net as it trains, and does
        not verify the file.

        Raises:
            CheckpointError: If the file is missing, damaged, of another net, or holds more than plain values.
        """
        content = checkpoint.load(path)
        settings = content["hyper_parameters"]
        accepted = inspect.getfullargspec(cls)
        if cls is not LitLeNet and accepted.varkw is None:  # a derived class may have other arguments
            settings = {name: value for name, value in settings.items() if name in accepted.args + accepted.kwonlyargs}
        model = cls(**settings)
        checkpoint.fill(model, content, path)
        model.simplify()
        return model

    def simplify(self) -> None:
        """Folds the net into the plain LeNet-5, in evaluation mode. A derived class keeps its own net."""
        self.eval()
        if type(self) is LitLeNet:
            self.net = fold(self.net)
            self.hparams.update(batch_norm=False, composed_kernels=False)  # for checkpoints, if it trains on

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``[B, 10]`` of normalised images ``[B, 1, 28, 28]``."""
        logits: Tensor = self.net(images)
        return logits

    def setup(self, stage: str) -> None:
        """Takes the seed of a training, and switches blocks off until the loader decides about them."""
        if stage == "fit":
            self.seed = training_seed(self.trainer)
            blocks.begin(self)

    def on_fit_start(self) -> None:
        """Empties the metrics: an earlier validation left inference tensors in them, which no training may change."""
        self.train_metrics.reset()
        self.val_metrics.reset()

    def configure_callbacks(self) -> list[Callback]:
        """Returns a callback that leaves the random numbers as they were, unless the trainer has it already."""
        has_it = any(isinstance(callback, LeaveAsBefore) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if has_it else [LeaveAsBefore()]

    def configure_optimizers(self) -> Optimizer:
        """Returns Adam. ``on_before_optimizer_step`` sets its learning rate from the number of the step."""
        return Adam(
            self.parameters(),
            lr=self.hparams["lr"],
            weight_decay=self.hparams["weight_decay"],
            decoupled_weight_decay=True,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def on_train_start(self) -> None:
        """Checks that the training can go to its end, and compiles the net if that is asked for.

        Raises:
            UsageError: If ``one_cycle`` has no end or several rates, or batch normalisation would get a single image.
        """
        loader: Any = self.trainer.train_dataloader
        if self.hparams["batch_norm"] and isinstance(loader, TrainLoader):
            fits = loader.batch_size > 1 and loader.share % loader.batch_size != 1
            expected = "another size, because batch normalisation cannot take the single image of the last mini-batch"
            require(fits, f"data.batch_size={loader.batch_size}", expected)
        in_graph = self.device.type == "cuda" and not self.automatic_optimization and self.trainer.world_size == 1
        if self.hparams["compile"] and not in_graph:  # for a graph, graph.py compiles the whole step instead
            self.net.compile()
        if self.hparams["schedule"] == "one_cycle" and not self.lr_schedulers():
            ends = blocks.total_steps(self.trainer) < float("inf")
            require(ends, "model.schedule='one_cycle'", "trainer.max_epochs or trainer.max_steps, at which it ends")
            rates = {group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups}
            require(len(rates) == 1, "model.schedule='one_cycle'", "the same learning rate in all parameter groups")

    def on_train_epoch_start(self) -> None:
        """Seeds dropout by the number of the epoch, so that a resumed epoch draws the same masks.

        The length of the schedule is counted anew, because a callback may have changed the size of a batch.
        """
        self.total_steps = blocks.total_steps(self.trainer)
        torch.manual_seed(seed_of(self.seed, self.current_epoch, self.global_rank))

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of an optimizer step, counted from 0."""
        peak: float = self.hparams["lr"]
        if self.hparams["schedule"] == "constant":
            return peak
        up: float = max(1.0, self.hparams["warmup"] * self.total_steps)
        down = max(1.0, self.total_steps - up)
        return peak * min(1.0, (step + 1) / up, (self.total_steps - step) / down)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Sets the learning rate of a step in a one-cycle schedule, unless the user has added a scheduler.

        A CUDA graph can hold rates only as float32, so they are rounded everywhere, with one exception: a CPU takes a
        constant rate as it is.
        """
        if self.lr_schedulers():
            return
        for group in optimizer.param_groups:
            if self.hparams["schedule"] == "one_cycle":
                group["lr"] = float(np.float32(self.lr_at(self.global_step)))
            elif self.device.type == "cuda":
                group["lr"] = float(np.float32(group["lr"]))

    def training_step(self, batch: Batch | blocks.Block, batch_idx: int) -> Tensor | None:
        """Returns the loss of a mini-batch. With a block, it takes all optimizer steps itself and returns None."""
        if isinstance(batch, blocks.Block):
            logits, losses = blocks.run(self, batch, self._logits_and_loss, self.hparams["compile"])
            self._log(self.train_metrics, logits, losses, batch.fields[1])
            return None
        logits, loss = self._logits_and_loss(batch)
        self._log(self.train_metrics, logits.detach(), loss.detach().expand(len(logits)), batch[1])
        return loss

    def _logits_and_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits: Tensor = self(images)
        return logits, F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._evaluate(self.val_metrics, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics, and to ``n``, the number of images tested."""
        self.log("n", float(len(batch[1])), reduce_fx="sum", sync_dist=True, logger=False)
        self._evaluate(self.test_metrics, batch)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Returns the class probabilities, ``[B, 10]``."""
        with torch.autocast(self.device.type, enabled=False):  # as in _evaluate
            images = batch if isinstance(batch, Tensor) else batch[0]  # a loader of the user's may have no labels
            probabilities: Tensor = self(images).softmax(-1)
        return probabilities

    def _evaluate(self, metrics: MetricCollection, batch: Batch) -> None:
        images, labels = batch
        with torch.autocast(self.device.type, enabled=False):  # mixed precision is only for training
            logits = self(images)
            self._log(metrics, logits, F.cross_entropy(logits, labels, reduction="none"), labels)

    def _log(self, metrics: MetricCollection, logits: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Adds N images to the metrics of an epoch.

        ``losses`` holds the loss of each image, or the mean loss of its mini-batch, ``[N]``.
        """
        if self.device.type != "mps":  # Apple's GPU has no float64
            # In float64 the order in which blocks and processes add up the losses changes no digit that is written.
            # Lightning moves a metric to the device each time that it logs it, and that undoes ``set_dtype``.
            metrics["loss"].set_dtype(torch.float64)
        classes = labels.argmax(1) if labels.ndim == 2 else labels  # soft labels, such as those of mixup
        metrics.update(value=losses, preds=logits, target=classes)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds seed and precision, which are enough to repeat a score, and counts mini-batches instead of blocks."""
        blocks.count_batches(self, checkpoint)
        checkpoint["seed"] = self.seed
        checkpoint["precision"] = self.trainer.precision

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets a new learning rate, schedule or weight decay win over that in the optimizer's state."""
        before = checkpoint.get("hyper_parameters", {})
        changed = [name for name in ("lr", "schedule", "weight_decay") if self.hparams[name] != before.get(name)]
        has_new_rate = "lr" in changed or "schedule" in changed
        for optimizer in checkpoint.get("optimizer_states", ()):
            for group in optimizer["param_groups"]:
                if has_new_rate and not checkpoint.get("lr_schedulers"):  # a scheduler goes on from its own rate
                    group["lr"] = self.hparams["lr"]
                if "weight_decay" in changed:
                    group["weight_decay"] = self.hparams["weight_decay"]
