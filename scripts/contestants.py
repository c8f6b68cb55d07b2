"""What benchmark.py runs beside lenet_pl, each in a process of its own: ``python scripts/contestants.py NAME``.

All train the same net at batch 32 with Adam on the same number of images, keep the running loss and accuracy, and
validate after each epoch. They print "ready" before the first step and a line after each epoch, from which benchmark.py
takes the times.
"""

import argparse
import json
import statistics
import time
from importlib import import_module
from pathlib import Path
from typing import Any

BATCH, VAL = 32, 5000


def say(epoch: int, train_acc: float, val_acc: float) -> None:
    """Prints the line that ends an epoch; a GPU has done its work by then, because the accuracies are known."""
    print(f"epoch {epoch}  train_acc {train_acc:.2%}  val_acc {val_acc:.2%}", flush=True)


def find_device(args: argparse.Namespace) -> Any:
    """Returns the torch device."""
    import torch

    return (torch.accelerator.current_accelerator() if args.accelerator == "gpu" else None) or torch.device("cpu")


def read(args: argparse.Namespace) -> list[Any]:
    """Returns training images ``[N, 1, 28, 28]``, normalised, their labels, and both for validation, on the device."""
    import torch
    from torchvision.datasets import FashionMNIST

    torch.manual_seed(args.seed)
    data = FashionMNIST(args.data_dir)
    order = torch.randperm(len(data))
    images = (data.data[order].unsqueeze(1) / 255 - 0.2860) / 0.3530
    labels = data.targets[order]
    val, device = args.val_size, find_device(args)
    return [part.to(device) for part in (images[val:], labels[val:], images[:val], labels[:val])]


def validate(net: Any, images: Any, labels: Any) -> float:
    """Returns the accuracy; computes the loss too, as the other contestants do."""
    import torch
    import torch.nn.functional as F

    net.eval()
    with torch.inference_mode():
        logits = torch.cat([net(x) for x in images.split(1000)])
        F.cross_entropy(logits, labels).item()
    return (logits.argmax(1) == labels).float().mean().item()  # type: ignore[no-any-return]


def article_net() -> Any:
    """Returns the article's net as most people write it in PyTorch."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def plain_loop(args: argparse.Namespace) -> None:
    """Trains by hand as most people write it: an index per batch, ``.item()`` for loss and accuracy."""
    import torch
    import torch.nn.functional as F

    images, labels, val_images, val_labels = read(args)
    net = article_net().to(images.device)
    optimizer = torch.optim.Adam(net.parameters())
    print("ready", flush=True)
    for epoch in range(1, args.epochs + 1):
        net.train()
        loss_sum, hits = 0.0, 0.0
        order = torch.randperm(len(labels), device=labels.device)
        for start in range(0, len(labels), BATCH):
            index = order[start : start + BATCH]
            x, y = images[index], labels[index]
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(y)
            hits += (logits.argmax(1) == y).sum().item()
        say(epoch, hits / len(labels), validate(net, val_images, val_labels))


def best_loop(args: argparse.Namespace) -> None:
    """Takes the same steps in the quickest way we know: channels_last, fused Adam, one shuffle, metrics at the end."""
    import torch
    import torch.nn.functional as F

    images, labels, val_images, val_labels = read(args)
    net = article_net().to(images.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    print("ready", flush=True)
    for epoch in range(1, args.epochs + 1):
        net.train()
        order = torch.randperm(len(labels), device=labels.device)
        shuffled = labels[order]
        all_logits, losses = [], []
        for x, y in zip(images[order].split(BATCH), shuffled.split(BATCH), strict=True):
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            all_logits.append(logits.detach())
            losses.append(loss.detach())
        torch.stack(losses).mean().item()
        hits = (torch.cat(all_logits).argmax(1) == shuffled).float().mean().item()
        say(epoch, hits, validate(net, val_images, val_labels))


def stock_lightning(args: argparse.Namespace) -> None:
    """Trains as the documentation of Lightning and torchvision shows it: bar, logger and checkpoint by default."""
    import torch
    import torch.nn.functional as F
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader, random_split
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision.datasets import FashionMNIST
    from torchvision.transforms import Compose, Normalize, ToTensor

    class Stock(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = article_net()
            self.train_acc = MulticlassAccuracy(10, average="micro")
            self.val_acc = MulticlassAccuracy(10, average="micro")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            self.train_acc(logits, batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: list[torch.Tensor]) -> None:
            logits = self.net(batch[0])
            self.val_acc(logits, batch[1])
            self.log("val_loss", F.cross_entropy(logits, batch[1]))
            self.log("val_acc", self.val_acc)

        def on_train_start(self) -> None:
            print("ready", flush=True)

        def on_train_epoch_end(self) -> None:
            metrics = self.trainer.callback_metrics
            say(self.current_epoch + 1, metrics["train_acc"].item(), metrics["val_acc"].item())

    seed_everything(args.seed)
    data = FashionMNIST(args.data_dir, transform=Compose([ToTensor(), Normalize((0.2860,), (0.3530,))]))
    train, val = random_split(data, [len(data) - args.val_size, args.val_size])
    workers: dict[str, Any] = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    trainer = Trainer(max_epochs=args.epochs, accelerator=args.accelerator, devices=1)
    trainer.fit(Stock(), DataLoader(train, BATCH, shuffle=True, **workers), DataLoader(val, 1000, **workers))


def keras_script(args: argparse.Namespace) -> None:
    """Trains the article's Keras model; numpy reads the files, because torch would count as memory of Keras."""
    import keras
    import numpy as np
    from keras.layers import AveragePooling2D, Conv2D, Dense, Flatten

    backend = import_module(keras.backend.backend())
    print(f"Keras {keras.__version__} on {backend.__name__} {backend.__version__}")
    keras.utils.set_random_seed(args.seed)
    raw = Path(args.data_dir) / "FashionMNIST/raw"
    pixels = np.fromfile(raw / "train-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw / "train-labels-idx1-ubyte", np.uint8, offset=8)
    images = pixels.reshape(-1, 28, 28, 1) / np.float32(255)
    order = np.random.permutation(len(labels))
    train, val = order[args.val_size :], order[: args.val_size]
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            Conv2D(6, 5, padding="same", activation="relu"),
            AveragePooling2D(2),
            Conv2D(16, 5, padding="same", activation="relu"),
            AveragePooling2D(2),
            Flatten(),
            Dense(120, activation="relu"),
            Dense(84, activation="relu"),
            Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    clock = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: print("ready", flush=True),
        on_epoch_end=lambda epoch, logs: say(epoch + 1, logs["accuracy"], logs["val_accuracy"]),
    )
    options = {"validation_data": (images[val], labels[val]), "callbacks": [clock], "verbose": 0}
    model.fit(images[train], labels[train], batch_size=BATCH, epochs=args.epochs, **options)


def inference(args: argparse.Namespace) -> None:
    """Prints images per second by batch size, from uint8 pixels in memory to classes, and what they ran on, as JSON."""
    import torch

    from lenet_pl import LitLeNet
    from lenet_pl.loader import normalise

    model = LitLeNet().eval().to(find_device(args))
    rates = {}
    for size in (1, 32, 1000):
        images, speeds = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8, device=model.device), []
        for _ in range(args.epochs + 1):  # the first warms up
            count, passed, started = 0, 0.0, time.perf_counter()
            with torch.inference_mode():
                while passed < 0.5:
                    model(normalise(images, 0.2860, 0.3530)).argmax(1).cpu()  # on a GPU this waits for the result
                    count, passed = count + size, time.perf_counter() - started
            speeds.append(count / passed)
        rates[size] = round(statistics.median(speeds[1:]))
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device)
    print(json.dumps({"device": name, "threads": torch.get_num_threads(), "images_per_second": rates}))


CONTESTANTS = {
    "plain loop": plain_loop,
    "best loop": best_loop,
    "stock Lightning": stock_lightning,
    "Keras": keras_script,
    "inference": inference,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--val_size", type=int, default=VAL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="of stock Lightning's DataLoader (default: torch's, 0)")
    arguments = parser.parse_args()
    CONTESTANTS[arguments.contestant](arguments)
