"""Draws the pictures of the report and of ``predict``: arrays in, a Figure out.

Nothing here uses pyplot, so the figures need no display and leave no global state behind.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike
from torch import Tensor

from lenet_pl.pictures.files import MARK

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # from Okabe and Ito's palette for colour-blind readers
STYLE: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.4,
    "legend.frameon": False,
}
# A user's matplotlibrc may ask for anything, such as TeX or a font that is not there.
_styled = matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE})


@_styled
def png(figure: Figure) -> bytes:
    """Returns a figure as a PNG with this program's mark, by which ``files.find`` passes it over."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a file name may use any script
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": MARK})
    return buffer.getvalue()


class Row(NamedTuple):
    """One row of ``predictions``."""

    title: str  # shown as it is, and shortened in the middle above 60 characters
    picture: ArrayLike | None  # the user's picture, or None to leave its place empty
    seen: ArrayLike | None  # what the net saw, [28, 28], 0 to 255, or None
    top: Sequence[tuple[str, float]]  # classes with their probabilities, 0 to 1


@_styled
def predictions(rows: Sequence[Row]) -> Figure:
    """Draws for each row the picture, what the net saw, and the three classes with bars for their probabilities."""
    figure = Figure(figsize=(7, 0.9 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1, 1, 4])
    for (left, middle, right), row in zip(axes, rows, strict=True):
        for ax, image in ((left, row.picture), (middle, row.seen)):
            ax.axis("off")
            if image is not None:
                ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        labels = [f"{label} {probability:.1%}" for label, probability in row.top]
        right.barh(labels, [probability for _, probability in row.top], color=[BLUE, GREY, GREY])
        right.set(xlim=(0, 1), xticks=[])
        right.invert_yaxis()
        title = row.title if len(row.title) <= 60 else f"{row.title[:40]}…{row.title[-19:]}"
        right.set_title(title, fontsize=8, loc="left", parse_math=False)  # a file name may hold dollar signs
        right.tick_params(labelsize=8, length=0)
        right.spines[:].set_visible(False)
    return figure


@_styled
def samples(images: Tensor, captions: Sequence[str]) -> Figure:
    """Shows images, ``[N, 1, 28, 28]``, 0 (black) to 255, in rows of five, each below its caption."""
    columns, rows = 5, math.ceil(len(captions) / 5)
    figure = Figure(figsize=(7.5, 1.8 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, image, caption in zip(axes, images, captions, strict=False):  # the last places may stay empty
        ax.imshow(image[0].cpu().numpy(), cmap="gray", vmin=0, vmax=255)
        ax.set_title(caption, fontsize=8.5)
    return figure


@_styled
def curves(rows: Sequence[Mapping[str, str]], scored: int) -> Figure:
    """Draws the rows of results.csv: loss and accuracy over the epochs, with a mark at the epoch that is ``scored``."""
    validated = [row for row in rows if row["val_acc"]]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, kind, title in ((left, "loss", "loss, nats"), (right, "acc", "accuracy")):
        for name, label, some, colour in (("train", "training", rows, BLUE), ("val", "validation", validated, ORANGE)):
            if some:
                epochs = [int(row["epoch"]) for row in some]
                values = [float(row[f"{name}_{kind}"]) for row in some]
                ax.plot(epochs, values, ".-", color=colour, label=label)
        ax.axvline(scored, color="black", linestyle=":", label=f"scored: epoch {scored}")
        ax.set(xlabel="epoch", title=title, xlim=(0, int(rows[-1]["epoch"]) + 1))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid()
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@_styled
def confusion_matrix(counts: Tensor, names: Sequence[str]) -> Figure:
    """Draws counts, ``[C, C]``, true class by row and predicted class by column, each with its share of the row.

    The square root of the share gives the colour, so that rare mistakes are visible.
    """
    matrix = counts.cpu().numpy()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    ax = figure.subplots()
    ax.imshow(share**0.5, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(matrix):
        text = f"{count}\n{share[row, column]:.1%}" if count else "0"
        colour = "black" if share[row, column] > 0.3 else "white"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour, in_layout=False)
    ax.set_xticks(range(len(names)), names, fontsize=8.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="predicted class", ylabel="true class")
    return figure


@_styled
def reliability(confidence: Tensor, correct: Tensor, bins: int) -> Figure:
    """Draws the accuracy in equal bins of confidence, with the number of images above each bar.

    ``confidence``, ``[N]``, is the probability of the predicted class; ``correct``, ``[N]``, says if that is right.
    """
    values, hits = confidence.cpu().numpy(), correct.cpu().numpy()
    counts, edges = np.histogram(values, bins, (0, 1))
    right, _ = np.histogram(values[hits], bins, (0, 1))
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    bars = ax.bar(edges[:-1], right / np.maximum(counts, 1), 0.92 / bins, align="edge", color=BLUE, label="this net")
    numbers = [str(count) if count else "" for count in counts]
    ax.bar_label(bars, numbers, fontsize=8, padding=1, bbox={"color": "white", "pad": 0})
    ax.plot([0, 1], [0, 1], "--", color=ORANGE, label="perfect calibration")
    ax.set(xlabel="confidence: probability of the predicted class", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="upper left")
    return figure
