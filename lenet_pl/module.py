"""Training LeNet-5 on Lightning: loss, metrics, optimizer, and many exact optimizer steps per training step."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.adam import Adam, adam
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lenet_pl.checkpoint import CheckpointError
from lenet_pl.lenet import LeNet5
from lenet_pl.loader import Batch


@torch.no_grad()
def update(optimizer: Adam, loss: Tensor) -> None:
    """Does what ``loss.backward()`` and then a later than the first ``optimizer.step()`` do, to the bit.

    By the function that ``step`` calls: its search for parameters, states and gradients, and ``zero_grad``, take a
    seventh of an epoch of ``lenet.yaml``.
    """
    group = optimizer.param_groups[0]
    states = [optimizer.state[parameter] for parameter in group["params"]]
    exp_avgs, exp_avg_sqs, steps = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    names = ("foreach", "fused", "decoupled_weight_decay", "amsgrad", "lr", "weight_decay", "eps", "maximize")
    options = {name: group[name] for name in names}
    beta1, beta2 = group["betas"]
    grads = list(torch.autograd.grad(loss, group["params"]))
    adam(group["params"], grads, exp_avgs, exp_avg_sqs, [], steps, beta1=beta1, beta2=beta2, **options)


class LitLeNet(LightningModule):
    """LeNet-5 with cross-entropy and Adam.

    Logs ``train_loss train_acc val_loss val_acc test_loss test_acc`` once an epoch: the loss in nats per image, the
    accuracy as a fraction. The training metrics are running ones, over the epoch's own steps, as in Keras.

    Args:
        variant: ``"article"`` (107,786 parameters) or ``"classic"`` (1998; 61,706), see ``LeNet5``.
        dropout: Dropout after the two hidden linear layers, 0 ≤ p < 1.
        init: First weights: ``"uniform"``, PyTorch's own, or ``"orthogonal"``, see ``LeNet5``.
        lr: Adam's learning rate, above 0; the peak of a one-cycle schedule.
        weight_decay: Decoupled weight decay (Loshchilov & Hutter 2019), at least 0.
        schedule: ``"constant"`` or ``"one_cycle"`` (Smith & Topin 2017: a line up and a line down), stepped per
            optimizer step.
        warmup: Share of the one-cycle schedule spent going up, above 0 and below 1.
        label_smoothing: Share of the target spread evenly over the classes in training, 0 to 1.
        tta: Test-time augmentation: ``"none"``, or ``"flip"`` to average the logits of an image and its mirror image.
        compile: Whether to train through ``torch.compile`` (on a GPU with CUDA graphs). Pays off in long runs only.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        variant: str = "article",
        dropout: float = 0.0,
        init: str = "uniform",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup: float = 0.3,
        label_smoothing: float = 0.0,
        tta: str = "none",
        compile: bool = False,
    ) -> None:
        super().__init__()
        for name, value, fine, expected in (
            ("lr", lr, 0 < lr < float("inf"), "a finite number above 0, such as 0.001"),
            ("weight_decay", weight_decay, 0 <= weight_decay < float("inf"), "a finite number of at least 0"),
            ("schedule", schedule, schedule in ("constant", "one_cycle"), "'constant' or 'one_cycle'"),
            ("warmup", warmup, 0 < warmup < 1, "a number between 0 and 1"),
            ("label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "a number from 0 to 1"),
            ("tta", tta, tta in ("none", "flip"), "'none' or 'flip'"),
        ):
            if not fine:
                raise ValueError(f"model.{name}={value!r}: expected {expected}")
        self.save_hyperparameters()
        self.net = LeNet5(variant, dropout, init).to(memory_format=torch.channels_last)
        self.metrics: Any = nn.ModuleDict()
        for stage in ("train", "val", "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric(nan_strategy=float("inf"))  # a NaN shows as inf
            self.metrics[f"{stage}_acc"] = MulticlassAccuracy(10, average="micro", validate_args=False)
        self.block = 1
        self.seed = 0

    def forward(self, images: Tensor) -> Tensor:
        """Classifies normalised images.

        Args:
            images: Float images, ``[N, 1, 28, 28]``.

        Returns:
            Logits, ``[N, 10]``; in evaluation mode the mean over both mirrorings, where ``tta`` asks for that.
        """
        logits: Tensor = self.net(images)
        if self.hparams["tta"] == "flip" and not self.training:
            logits = (logits.clone() + self.net(images.flip(-1))) / 2  # a CUDA graph's next run overwrites its outputs
        return logits

    def setup(self, stage: str) -> None:
        """Chooses between Lightning's automatic optimization and blocks of optimizer steps."""
        if stage == "fit":
            self.block = getattr(self.trainer.datamodule, "block", 1)  # type: ignore[attr-defined]
            self.automatic_optimization = self.block == 1
            self.seed = torch.initial_seed() % 2**63
            if self.hparams["compile"]:
                cuda = self.trainer.strategy.root_device.type == "cuda"
                self.net.compile(mode="reduce-overhead" if cuda else "default")

    def configure_optimizers(self) -> Any:
        """Returns Adam and, for ``one_cycle``, its scheduler.

        Raises:
            ValueError: If ``one_cycle`` has no end to go to.
        """
        lr = self.hparams["lr"]
        optimizer = Adam(
            self.net.parameters(),
            lr=lr,
            weight_decay=self.hparams["weight_decay"],
            decoupled_weight_decay=True,
            fused=self.device.type in ("cpu", "cuda"),
        )
        if self.hparams["schedule"] == "constant":
            return optimizer
        if self.trainer.max_epochs == self.trainer.max_steps == -1:
            raise ValueError("schedule='one_cycle': expected trainer.max_epochs or trainer.max_steps, to end with them")
        if self.automatic_optimization:
            steps = int(self.trainer.estimated_stepping_batches)
        else:  # Lightning would count blocks
            steps = self.trainer.max_epochs * self.trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        steps += 1  # the scheduler also steps after the last one
        options: dict[str, Any] = {"anneal_strategy": "linear", "cycle_momentum": False}
        scheduler = OneCycleLR(optimizer, lr, steps, pct_start=max(self.hparams["warmup"], 2 / steps), **options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Sums the training loss in float64: blocks, stops and processes, which change the order, round nothing."""
        if self.device.type != "mps":  # which has no float64; not earlier, for a move to the device undoes it
            self.metrics["train_loss"].set_dtype(torch.float64)

    def training_step(self, batch: Batch | list[Batch], batch_idx: int) -> Tensor | None:
        """Runs one mini-batch under automatic optimization, or an optimizer step on each mini-batch of a block."""
        if isinstance(batch, list):
            self._run_block(batch, batch_idx * self.block)
            return None
        logits, loss = self._forward(batch, batch_idx)
        self._log("train", logits.detach(), loss.detach(), batch[1])
        return loss

    def _forward(self, batch: Batch, position: int) -> tuple[Tensor, Tensor]:
        """Returns logits and mean loss of the mini-batch at ``position`` in the epoch."""
        if self.hparams["dropout"]:  # by the place in the run, not by its history: a resumed run draws the same masks
            key = (self.seed, self.current_epoch, position, self.global_rank)
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        logits = self.net(batch[0])
        return logits, F.cross_entropy(logits, batch[1], label_smoothing=self.hparams["label_smoothing"])

    def _run_block(self, block: list[Batch], position: int) -> None:
        """Takes the optimizer steps of ``block``, whose first mini-batch is at ``position`` in the epoch.

        Exactly what automatic optimization does, without Lightning's hooks around each step.
        """
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, Adam)
        all_logits, losses = [], []
        for i, batch in enumerate(block):
            logits, loss = self._forward(batch, position + i)
            if self.trainer.world_size == 1 and optimizer.state:
                update(optimizer, loss)
            else:  # the first step makes Adam's state; several processes sum their gradients in Lightning's backward
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            if isinstance(scheduler, OneCycleLR):
                scheduler.step()
            torch.clear_autocast_cache()  # it holds bfloat16 copies of the weights as they were before the step
            all_logits.append(logits.detach().clone())  # a CUDA graph's next run overwrites its outputs
            losses.append(loss.detach().clone())
        # Lightning counts no step of a bare optimizer, and one batch: here global_step and the loggers' step count
        # optimizer steps.
        loop = self.trainer.fit_loop.epoch_loop
        loop.manual_optimization.optim_step_progress.total.increment_by(len(block))
        loop._batches_that_stepped += len(block) - 1
        sizes = torch.tensor([len(labels) for _, labels in block], device=self.device)
        self._log("train", torch.cat(all_logits), torch.stack(losses), torch.cat([y for _, y in block]), sizes)

    def _log(self, stage: str, logits: Tensor, loss: Tensor, labels: Tensor, sizes: Tensor | None = None) -> None:
        """Adds mini-batches to the epoch's metrics; ``sizes`` are their numbers of images, where there are several."""
        metrics: dict[str, Any] = {name: self.metrics[name] for name in (f"{stage}_loss", f"{stage}_acc")}
        metrics[f"{stage}_loss"].update(loss, len(labels) if sizes is None else sizes)
        metrics[f"{stage}_acc"].update(logits, labels)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        with torch.autocast(self.device.type, enabled=False):  # a score does not depend on the training's precision
            logits = self(images)
            self._log(stage, logits, F.cross_entropy(logits, labels), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the test metrics, and to the number of images tested."""
        self.log("n", float(len(batch[1])), reduce_fx="sum", sync_dist=True, logger=False)
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the class probabilities, ``[N, 10]``."""
        probabilities: Tensor = self(batch[0]).softmax(-1)
        return probabilities

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the seed and the running training metrics, which a run that stops in mid-epoch goes on with."""
        checkpoint["seed"] = self.seed
        if self._trainer is not None and not self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            checkpoint["train_metrics"] = {}
            for name in ("train_loss", "train_acc"):
                with self.metrics[name].sync_context():
                    state = self.metrics[name].metric_state
                    checkpoint["train_metrics"][name] = {key: value.clone() for key, value in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets the arguments win over the checkpoint's settings, and goes on with its counts.

        Raises:
            CheckpointError: If the checkpoint belongs to another net or another kind of schedule.
        """
        old = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]
        for name in ("variant", "schedule"):
            if old[name] != self.hparams[name]:
                raise CheckpointError(
                    f"model.{name}={self.hparams[name]!r}: the checkpoint has {old[name]!r}; leave that setting out"
                )
        for name, state in checkpoint.get("train_metrics", {}).items() if self.global_rank == 0 else ():
            for key, value in state.items():
                setattr(self.metrics[name], key, value)
        for scheduler in checkpoint["lr_schedulers"]:  # the shape follows from the arguments, the place does not
            for key in scheduler.keys() - {"last_epoch", "_step_count", "_last_lr"}:
                del scheduler[key]
        for group in checkpoint["optimizer_states"][0]["param_groups"]:
            group["weight_decay"] = self.hparams["weight_decay"]
            for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
                if old["lr"] != self.hparams["lr"]:
                    group[key] *= self.hparams["lr"] / old["lr"]
        loop = checkpoint["loops"]["fit_loop"]
        # Lightning's counts depend on whether validation, max_steps or max_time ended the epoch. Here there are two
        # cases: a run is within an epoch, or between two.
        batches = loop["epoch_loop.batch_progress"]
        for count in loop["epoch_progress"].values():
            count["processed"] = count["completed"] = count["processed" if batches["is_last_batch"] else "completed"]
        if batches["is_last_batch"]:
            batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
        # Lightning keeps one count of optimizer steps for each kind of optimization: they agree whatever the block.
        for count in (
            loop["epoch_loop.manual_optimization.optim_step_progress"],
            loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"],
        ):
            count["total"].update(ready=checkpoint["global_step"], completed=checkpoint["global_step"])
