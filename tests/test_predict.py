"""``predict``: a row for every picture, broken ones included, and the test set without pictures."""

import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import TEST
from PIL import Image

from lenet_pl.datamodule import FashionMNIST

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 6)


def rows(path="predictions.csv"):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def trained(cli):
    code, _, err = cli("fit", *TINY)
    assert code == 0, err
    return cli


def test_pictures_get_the_labels_of_the_tensors_they_were_made_from(trained, workdir):
    data = FashionMNIST("data", train=False)
    mine = workdir / "mine"
    mine.mkdir()
    for i in range(12):
        Image.fromarray(data.data[i].numpy()).save(mine / f"{i:02}.png")
    (mine / "12.png").write_bytes(b"no picture")
    code, out, err = trained("predict", "--data.images", mine, "--output", "here")
    assert (code, err) == (0, "")
    trained("predict", "--output", "all")
    pictures, tensors = rows("here/predictions.csv"), rows("all/predictions.csv")
    assert list(pictures[0]) == ["file", "label", "probability", "second", "third", "error"]
    assert [r["file"] for r in pictures] == [str(mine / f"{i:02}.png") for i in range(13)]
    for picture, tensor in zip(pictures[:12], tensors, strict=False):
        assert (picture["label"], picture["second"]) == (tensor["label"], tensor["second"])
        assert float(picture["probability"]) == pytest.approx(float(tensor["probability"]), abs=1e-5)
    assert "not a picture" in pictures[12]["error"]
    assert pictures[12]["label"] == ""
    assert "12 classified, 1 not" in out
    with Image.open("here/predictions.png") as picture:
        assert picture.size[0] > 500


def test_without_pictures_the_test_set_is_classified(trained):
    code, _, err = trained("predict")
    assert (code, err) == (0, "")
    data = FashionMNIST("data", train=False)
    right = [row["label"] == data.classes[label] for row, label in zip(rows(), data.targets, strict=True)]
    assert len(right) == TEST
    assert np.mean(right) > 0.5


def test_no_readable_picture_is_an_error(trained, workdir):
    (workdir / "a.png").write_bytes(b"")
    code, _, err = trained("predict", "--data.images", "a.png")
    assert code == 1
    assert "none of the 1 files" in err
    assert rows()[0]["error"]


def test_a_missing_folder_is_wrong_use(trained):
    code, _, err = trained("predict", "--data.images", "nowhere")
    assert code == 2
    assert "nowhere" in err


def test_one_process_writes_all_rows(trained):
    trained("predict", "--output", "one")
    code, _, err = trained("predict", "--output", "asked-for-two", "--trainer.devices", 2)
    assert (code, err) == (0, "")
    assert rows("one/predictions.csv") == rows("asked-for-two/predictions.csv")
