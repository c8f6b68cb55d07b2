"""What ``predict`` shows and writes: a table on the screen, predictions.csv and predictions.png."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lenet_pl.apps import plots
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.errors import Failure, UsageError
from lenet_pl.names import decoded, one_line
from lenet_pl.pictures import files, prepare

SHOWN = 24  # rows of the table and of the picture; predictions.csv holds all
COLUMNS = ("file", "label", "probability", "second", "second_probability", "third", "third_probability", "error")


class Prediction(NamedTuple):
    """The net's answer for one picture."""

    name: str  # the file's, or "test image 0" and so on
    top: list[tuple[str, float]]  # the three most probable classes with their probabilities (0 to 1), in order
    error: str  # why the picture could not be read; empty if it could


def write(folder: Path, data: FashionMNISTDataModule, probabilities: Tensor) -> None:
    """Prints the table, and writes predictions.csv and predictions.png into ``folder``, which is made if it is missing.

    ``data`` has handed out the pictures or the test images, and ``probabilities``, ``[N, 10]``, are in its order.

    Raises:
        Failure: If no picture could be read; predictions.csv then holds the reasons.
        UsageError: If ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output={one_line(folder)}: expected a folder, found a file")
    predictions = _predictions(data, probabilities)
    classified = [i for i, prediction in enumerate(predictions) if not prediction.error]
    table, picture = folder / "predictions.csv", folder / "predictions.png"
    write_atomic(table, _csv(predictions).encode())
    written = [table]
    if classified:
        rows = [_row(data, predictions[i], i) for i in classified[:SHOWN]]
        write_atomic(picture, plots.png(plots.predictions(rows)))
        written.append(picture)
    else:
        picture.unlink(missing_ok=True)  # it would show other pictures
    print(_table(predictions[:SHOWN]))
    rest = f"; the table shows the first {SHOWN}" if len(predictions) > SHOWN else ""
    print(f"{len(classified)} classified, {len(predictions) - len(classified)} not{rest}")
    print(f"written: {' and '.join(map(one_line, written))}")
    if not classified:
        raise Failure(f"none of the {len(predictions)} files is a readable picture; see the reasons above")


def _predictions(data: FashionMNISTDataModule, probabilities: Tensor) -> list[Prediction]:
    values, indices = probabilities.topk(3)  # [N, 3] each
    predictions = []
    for i, (top_values, top_indices) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
        labels = [FashionMNIST.classes[index] for index in top_indices]
        name, error = f"test image {i}", ""
        if data.files:
            name, error = str(data.files[i]), data.errors.get(data.files[i], "")
        predictions.append(Prediction(name, list(zip(labels, top_values, strict=True)), error))
    return predictions


def _csv(predictions: list[Prediction]) -> str:
    """Returns a row for each picture; one that could not be read has empty fields, and the reason in the last."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, top, error in predictions:
        answer: list[str] = []
        for label, probability in top:
            answer += [label, f"{probability:.6f}"]
        if error:
            answer = [""] * len(answer)
        writer.writerow([decoded(name), *answer, decoded(error)])
    return text.getvalue()


def _table(predictions: list[Prediction]) -> str:
    """Returns a line for each picture; the file stands last, so that a name of any length is shown whole."""
    lines = [f"{'label':<20}{'second':<20}{'third':<20}file"]
    for name, top, error in predictions:
        if error:
            lines.append(f"{'not classified':<60}{one_line(name)}: {one_line(error)}")
        else:
            cells = [f"{label} {probability:.1%}" for label, probability in top]
            lines.append("".join(f"{cell:<20}" for cell in cells) + one_line(name))
    return "\n".join(lines)


def _row(data: FashionMNISTDataModule, prediction: Prediction, i: int) -> plots.Row:
    """Gathers a picture, what the net saw of it, and the net's answer."""
    title = one_line(Path(prediction.name).name)
    if not data.files:
        return plots.Row(title, None, data.test_set[0][i, 0].numpy(), prediction.top)
    try:
        picture = files.load(data.files[i])
    except (OSError, ValueError):  # it was readable a moment ago and has changed since
        return plots.Row(title, None, None, prediction.top)
    seen = prepare.to_uint8(picture)[0].numpy()
    picture = prepare.flatten(picture)
    picture.thumbnail((200, 200))
    return plots.Row(title, np.asarray(picture), seen, prediction.top)
