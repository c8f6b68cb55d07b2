"""The pictures of a run: arrays in, Figure out, no global state."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from lenet_pl.checkpoint import write_atomic

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, told apart by colour-blind people too


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    write_atomic(path, buffer.getvalue())


def samples(images: Tensor, names: Sequence[str]) -> Figure:
    """Shows images with their class names.

    Args:
        images: ``[N, 1, 28, 28]``, any scale.
        names: N names.
    """
    figure = Figure(figsize=(7.5, 1.55 * -(-len(names) // 5)), layout="constrained")
    axes = figure.subplots(-(-len(names) // 5), 5, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, name in zip(axes.flat, images, names, strict=False):
        ax.imshow(image[0].cpu().numpy(), cmap="gray_r")
        ax.set_title(name, fontsize=9)
    return figure


def curves(rows: Sequence[dict[str, str]]) -> Figure:
    """Draws loss and accuracy over the epochs and marks the one with the highest validation accuracy.

    Args:
        rows: Those of results.csv.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    val = [row for row in rows if row["val_acc"]]
    best = max(val, key=lambda row: float(row["val_acc"])) if val else None
    for ax, kind, title, scale in zip(
        figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy, %"), (1, 100), strict=True
    ):
        for name, some, colour in (("train", rows, BLUE), ("val", val, ORANGE)):
            if some:
                x = [int(row["epoch"]) for row in some]
                y = [scale * float(row[f"{name}_{kind}"]) for row in some]
                ax.plot(x, y, color=colour, marker="o", markersize=3, label={"val": "validation"}.get(name, name))
        if best:
            ax.axvline(int(best["epoch"]), color="grey", linestyle=":", label=f"best, epoch {best['epoch']}")
        ax.set(xlabel="epoch", title=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    return figure


def confusion_matrix(counts: Tensor, names: Sequence[str]) -> Figure:
    """Draws counts, coloured by their share of the row.

    Args:
        counts: ``[C, C]``, true class by row, predicted class by column.
        names: C class names.
    """
    matrix = counts.cpu().numpy()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(share, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class")
    for (row, column), count in np.ndenumerate(matrix):
        ax.text(
            column,
            row,
            count,
            ha="center",
            va="center",
            fontsize=8,
            color="black" if share[row, column] > 0.5 else "white",
        )
    ticks = range(len(names))
    ax.set_xticks(ticks, names, rotation=45, ha="right")
    ax.set_yticks(ticks, names)
    ax.set(xlabel="predicted", ylabel="true")
    return figure
