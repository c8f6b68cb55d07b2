"""The numbers of the report: how well the net classifies the test images, also damaged ones."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import classification as metrics
from torchvision.transforms.v2.functional import InterpolationMode, affine

from lenet_pl.datamodule import FashionMNIST
from lenet_pl.loader import generator

NAMES: list[str] = FashionMNIST.classes
BINS = 15  # of the expected calibration error


class ClassScore(NamedTuple):
    """Precision, recall and F1 (0 to 1) of one class, and its number of test images."""

    name: str
    precision: float
    recall: float
    f1: float
    n: int


class Scores(NamedTuple):
    """The net's scores on ``n`` images; all but the loss are fractions from 0 to 1."""

    n: int
    accuracy: float
    loss: float  # mean cross-entropy in nats
    calibration_error: float  # expected calibration error (Naeini, Cooper & Hauskrecht 2015) over BINS equal bins
    f1: float  # mean of the classes
    classes: list[ClassScore]


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores logits, ``[N, 10]``, against labels, ``[N]``."""
    functions = (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    precision, recall, f1 = (function(logits, labels, len(NAMES), average="none").tolist() for function in functions)
    counts = labels.bincount(minlength=len(NAMES)).tolist()
    return Scores(
        n=len(labels),
        accuracy=(logits.argmax(1) == labels).double().mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        calibration_error=metrics.multiclass_calibration_error(logits, labels, len(NAMES), n_bins=BINS).item(),
        f1=sum(f1) / len(f1),
        classes=[ClassScore(*row) for row in zip(NAMES, precision, recall, f1, counts, strict=True)],
    )


def confusions(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts images by true class (row) and predicted class (column), ``[10, 10]``."""
    counts: Tensor = metrics.multiclass_confusion_matrix(logits, labels, len(NAMES))
    return counts


def robustness(images: Tensor, accuracy: Callable[[Tensor], float]) -> dict[str, dict[str, dict[int, float]]]:
    """Measures the accuracy on rotated, slanted, shifted and noisy copies of images.

    Args:
        images: ``[N, 1, 28, 28]``, uint8.
        accuracy: Returns the accuracy (0 to 1) on such copies.

    Returns:
        For each axis label its lines by name, and for each line the accuracy by the amount of damage.
    """

    def moved(angle: float = 0, right: int = 0, down: int = 0, slant: float = 0) -> float:
        return accuracy(affine(images, angle, [right, down], 1.0, [slant, 0.0], InterpolationMode.BILINEAR))

    def noisy(deviation: int) -> float:
        return accuracy((images + deviation * noise).round().clamp(0, 255).byte())

    noise = torch.randn(images.shape, generator=generator(0))
    angles, pixels = range(-45, 46, 15), range(-6, 7, 2)
    rotated, slanted = {x: moved(angle=x) for x in angles}, {x: moved(slant=x) for x in angles}
    right, down = {x: moved(right=x) for x in pixels}, {x: moved(down=x) for x in pixels}
    return {
        "angle, degrees": {"rotated": rotated, "slanted": slanted},
        "shift, pixels": {"right": right, "down": down},
        "noise, standard deviation in grey levels": {"Gaussian noise": {x: noisy(x) for x in range(0, 101, 20)}},
    }
