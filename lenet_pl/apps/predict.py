"""What ``predict`` shows and leaves: a table, predictions.csv and predictions.png."""

import csv
import io
from pathlib import Path

import rich
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lenet_pl.apps import pictures, plots
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.errors import UsageError

SHOWN = 24  # rows of the table and of the picture; predictions.csv holds all


class NothingClassified(RuntimeError):  # noqa: N818 (says it better)
    """No picture could be read."""


def write(folder: Path, data: FashionMNISTDataModule, probabilities: Tensor) -> None:
    """Prints the table and writes both files.

    Args:
        folder: Where they go.
        data: The datamodule that has just handed out the pictures, or the test images.
        probabilities: ``[N, 10]``, in its order.

    Raises:
        NothingClassified: If no picture could be read; predictions.csv is written all the same.
        UsageError: If ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output={folder}: expected a folder, found a file")
    names = [str(file) for file in data.files] or [f"test image {i}" for i in range(len(probabilities))]
    errors = {str(file): text for file, text in data.errors.items()}
    values, classes = probabilities.topk(3)  # [N, 3] each
    top3 = [
        [(FashionMNIST.classes[c], v) for c, v in zip(*row, strict=True)]
        for row in zip(classes.tolist(), values.tolist(), strict=True)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", "probability", "second", "third", "error"])
    table = Table("file", "label", "second", "third")
    for i, (name, top) in enumerate(zip(names, top3, strict=True)):
        error = errors.get(name, "")
        (first, p), (second, _), (third, _) = top
        writer.writerow([name, "", "", "", "", error] if error else [name, first, f"{p:.6f}", second, third, ""])
        if i < SHOWN:
            cells = (f"[red]{error}", "", "") if error else (f"{label} {share:.1%}" for label, share in top)
            table.add_row(name, *cells)
    write_atomic(folder / "predictions.csv", text.getvalue().encode())
    good = [i for i, name in enumerate(names) if name not in errors]
    if good:
        plots.save(_figure(data, names, top3, good[:SHOWN]), folder / "predictions.png")
    rich.print(table)
    rest = f"; the table shows the first {SHOWN}" if len(names) > SHOWN else ""
    print(f"{len(good)} classified, {len(errors)} not{rest}\nall: {folder / 'predictions.csv'}")
    if not good:
        raise NothingClassified(f"none of the {len(names)} files is a readable picture; the reasons stand above")


def _figure(
    data: FashionMNISTDataModule, names: list[str], top3: list[list[tuple[str, float]]], rows: list[int]
) -> Figure:
    """Draws for each row the picture, what the net saw, and the three probabilities."""
    figure = Figure(figsize=(7, 0.9 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1, 1, 4])
    for (left, middle, right), i in zip(axes, rows, strict=True):
        if data.files:
            picture = pictures.load(data.files[i])
            seen = pictures.to_uint8(picture, data.preprocess)[0]
            picture.thumbnail((200, 200))
            left.imshow(picture.convert("RGBA"))
        else:
            assert data.test_set is not None
            seen = data.test_set[0][i, 0]
        middle.imshow(seen.numpy(), cmap="gray", vmin=0, vmax=255)
        labels, shares = zip(*top3[i], strict=True)
        right.barh(labels, shares, color=["#0072B2", "#999999", "#999999"])
        right.set(xlim=(0, 1), xticks=[])
        right.invert_yaxis()
        right.set_title(Path(names[i]).name, fontsize=8, loc="left")
        right.tick_params(labelsize=8, length=0)
        right.spines[:].set_visible(False)
        for ax in (left, middle):
            ax.axis("off")
    return figure
