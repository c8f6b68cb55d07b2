"""The article that this project rebuilds, and the table that puts a run beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lenet_pl.datamodule import FashionMNISTDataModule
from lenet_pl.lenet import layers

# It trains LeNet-5 on Fashion-MNIST with Keras, in the section Artificial Intelligence of that blog.
SOURCE = "Pavan Vadapalli, “Image Classification in CNN: Everything You Need to Know”, upGrad blog, 25 February 2021"
TEST_ACCURACY = 0.9067
FIRST_WEIGHTS = {
    "uniform": "uniform within ±1/√(inputs), biases too",
    "orthogonal": "orthogonal with gain √2, biases zero",
}
WHY = {
    "test accuracy": "{points} percentage points. Each side is a single run. The number of test images alone leaves a "
    "standard error of {error:.2f} points, and another seed moves the result as well.",
    "training accuracy": "Ours is counted during the scored epoch, while the weights still change. The article took "
    "its own after the training; its last epoch's line says 98.50%. A closer fit to the training images says little "
    "about new ones.",
    "training loss": "It is counted like the training accuracy{smoothing}. The line of the article's last epoch says "
    "0.0421.",
    "training images": "The others are held out for validation. The test images have no part in any choice.",
    "scored epoch": "Later epochs fit the training images ever more closely. Validation images show when that stops "
    "helping with new ones; a run without them is scored by its last epoch.",
    "pixels": "Pixels with mean 0 and variance 1 scale the first steps better.",
    "batch size": "Larger batches give fewer and less noisy steps, and allow a larger learning rate.",
    "learning rate": "Another rate fits another batch size. In one cycle it rises to its peak and then falls to "
    "nearly zero, so that the last steps are fine ones.",
    "Adam's ε": "Each is its library's default. The difference matters only for weights with tiny gradients.",
    "first weights": "Uniform weights are PyTorch's default, and in the linear layers smaller than Keras's. Among "
    "orthogonal ones no two filters begin alike, so fewer seeds begin badly.",
    "net": "This is the net of 1998. Its second convolution is not padded, so fewer weights follow it, and its "
    "activation is tanh instead of ReLU.",
    "against overfitting": "The article's recipe has no such measures.",
    "seconds an epoch": "The article does not name its machine. Ours include validation, if there is any.",
}


def rows(
    settings: Mapping[str, Any],
    data: FashionMNISTDataModule,
    results: Sequence[Mapping[str, str]],
    epoch: int,
    accuracy: float,
) -> list[tuple[str, str, str, str]]:
    """Returns the table: for each line its name, what the article says, what holds here, and why the two differ.

    ``settings`` are the arguments of the module that was trained. ``data`` has read the training and test images.
    Without ``results``, the rows of results.csv, there are fewer lines.
    ``epoch``, 1 for the first, and ``accuracy`` on the test images, 0 to 1, are those of the checkpoint.
    """
    table = [("test accuracy", f"{TEST_ACCURACY:.2%}", f"{accuracy:.2%}")]
    for result in results:
        if int(result["epoch"]) == epoch:
            table.append(("training accuracy", "98.29%", f"{float(result['train_acc']):.2%}"))
            table.append(("training loss", "0.0458", f"{float(result['train_loss']):.4f}"))
    if results:
        seconds = sum(float(result["seconds"]) for result in results) / len(results)
        table.append(("seconds an epoch", "4", f"{seconds:.1f}"))
    plain = data.mean == 0 and data.std == 1
    at_the_peak = " at the peak of one cycle" if settings["schedule"] == "one_cycle" else ""
    parameters = sum(number for *_, number in layers(settings["variant"]))
    table += [
        ("scored epoch", "30 of 30", f"{epoch} of {results[-1]['epoch']}" if results else str(epoch)),
        ("training images", "60,000", f"{len(data.train_set[1]):,}"),
        ("pixels", "x / 255", "x / 255" if plain else f"(x / 255 − {data.mean}) / {data.std}"),
        ("batch size", "32", str(data.batch_size)),
        ("learning rate", "0.001", f"{settings['lr']}{at_the_peak}"),
        ("Adam's ε", "1e-7", "1e-8"),
        ("first weights", "Glorot uniform, biases zero", FIRST_WEIGHTS[settings["init"]]),
        ("net", "107,786 parameters", f"{parameters:,} parameters"),
        ("against overfitting", "nothing", _measures(settings, data)),
    ]
    points = f"{100 * (accuracy - TEST_ACCURACY):+.2f}".replace("-", "−")
    error = 100 * (accuracy * (1 - accuracy) / len(data.test_set[1])) ** 0.5
    smoothing = ", and label smoothing raises it" if settings["label_smoothing"] else ""
    why = {what: text.format(points=points, error=error, smoothing=smoothing) for what, text in WHY.items()}
    return [(what, there, here, "the same" if there == here else why[what]) for what, there, here in table]


def _measures(settings: Mapping[str, Any], data: FashionMNISTDataModule) -> str:
    """Lists what the recipe does against overfitting."""
    measures = {
        "batch normalisation while it trains": settings["batch_norm"],
        "composed kernels while it trains": settings["composed_kernels"],
        "mirrored images": data.flip,
        f"shifts of up to {data.shift} pixels": data.shift,
        f"dropout {settings['dropout']}": settings["dropout"],
        f"label smoothing {settings['label_smoothing']}": settings["label_smoothing"],
        f"weight decay {settings['weight_decay']}": settings["weight_decay"],
    }
    return ", ".join(text for text, used in measures.items() if used) or "nothing"
