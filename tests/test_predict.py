"""``predict`` writes a row for every picture, broken ones included, and without pictures for every test image."""

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEST, inside
from PIL import Image

from lenet_pl.__main__ import main
from lenet_pl.apps import plots, predict
from lenet_pl.datamodule import FashionMNIST

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 6)


def rows(path="predictions.csv"):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run_folders(tiny, tmp_path_factory):
    """The folder ``runs`` after a fit."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    with inside(folder, tiny) as patch:
        patch.setattr("lenet_pl.commands.report", lambda *args: None)
        assert main(["fit", *map(str, TINY)]) == 0
    return folder / "runs"


@pytest.fixture
def trained(cli, workdir, run_folders):
    """The command line in a folder with a finished run."""
    shutil.copytree(run_folders, workdir / "runs")
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
    assert ",".join(pictures[0]) == ("file,label,probability,second,second_probability,third,third_probability,error")
    assert [r["file"] for r in pictures] == [str(mine / f"{i:02}.png") for i in range(13)]
    for picture, tensor in zip(pictures[:12], tensors, strict=False):
        assert [picture[key] for key in ("label", "second", "third")] == [
            tensor[k] for k in ("label", "second", "third")
        ]
        for key in ("probability", "second_probability", "third_probability"):
            assert float(picture[key]) == pytest.approx(float(tensor[key]), abs=1e-5)
        assert picture["probability"] >= picture["second_probability"] >= picture["third_probability"]
    assert "not a picture" in pictures[12]["error"]
    assert [pictures[12][key] for key in list(pictures[12])[1:-1]] == [""] * 6
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


@pytest.mark.long
def test_one_process_writes_all_rows(trained):
    trained("predict", "--output", "one")
    code, _, err = trained("predict", "--output", "asked-for-two", "--trainer.devices", 2)
    assert (code, err) == (0, "")
    assert rows("one/predictions.csv") == rows("asked-for-two/predictions.csv")


AWKWARD = ["Ba$$in.png", "a[/b].png", ":smile:.png", "a\nb.png", "\x1b[31mred.png", b"\xff.png", "日本.png"]


def awkward(folder):
    """Writes a picture under each awkward name, and returns the names in the order of ``find``."""
    image = FashionMNIST("data", train=False).data[0].numpy()
    paths = [folder / os.fsdecode(name) for name in AWKWARD if name != "a[/b].png"]
    paths.append(folder / "a[" / "b].png")  # a file name cannot hold a slash: rich sees it in the path
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return sorted(paths)


def test_names_are_shown_as_they_are(trained, workdir, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "predictions", lambda rows, real=plots.predictions: drawn.extend(rows) or real(rows))
    paths = awkward(Path("mine"))
    Path("mine/[red]bad:smile:.png").write_bytes(b"no picture")
    code, out, err = trained("predict", "--data.images", "mine", "--output", "$x[/y]$")
    assert (code, err) == (0, "")
    assert "7 classified, 1 not" in out
    assert "written: $x[/y]$/predictions.csv and $x[/y]$/predictions.png" in out
    there = {row["file"]: row for row in rows("$x[/y]$/predictions.csv")}
    for path in paths:
        assert there[str(path).replace("\udcff", "\\xff")]["label"]
    assert not there["mine/[red]bad:smile:.png"]["label"]
    shown = ["mine/Ba$$in.png", "mine/a[/b].png", "mine/:smile:.png", r"mine/a\nb.png", r"mine/\x1b[31mred.png"]
    shown += [r"mine/\xff.png", "mine/日本.png", "mine/[red]bad:smile:.png"]
    rest = out.partition("$x[/y]$")[0] + "\n"
    assert [name for name in shown if f" {name}\n" not in rest and f" {name}: not a picture" not in rest] == []
    assert "\x1b" not in out
    titles = {Path(name).name for name in shown} - {"[red]bad:smile:.png"}
    assert {row.title for row in drawn} == titles
    with Image.open("$x[/y]$/predictions.png") as picture:
        assert picture.info["Software"] == "lenet_pl"


def test_a_name_of_any_length_is_shown_whole(trained, workdir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    name = f"mine/{'folder/' * 12}{'x' * 200}.png"
    Path(name).parent.mkdir(parents=True)
    Image.new("L", (28, 28), 200).save(name)
    Path("mine/broken.png").write_bytes(b"no picture")
    code, out, err = trained("predict", "--data.images", "mine")
    assert (code, err) == (0, "")
    assert f" {name}\n" in out
    assert " mine/broken.png: not a picture, or none of BMP, GIF, JPEG, PNG, TIFF, WEBP; convert it to PNG\n" in out


def test_the_picture_takes_a_title_for_text_and_shortens_it_in_the_middle():
    image = np.zeros((28, 28))
    top = [("Bag", 0.5), ("Coat", 0.3), ("Shirt", 0.2)]
    figure = plots.predictions([plots.Row(title, image, None, top) for title in (r"$\frac{$.png", "x" * 99 + ".png")])
    titles = [ax.get_title(loc="left") for ax in figure.axes[2::3]]
    assert titles == [r"$\frac{$.png", "x" * 40 + "…" + "x" * 15 + ".png"]
    figure.savefig(io.BytesIO())  # mathematics of that kind would raise


def test_a_picture_that_goes_away_meanwhile_costs_the_others_nothing(trained, workdir, monkeypatch):
    (workdir / "mine").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (28, 28), 200).save(workdir / "mine" / name)
    draw = predict._row
    monkeypatch.setattr(
        predict, "_row", lambda data, p, i: Path("mine/a.png").unlink(missing_ok=True) or draw(data, p, i)
    )
    code, out, err = trained("predict", "--data.images", "mine")
    assert (code, err) == (0, "")
    assert "2 classified, 0 not" in out


def test_a_picture_of_16_bits_is_shown_with_all_its_greys(trained, workdir, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "predictions", lambda rows, real=plots.predictions: drawn.extend(rows) or real(rows))
    ramp = np.linspace(0, 65535, 60 * 40).reshape(60, 40).astype(np.uint16)
    Image.fromarray(ramp).save("deep.png")
    assert trained("predict", "--data.images", "deep.png")[0] == 0
    grey = np.asarray(drawn[0].picture)[:, :, 0]
    assert np.abs(grey - ramp / 257.0).max() < 1


def test_its_own_pictures_are_not_classified_the_next_time(trained, workdir):
    Image.new("L", (28, 28), 200).save("mine.png")
    for _ in range(2):
        code, out, err = trained("predict", "--data.images", ".")
        assert (code, err) == (0, "")
    assert "written by lenet_pl" in out
    assert [row["file"] for row in rows() if "data" not in row["file"]] == ["mine.png"]


@pytest.mark.long
def test_pictures_are_drawn_without_pyplot(tmp_path):
    """A notebook's MPLBACKEND names a module that may be missing here."""
    code = "import sys, matplotlib.figure, pathlib; from lenet_pl.apps import plots\n"
    code += "pathlib.Path(sys.argv[1]).write_bytes(plots.png(matplotlib.figure.Figure()))\n"
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    env = os.environ | {"MPLBACKEND": "module://no_such_module"}
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], env=env, check=False).returncode == 0
    for path in Path(plots.__file__).parent.glob("*.py"):
        assert "matplotlib.pyplot" not in path.read_text(), path
