"""The panels of the report: each has a title, a picture and a caption."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from lenet_pl.apps import plots
from lenet_pl.apps.classifier import Classifier
from lenet_pl.apps.scores import BINS, NAMES, Scores, confusions, robustness
from lenet_pl.datamodule import FashionMNISTDataModule

DAMAGED = 500  # test images of which damaged copies are classified


class Panel(NamedTuple):
    """One picture of the report with its texts."""

    title: str
    caption: str  # what it shows, or why it is left out
    alt: str = ""  # what a screen reader says in place of the picture
    figure: Figure | None = None  # None if it is left out


def draw(
    classifier: Classifier,
    data: FashionMNISTDataModule,
    logits: Tensor,
    scores: Scores,
    results: Sequence[Mapping[str, str]],
    epoch: int,
) -> dict[str, Panel]:
    """Draws all panels.

    Args:
        classifier: The net.
        data: The datamodule, with the training and test images read.
        logits: Those of the test images, ``[N, 10]``.
        scores: The scores of these logits.
        results: The rows of results.csv, which may be missing.
        epoch: The checkpoint's epoch, 1 for the first.

    Returns:
        The panels by the name of their PNG file.
    """
    assert data.test_set is not None
    images, labels = data.test_set
    confidence, predicted = logits.softmax(1).max(1)
    few, few_labels = images[:DAMAGED], labels[:DAMAGED]

    def accuracy(damaged: Tensor) -> float:
        return (classifier.in_batches(damaged).argmax(1) == few_labels).double().mean().item()

    first_images, first_labels = data.first_images(25)
    return {
        "curves": _curves(results, epoch),
        "confusion_matrix": Panel(
            "Which classes it confuses",
            "Test images by true class (row) and predicted class (column): their number, and their share of the row. "
            "The colour scale spreads small shares, so that rare mistakes are visible.",
            "Confusion matrix of the ten classes",
            plots.confusion_matrix(confusions(logits, labels), NAMES),
        ),
        "reliability": Panel(
            "Whether its probabilities can be trusted",
            "Where a bar ends below the dashed line, the net is right less often than its probabilities say. The "
            "expected calibration error is the mean distance from that line, weighted by the number of images: "
            f"{scores.calibration_error:.2%} ({BINS} bins).",
            "Accuracy by confidence, and the number of images",
            plots.reliability(confidence, predicted == labels, BINS),
        ),
        "mistakes": _mistakes(images, labels, confidence, predicted),
        "robustness": Panel(
            "Rotated, shifted and noisy images",
            f"Accuracy on the first {len(few):,} test images after each kind of damage. The training images are upright"
            " and centred, so the net had little chance to learn other positions. The article names slanted and rotated"
            " images as a weak point of such nets.",
            "Accuracy against rotation, slant, shift and noise",
            plots.robustness(robustness(few, accuracy)),
        ),
        "samples": Panel(
            "What it learned from",
            "The first training images of the first epoch, before augmentation.",
            "Training images with class names",
            plots.samples(first_images, [NAMES[label] for label in first_labels]),
        ),
    }


def _curves(results: Sequence[Mapping[str, str]], epoch: int) -> Panel:
    title = "Learning curves"
    if not results:
        return Panel(title, "They are left out, because there is no results.csv beside the checkpoint.")
    caption = "Training values are counted during the epoch, while the weights still change. "
    if any(row["val_acc"] for row in results):
        caption += "Validation values are counted after it, on images that are held out from training."
    else:
        caption += "This run held no images out, so there are no validation values."
    return Panel(title, caption, "Loss and accuracy over the epochs", plots.curves(results, epoch))


def _mistakes(images: Tensor, labels: Tensor, confidence: Tensor, predicted: Tensor) -> Panel:
    title = "Its most confident mistakes"
    wrong = (predicted != labels).nonzero().flatten()
    if not len(wrong):
        return Panel(title, "There are none: every test image gets the class of its label.")
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:25]
    captions = []
    for i in worst.tolist():
        captions.append(f"{NAMES[predicted[i]]} {confidence[i]:.1%}\nis: {NAMES[labels[i]]}")
    return Panel(
        title,
        "The misclassified test images to which the net gives the highest probabilities. Below each image stand the "
        "predicted class with its probability, and then the class of its label. Some of the labels are debatable.",
        "Misclassified test images",
        plots.samples(images[worst], captions),
    )
