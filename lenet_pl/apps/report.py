"""Writes ``report.html``, one page on a checkpoint with the article beside it, and its pictures as PNG files."""

import os
import platform
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import StrictUndefined, Template
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional import classification as metrics

from lenet_pl import checkpoint, runs
from lenet_pl.apps import article, plots
from lenet_pl.apps.classifier import classify_test_images
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line

NAMES: list[str] = FashionMNIST.classes
BINS = 15  # of the expected calibration error


def write(ckpt_path: Path, model: LitLeNet, data: FashionMNISTDataModule) -> Path:
    """Writes the report into the checkpoint's run folder, and returns the page.

    Outside a run folder it goes beside the checkpoint and has no learning curves. The report on the package's weights
    goes into the current folder. ``model`` is the checkpoint's module, on any device, which is left in evaluation mode
    and in float32; ``data`` has the checkpoint's settings.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        DataError: If the images are missing and cannot be fetched.
    """
    state = checkpoint.load_ours(ckpt_path, resume=False)
    epoch, seed = state["epoch"] + 1, state["seed"]
    settings = LitLeNet(**state["hyper_parameters"]).hparams  # an older checkpoint lacks newer settings
    run_folder = runs.folder_of(ckpt_path)
    folder = run_folder or runs.beside(ckpt_path)
    results = runs.read_results(run_folder) if run_folder else []
    _, labels, logits = classify_test_images(model, data)
    data.setup("validate")  # reads the training images
    scores = score(logits, labels)
    figures = draw(data, logits)
    if results:
        figures["curves"] = plots.curves(results, epoch)
    pictures = {name: plots.png(figure) for name, figure in figures.items()}
    for name, content in pictures.items():
        write_atomic(folder / f"{name}.png", content)
    source = Path(__file__).with_name("report.html").read_text("utf-8")
    page = Template(source, autoescape=True, undefined=StrictUndefined, trim_blocks=True).render(
        path=one_line(ckpt_path),
        epoch=epoch,
        seed=seed,
        n=len(labels),
        scores=scores,
        bins=BINS,
        source=article.SOURCE,
        article=article.rows(settings, data, results, epoch, scores["accuracy"]),
        pictures={name: b64encode(content).decode() for name, content in pictures.items()},
        validated=any(row["val_acc"] for row in results),
        origin=origin(results),
    )
    write_atomic(folder / runs.REPORT, page.encode())
    return folder / runs.REPORT


def score(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores logits, ``[N, 10]``, against labels, ``[N]``.

    Returns:
        ``accuracy``, ``loss`` in nats, ``calibration_error`` (the expected one, Naeini, Cooper & Hauskrecht 2015), and
        ``classes``: for each its name, precision, recall, F1 and number of images. Shares are 0 to 1.
    """
    precision = metrics.multiclass_precision(logits, labels, 10, average="none").tolist()
    recall = metrics.multiclass_recall(logits, labels, 10, average="none").tolist()
    f1 = metrics.multiclass_f1_score(logits, labels, 10, average="none").tolist()
    counts = labels.bincount(minlength=10).tolist()
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "calibration_error": metrics.multiclass_calibration_error(logits, labels, 10, n_bins=BINS).item(),
        "classes": list(zip(NAMES, precision, recall, f1, counts, strict=True)),
    }


def draw(data: FashionMNISTDataModule, logits: Tensor) -> dict[str, Figure]:
    """Draws the pictures that need no results.csv, from the logits of the test images, ``[N, 10]``.

    Returns:
        The figures by the name of their PNG file; without ``mistakes`` where the net makes none.
    """
    train_images, train_labels = data.train_set  # in random order
    images, labels = data.test_set
    confidence, predicted = logits.softmax(1).max(1)
    figures = {
        "confusion_matrix": plots.confusion_matrix(metrics.multiclass_confusion_matrix(logits, labels, 10), NAMES),
        "reliability": plots.reliability(confidence, predicted == labels, BINS),
        "samples": plots.samples(train_images[:25], [NAMES[label] for label in train_labels[:25]]),
    }
    wrong = (predicted != labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:25]
    if len(worst):
        captions = [f"{NAMES[predicted[i]]} {confidence[i]:.1%}\nis: {NAMES[labels[i]]}" for i in worst.tolist()]
        figures["mistakes"] = plots.samples(images[worst], captions)
    return figures


def origin(results: Sequence[Mapping[str, str]]) -> str:
    """Says how long the training took, and by what, where and when the page was written."""
    seconds = sum(float(row["seconds"]) for row in results)
    training = f"The training took {seconds:,.0f} s for {len(results)} epochs. " if results else ""
    machine = f"{platform.platform()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    return f"{training}This page was written by {runs.versions()}, at {now}, on {machine}."
