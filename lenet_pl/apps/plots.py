"""Draws the pictures of the report and of ``predict``: arrays in, a Figure out.

Nothing here uses pyplot, so the figures need no display and leave no global state behind.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike
from torch import Tensor

from lenet_pl.apps.pictures import MARK
from lenet_pl.atomic import write_atomic

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # from Okabe and Ito's palette for colour-blind readers
INK = "#1f2328"  # of text and lines only, because ``svg`` replaces it by the page's text colour
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.15,
    "image.interpolation": "none",  # pixels stay squares, in SVG too
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "svg.hashsalt": "lenet_pl",  # the same picture gives the same text
    "text.usetex": False,  # a user's matplotlibrc may ask for it
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "grid.color"), INK),
    **dict.fromkeys(("text.color", "xtick.color", "ytick.color"), INK),
}
_styled = matplotlib.rc_context(STYLE)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG with this program's mark, by which ``pictures.find`` passes it over.

    Raises:
        OSError: If the file cannot be written; an earlier one is then intact.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a file name may use any script
        figure.savefig(buffer, dpi=120, metadata={"Software": MARK})
    figure.set_layout_engine("none")  # the layout is done; ``svg`` would repeat it and take twice as long
    write_atomic(path, buffer.getvalue())


@_styled
def svg(figure: Figure) -> str:
    """Returns a figure as an ``<svg>`` element without background, in the text colour of the page around it."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    _, tag, rest = buffer.getvalue().partition("<svg")
    return (tag + rest).replace(INK, "currentColor")


class Row(NamedTuple):
    """One row of ``predictions``."""

    title: str  # shown as it is, and shortened in the middle above 60 characters
    picture: ArrayLike | None  # the user's picture, or None to leave its place empty
    seen: ArrayLike | None  # what the net saw, [28, 28], 0 to 255, or None
    top: Sequence[tuple[str, float]]  # classes with their probabilities, 0 to 1


@_styled
def predictions(rows: Sequence[Row]) -> Figure:
    """Draws for each row the picture, what the net saw, and bars for the probabilities."""
    figure = Figure(figsize=(7, 0.9 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1, 1, 4])
    for (left, middle, right), row in zip(axes, rows, strict=True):
        for ax, image in ((left, row.picture), (middle, row.seen)):
            ax.axis("off")
            if image is not None:
                ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        labels, probabilities = zip(*row.top, strict=True)
        right.barh(labels, probabilities, color=[BLUE, GREY, GREY])
        right.set(xlim=(0, 1), xticks=[])
        right.invert_yaxis()
        title = row.title if len(row.title) <= 60 else f"{row.title[:40]}…{row.title[-19:]}"
        right.set_title(title, fontsize=8, loc="left", parse_math=False)  # a file name may hold dollar signs
        right.tick_params(labelsize=8, length=0)
        right.spines[:].set_visible(False)
    return figure


@_styled
def samples(images: Tensor, captions: Sequence[str]) -> Figure:
    """Shows images in rows of five, each above its caption.

    Args:
        images: ``[N, 1, 28, 28]``, 0 (black) to 255.
        captions: N texts, all of the same number of lines.
    """
    columns, font, width = 5, 8.5, 7.5  # images, points, inches
    across = 28 + 8  # a cell with its margin, in pixels of the images
    caption_height = (1 + captions[0].count("\n")) * font / 72 * 1.35  # inches
    down = 29.5 + caption_height / (width / columns / across)
    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(width, width * rows * down / (columns * across)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * across + (across - 28) / 2, i // columns * down + 0.5
        extent = (left, left + 28, top + 28, top)
        ax.imshow(image[0].cpu().numpy(), cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto")
        ax.text(left + 14, top + 28.7, caption, ha="center", va="top", fontsize=font)
    ax.set(xlim=(0, columns * across), ylim=(rows * down, 0))
    return figure


@_styled
def curves(rows: Sequence[Mapping[str, str]], scored: int) -> Figure:
    """Draws loss and accuracy over the epochs.

    Args:
        rows: The rows of results.csv.
        scored: The epoch to mark, 1 for the first.
    """
    validated = [row for row in rows if row["val_acc"]]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, kind, title in ((left, "loss", "loss, nats"), (right, "acc", "accuracy")):
        for name, label, some, colour in (("train", "training", rows, BLUE), ("val", "validation", validated, ORANGE)):
            if some:
                epochs = [int(row["epoch"]) for row in some]
                values = [float(row[f"{name}_{kind}"]) for row in some]
                ax.plot(epochs, values, "o-", color=colour, label=label)
        ax.axvline(scored, color=INK, linestyle=":", label=f"scored: epoch {scored}")
        ax.set(xlabel="epoch", title=title, xlim=(0, int(rows[-1]["epoch"]) + 1))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid()
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@_styled
def confusion_matrix(counts: Tensor, names: Sequence[str]) -> Figure:
    """Draws a matrix of counts, each with its share of the row, which also gives the colour.

    Args:
        counts: ``[C, C]``, true class by row, predicted class by column.
        names: C class names.
    """
    matrix = counts.cpu().numpy()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    ax = figure.subplots()
    norm = PowerNorm(0.5, 0, 1)
    image = ax.imshow(share, cmap="cividis", norm=norm, aspect="auto")
    figure.colorbar(image, label="share of the true class", format=PercentFormatter(1), pad=0.02, aspect=40)
    for (row, column), count in np.ndenumerate(matrix):
        colour = "black" if norm(share[row, column]) > 0.55 else "white"
        text = f"{count}\n{share[row, column]:.1%}" if count else "0"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour, in_layout=False)
    ax.set_xticks(range(len(names)), names, fontsize=8.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="predicted class", ylabel="true class")
    return figure


@_styled
def reliability(confidence: Tensor, correct: Tensor, bins: int) -> Figure:
    """Draws the accuracy by confidence, above the number of images with each confidence.

    Args:
        confidence: Probability of the predicted class, ``[N]``, 0 to 1.
        correct: Whether the predicted class is right, ``[N]``.
        bins: Number of equal bins between 0 and 1.
    """
    values, hits = confidence.cpu().numpy(), correct.float().cpu().numpy()
    counts, edges = np.histogram(values, bins, (0, 1))
    filled = counts > 0
    accuracy = np.histogram(values, bins, (0, 1), weights=hits)[0][filled] / counts[filled]
    mean_confidence = np.histogram(values, bins, (0, 1), weights=values)[0][filled] / counts[filled]
    middles, width = (edges[:-1] + edges[1:]) / 2, 0.92 / bins
    figure = Figure(figsize=(6, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.bar(middles[filled], accuracy, width, color=BLUE, label="this net")
    top.plot(mean_confidence, mean_confidence, "o--", color=ORANGE, label="perfect calibration")
    top.set(ylabel="accuracy", ylim=(0, 1.02))
    top.legend(loc="upper left")
    bottom.bar(middles, counts, width, color=BLUE)
    bottom.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    bottom.set(yscale="log", xlim=(0, 1), ylim=(0.7, None))
    for ax in (top, bottom):
        ax.grid(axis="y")
    for axis in (top.yaxis, bottom.xaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return figure


@_styled
def robustness(panels: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Draws the accuracy against damage, one panel beside the other.

    Args:
        panels: For each axis label its lines by name, and for each line the accuracy (0 to 1) by the damage.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(panels), sharey=True)
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        for (name, points), look in zip(lines.items(), ((BLUE, "o-"), (ORANGE, "s--")), strict=False):
            ax.plot(list(points), list(points.values()), look[1], color=look[0], label=name)
        ax.set(xlabel=label, ylim=(0, 1))
        ax.grid()
        ax.legend(loc="lower center")
    axes[0].set_ylabel("accuracy")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    return figure
