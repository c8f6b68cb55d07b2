"""The article that this project rebuilds, and the table that puts a run beside it.

Pavan Vadapalli, "Image Classification in CNN: Everything You Need to Know", upGrad blog, section Artificial
Intelligence, last updated 25 February 2021. It trains LeNet-5 on Fashion-MNIST with Keras.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lenet_pl.apps.scores import Scores

SOURCE = "Pavan Vadapalli, “Image Classification in CNN: Everything You Need to Know”, upGrad blog, 25 February 2021"
TEST_ACCURACY = 0.9067
TRAIN_ACCURACY, TRAIN_LOSS = 0.98294997, 0.04584  # given after the training; how they were measured is not shown
LAST_EPOCH_ACCURACY, LAST_EPOCH_LOSS = 0.9850, 0.0421  # from the line that Keras printed for the last epoch
TRAIN_IMAGES, EPOCHS, BATCH_SIZE, PARAMETERS = 60_000, 30, 32, 107_786
SECONDS = 4  # an epoch, on a machine that the article does not name
OPTIMIZER = "Adam, lr 0.001, ε 1e-7"  # Keras's defaults, like the first weights
FIRST_WEIGHTS = "Glorot uniform, biases zero"


class Run(NamedTuple):
    """What is known about a training."""

    epoch: int  # of the checkpoint, 1 for the first
    seed: int
    steps: int  # optimizer steps up to the checkpoint
    epsilon: float  # Adam's ε
    train_images: int  # number of images trained on
    parameters: int  # number of the net's parameters
    model: Mapping[str, Any]  # settings of LitLeNet
    data: Mapping[str, Any]  # settings of FashionMNISTDataModule
    trainer: Mapping[str, Any]  # settings of the Trainer; empty without a config.yaml
    results: Sequence[Mapping[str, str]]  # rows of results.csv; empty without one


class Row(NamedTuple):
    """One line of the article table; ``why`` explains the difference."""

    what: str
    article: str
    here: str
    why: str


# What each difference means, where it is always the same.
_WHY = {
    "training images": "The others are held out for validation. The test images have no part in any choice.",
    "epochs": "Whether more epochs help depends on the schedule and on the measures against overfitting.",
    "scored": "Later epochs fit the training images ever more closely. The validation images show when that stops to "
    "help with new images.",
    "pixels": "Pixels with mean 0 and variance 1 scale the first steps better.",
    "batch size": "Larger batches give fewer and less noisy steps, and allow a larger learning rate.",
    "net": "This is the net of 1998. Its second convolution is not padded, so fewer weights follow it, and its "
    "activation is tanh instead of ReLU.",
    "beyond that": "These are measures against overfitting, of which the article's recipe has none.",
    "training accuracy": "Ours is counted during the scored epoch, while the weights still change. The article took "
    f"its own after the training, and its last epoch's line says {LAST_EPOCH_ACCURACY:.2%}. A closer fit to the "
    "training images says little about new ones.",
    "training loss": "It is counted like the training accuracy. The line of the article's last epoch says "
    f"{LAST_EPOCH_LOSS}.",
}


def rows(run: Run, scores: Scores) -> list[Row]:
    """Returns the article table: what the article says, what this run did, and what the difference means."""
    table = [_row("test accuracy", f"{TEST_ACCURACY:.2%}", f"{scores.accuracy:.2%}", _test_difference(scores))]
    for result in run.results:
        if int(result["epoch"]) == run.epoch:
            accuracy, loss = float(result["train_acc"]), float(result["train_loss"])
            smoothed = " Label smoothing raises ours." if run.model["label_smoothing"] else ""
            table.append(_row("training accuracy", f"{TRAIN_ACCURACY:.2%}", f"{accuracy:.2%}"))
            table.append(_row("training loss", f"{TRAIN_LOSS:.4f}", f"{loss:.4f}", _WHY["training loss"] + smoothed))
    table.append(_row("training images", f"{TRAIN_IMAGES:,}", f"{run.train_images:,}"))
    epochs = len(run.results) or run.trainer.get("max_epochs")
    if epochs:
        table.append(_row("epochs", str(EPOCHS), str(epochs)))
    table += [
        _row("scored", "the last epoch", _scored(run)),
        _row("pixels", "x / 255", _pixels(run.data["mean"], run.data["std"])),
        _row("batch size", str(BATCH_SIZE), str(run.data["batch_size"])),
        _optimizer_row(run),
        _first_weights_row(run.model["init"]),
        _row("net", f"{PARAMETERS:,} parameters", f"{run.parameters:,} parameters"),
        _row("beyond that", "nothing", _extras(run) or "nothing"),
    ]
    if run.results:
        mean = sum(float(result["seconds"]) for result in run.results) / len(run.results)
        validation = " Validation is included here." if run.data["val_size"] else ""
        why = f"The article does not name its machine.{validation}"
        table.append(_row("seconds an epoch", str(SECONDS), f"{mean:.1f}", why))
    return table


def _row(what: str, article: str, here: str, why: str = "") -> Row:
    return Row(what, article, here, "the same" if article == here else why or _WHY[what])


def _test_difference(scores: Scores) -> str:
    points = f"{100 * (scores.accuracy - TEST_ACCURACY):+.2f}".replace("-", "−")
    error = 100 * (scores.accuracy * (1 - scores.accuracy) / scores.n) ** 0.5
    return (
        f"{points} percentage points. Each side is a single run. The number of test images alone leaves a standard "
        f"error of {error:.2f} points, and another seed moves the result as well."
    )


def _scored(run: Run) -> str:
    """Says which epoch is scored, and by what it was chosen."""
    accuracies = {int(row["epoch"]): float(row["val_acc"]) for row in run.results if row["val_acc"]}
    if accuracies and accuracies.get(run.epoch) == max(accuracies.values()):
        return f"epoch {run.epoch}, by validation accuracy"
    if run.results and int(run.results[-1]["epoch"]) == run.epoch:
        return "the last epoch"
    return f"epoch {run.epoch}"


def _pixels(mean: float, std: float) -> str:
    return "x / 255" if mean == 0 and std == 1 else f"(x / 255 − {mean}) / {std}"


def _optimizer_row(run: Run) -> Row:
    here = f"Adam, lr {run.model['lr']}"
    why = "ε is PyTorch's default. Keras's is ten times larger, which matters only for weights with tiny gradients."
    if run.model["schedule"] == "one_cycle":
        here += " at the peak of one cycle"
        why += " The learning rate rises and falls once, so that large steps come first and fine ones last."
    here += f", ε {run.epsilon}".replace("e-0", "e-")
    if run.model["weight_decay"]:
        here += f", weight decay {run.model['weight_decay']}"
        why += " Weight decay pulls the weights towards zero, against overfitting."
    return _row("optimizer", OPTIMIZER, here, why)


def _first_weights_row(init: str) -> Row:
    if init == "orthogonal":
        here, why = "orthogonal with gain √2, biases zero", "No two filters begin alike, so fewer seeds begin badly."
    else:
        here = "uniform within ±1/√(inputs), biases too"
        why = "This is PyTorch's default. In the linear layers its weights are smaller than Keras's."
    return _row("first weights", FIRST_WEIGHTS, here, why)


def _extras(run: Run) -> str:
    """Lists what the recipe does against overfitting and the article does not."""
    extras = {
        "mirrored images": run.data["flip"],
        f"shifts of up to {run.data['shift']} pixels": run.data["shift"],
        f"dropout {run.model['dropout']}": run.model["dropout"],
        f"label smoothing {run.model['label_smoothing']}": run.model["label_smoothing"],
    }
    return ", ".join(text for text, used in extras.items() if used)
