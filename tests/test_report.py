"""The report: its numbers, its pictures, and that it needs nothing from outside, in a real browser too."""

import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import TEST, as_pretrained, inside
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from lenet_pl import FashionMNISTDataModule, LitLeNet
from lenet_pl.__main__ import main
from lenet_pl.apps import article, demo, plots, report
from lenet_pl.apps.report import NAMES, score
from lenet_pl.lenet import layers

ALWAYS = {"samples", "confusion_matrix", "reliability"}
SETTINGS = {"data.val_size": 60, "data.batch_size": 8, "data.flip": True, "model.dropout": 0.1}
SETTINGS |= {"model.schedule": "one_cycle", "model.lr": 0.0005, "trainer.max_epochs": 2}


def load(path):
    """Returns model and data as the command line makes them from a checkpoint."""
    state = torch.load(path, weights_only=True)
    model = LitLeNet(**state["hyper_parameters"])
    model.load_state_dict(state["state_dict"])
    return model.eval(), FashionMNISTDataModule(**state["datamodule_hyper_parameters"])


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A current folder with the tiny data, for all tests of this file."""
    folder = tmp_path_factory.mktemp("report")
    with inside(folder, tiny):
        yield folder


@pytest.fixture(scope="module")
def ckpt(place):
    torch.set_num_threads(1)
    flags = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value).lower())]
    assert main(["fit", *flags, "--seed_everything", "5"]) == 0
    return place / "runs/lenet/version_0/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def page(ckpt):
    return ckpt.parents[1] / "report.html"  # of the end of fit


class Parser(HTMLParser):
    """Collects what a page refers to, and the text of its table cells and of its terms."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.rows, self.cell = set(), [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "poster", "action", "background")
        self.links += [value for name, value in attrs if name in names]
        if tag in ("tr", "div"):
            self.rows.append([])
        self.cell = [] if tag in ("td", "th", "dt", "dd") else self.cell

    def handle_data(self, data):
        if self.cell is not None:
            self.cell.append(data)

    def handle_endtag(self, tag):
        if tag in ("td", "th", "dt", "dd"):
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None

    def row(self, first):
        return next(row[1:] for row in self.rows if row[:1] == [first])


def truth(ckpt):
    """Returns probabilities and labels of the test images, worked out apart."""
    model, data = load(ckpt)
    data.setup("test")
    x = (data.test_set[0].float() / 255 - data.mean) / data.std
    with torch.inference_mode():
        return model(x).softmax(1).numpy(), data.test_set[1].numpy()


def test_the_pictures_are_there_and_drawn(page):
    for name in ALWAYS | {"curves", "mistakes"}:
        with Image.open(page.parent / f"{name}.png") as picture:
            assert min(picture.size) > 200, name
            assert len(picture.convert("RGB").getcolors(10**6)) > 10, name
    assert not list(page.parent.glob(".*"))


def test_the_page_refers_to_nothing_outside(page):
    text = page.read_text()
    parser = Parser(text)
    assert parser.links
    assert all(link.startswith(("data:", "#")) for link in parser.links)
    assert not parser.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    for name in ALWAYS | {"curves", "mistakes"}:  # the page holds the very pictures
        assert base64.b64encode((page.parent / f"{name}.png").read_bytes()).decode() in text


def test_the_scores_are_those_of_test_json(page, ckpt):
    parser, (probabilities, labels) = Parser(page.read_text()), truth(ckpt)
    result = json.loads((page.parent / "test.json").read_text())
    numbers = {row[0]: row[1] for row in parser.rows if len(row) == 2}
    assert numbers[f"test accuracy, {TEST} images"] == f"{result['test_acc']:.2%}"
    assert numbers["test loss, nats"] == f"{result['test_loss']:.4f}"
    for label, name in enumerate(NAMES):
        there = labels == label
        recall = (probabilities.argmax(1) == label)[there].mean()
        assert parser.row(name)[1::2] == [f"{recall:.2%}", str(there.sum())]


def test_the_scores_follow_from_their_definitions():
    logits = 2 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    labels = (logits + logits.flip(0)).argmax(1)
    scores, probabilities, labels = score(logits, labels), logits.softmax(1).numpy(), labels.numpy()
    predicted, sure = probabilities.argmax(1), probabilities.max(1)
    for label, (name, *found) in enumerate(scores["classes"]):
        hits = ((predicted == label) & (labels == label)).sum()
        called, there = (predicted == label).sum(), (labels == label).sum()
        assert name == NAMES[label]
        assert found == pytest.approx([hits / called, hits / there, 2 * hits / (called + there), there])
    bins = np.ceil(sure * 15)
    gaps = [abs((predicted == labels)[bins == b].sum() - sure[bins == b].sum()) for b in range(1, 16)]
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / 500)
    assert scores["accuracy"] == pytest.approx((predicted == labels).mean())


@pytest.mark.long
def test_what_the_pictures_get(ckpt, monkeypatch, page):
    given = {}

    def spy(name, draw):
        def spied(*args, **options):
            given.setdefault(name, []).append(args)
            return draw(*args, **options)

        monkeypatch.setattr(plots, name, spied)

    for name in ("samples", "confusion_matrix", "curves"):
        spy(name, getattr(plots, name))
    monkeypatch.setattr(report, "write_atomic", lambda *args: None)  # the page of fit stays
    model, data = load(ckpt)
    report.write(ckpt, model, data)
    probabilities, labels = truth(ckpt)
    predicted = probabilities.argmax(1)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predicted), 1)
    assert np.array_equal(given["confusion_matrix"][0][0], counts)
    (first, names), (_, mistakes) = given["samples"]
    assert torch.equal(first, data.train_set[0][:25])
    assert len(names) == 25
    sure = sorted((p.max() for p, k, y in zip(probabilities, predicted, labels, strict=True) if k != y), reverse=True)
    assert [float(c.split("%")[0].split()[-1]) for c in mistakes] == [round(100 * float(s), 1) for s in sure[:25]]
    state = torch.load(ckpt, weights_only=True)
    assert given["curves"][0][1] == state["epoch"] + 1


def test_the_article_beside(page):
    parser = Parser(page.read_text())
    assert parser.row("training images")[:2] == ["60,000", "270"]
    assert parser.row("net") == ["107,786 parameters", "107,786 parameters", "the same"]
    assert parser.row("learning rate")[1] == "0.0005 at the peak of one cycle"
    assert parser.row("Adam's ε")[:2] == ["1e-7", "1e-8"]
    assert parser.row("against overfitting")[1] == "mirrored images, dropout 0.1"
    assert all(row[-1] for row in parser.rows if len(row) == 4)  # no difference without a word on it
    assert parser.row("training loss")[0] == "0.0458"
    for word in ("Pavan Vadapalli", "Everything You Need to Know", "upGrad blog", "25 February 2021"):
        assert word in page.read_text()


def test_a_checkpoint_alone_is_enough(ckpt, place):
    folder = place / "<b>x&y"  # what a name holds is text
    folder.mkdir()
    page = report.write(shutil.copy(ckpt, folder / "best.ckpt"), *load(ckpt))
    text = page.read_text()
    assert page.parent == folder
    assert {path.stem for path in folder.glob("*.png")} == ALWAYS | {"mistakes"}
    assert "the checkpoint lies in no run folder" in text
    assert "&lt;b&gt;x&amp;y" in text
    assert "<b>" not in text


@pytest.mark.long
def test_the_weights_of_the_package_are_reported_in_the_current_folder(ckpt, tmp_path, monkeypatch, tiny, capsys):
    (tmp_path / "package").mkdir()
    (tmp_path / "results.csv").write_text("epoch,step\n1,1\n")  # of something else
    path = as_pretrained(ckpt, tmp_path / "package", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "serve", lambda model, data, port: None)
    for command in ("report", "predict", "demo"):
        assert main([command, "--ckpt_path", "pretrained", "--data.data_dir", str(tiny[0])]) == 0
    assert capsys.readouterr().out.startswith(f"checkpoint: {path}\nreport: report.html\n")
    assert list(path.parent.iterdir()) == [path]
    written = {file.name for file in tmp_path.glob("*.*")}
    assert written > {f"{name}.png" for name in ALWAYS | {"mistakes"}} | {"report.html", "predictions.csv"}
    assert "curves.png" not in written
    assert "the checkpoint lies in no run folder" in Path("report.html").read_text()


RESULTS = [
    {"epoch": "1", "train_loss": "0.5", "train_acc": "0.8", "val_acc": "0.85", "seconds": "3"},
    {"epoch": "2", "train_loss": "0.3", "train_acc": "0.9", "val_acc": "0.88", "seconds": "4"},
    {"epoch": "3", "train_loss": "0.2", "train_acc": "0.95", "val_acc": "0.87", "seconds": "5"},
]


def article_rows(model, data, results, train_images=55_000):
    """Returns the table of a run whose second epoch is scored, on 10,000 test images."""
    data.train_set = (None, range(train_images))
    data.test_set = (None, range(10_000))
    return {what: rest for what, *rest in article.rows(model.hparams, data, results, 2, 0.91)}


def test_the_article_table_says_what_differs():
    rows = article_rows(LitLeNet(), FashionMNISTDataModule(), RESULTS)
    assert rows["test accuracy"][:2] == ["90.67%", "91.00%"]
    assert "+0.33 percentage points" in rows["test accuracy"][2]
    assert "standard error of 0.29 points" in rows["test accuracy"][2]
    assert rows["training accuracy"][:2] == ["98.29%", "90.00%"]  # of the scored epoch
    assert "98.50%" in rows["training accuracy"][2]
    assert rows["training loss"][:2] == ["0.0458", "0.3000"]
    assert "0.0421" in rows["training loss"][2]
    assert rows["training images"][:2] == ["60,000", "55,000"]
    assert rows["scored epoch"][:2] == ["30 of 30", "2 of 3"]
    assert rows["pixels"][1] == "(x / 255 − 0.286) / 0.353"
    assert rows["batch size"] == ["32", "32", "the same"]
    assert rows["learning rate"] == ["0.001", "0.001", "the same"]
    assert rows["Adam's ε"][:2] == ["1e-7", "1e-8"]
    assert rows["first weights"][1] == "uniform within ±1/√(inputs), biases too"
    assert rows["net"][2] == rows["against overfitting"][2] == "the same"
    assert rows["seconds an epoch"][:2] == ["4", "4.0"]


def test_the_article_table_of_another_recipe():
    model = LitLeNet("classic", dropout=0.05, init="orthogonal", schedule="one_cycle", weight_decay=0.1)
    model.hparams["label_smoothing"] = 0.1
    data = FashionMNISTDataModule(flip=True, shift=1, mean=0.0, std=1.0, val_size=0)
    rows = article_rows(model, data, RESULTS[:2], 60_000)
    assert rows["training images"][2] == rows["pixels"][2] == "the same"
    assert rows["scored epoch"][1] == "2 of 2"
    assert rows["learning rate"][1] == "0.001 at the peak of one cycle"
    assert rows["first weights"][1] == "orthogonal with gain √2, biases zero"
    assert rows["net"][:2] == ["107,786 parameters", "61,706 parameters"]
    assert "net of 1998" in rows["net"][2]
    measures = "mirrored images, shifts of up to 1 pixels, dropout 0.05, label smoothing 0.1, weight decay 0.1"
    assert rows["against overfitting"][1] == measures


def test_the_article_table_without_results():
    rows = article_rows(LitLeNet(), FashionMNISTDataModule(), [])
    assert not {"training accuracy", "training loss", "seconds an epoch"} & rows.keys()
    assert rows["scored epoch"][1] == "2"


@pytest.mark.long
def test_a_path_is_shown_whatever_its_bytes(ckpt, place):
    folder = place / os.fsdecode(b"a\xff\n $[/b]")
    folder.mkdir(parents=True)
    text = report.write(shutil.copy(ckpt, folder / "best.ckpt"), *load(ckpt)).read_text()
    assert r"a\xff\n $[/b]/best.ckpt</code>, epoch" in text


@pytest.mark.long
def test_a_net_without_mistakes(ckpt, place, monkeypatch):
    model, data = load(ckpt)
    data.setup("test")
    perfect = 30 * torch.nn.functional.one_hot(data.test_set[1], 10).float()
    monkeypatch.setattr(report, "classify_test_images", lambda *_: (*data.test_set, perfect))
    (place / "perfect").mkdir()
    page = report.write(shutil.copy(ckpt, place / "perfect/best.ckpt"), model, data)
    assert "There are none: every test image" in page.read_text()
    assert not (page.parent / "mistakes.png").exists()


@pytest.mark.parametrize(("variant", "total"), [("article", 107_786), ("classic", 61_706)])
def test_layers(variant, total):
    random = torch.get_rng_state()
    rows = layers(variant)
    assert torch.equal(torch.get_rng_state(), random)
    assert rows[0] == ("Conv2d", "[N, 6, 28, 28]", 156)
    assert rows[-1] == ("Linear", "[N, 10]", 850)
    assert sum(n for *_, n in rows) == total


def figures():
    """Each picture with what makes it crowded: the longest names, the largest counts, one epoch."""
    image = torch.full((1, 28, 28), 100, dtype=torch.uint8)
    row = dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc"), "0.5")
    confidence = torch.linspace(0, 1, 101)
    yield "samples", plots.samples(image.expand(12, 1, 28, 28), ["T-shirt/top 100.0%\nis: T-shirt/top"] * 12)
    yield "one_epoch", plots.curves([{"epoch": "1", **row}], 1)
    yield "curves", plots.curves([{"epoch": str(e), **row} for e in range(1, 201)], 200)
    yield "confusion_matrix", plots.confusion_matrix(torch.full((10, 10), 10_000), NAMES)
    yield "reliability", plots.reliability(confidence, confidence > 0.5, 15)


@pytest.mark.long
def test_no_labels_overlap_or_are_cut_off(monkeypatch):
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, renderer: drawn.append(self) or draw(self, renderer))
    for name, figure in figures():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # finds the places
        figure.set_layout_engine("none")
        drawn.clear()
        canvas.draw()
        boxes = [text.get_window_extent().extents for text in drawn if text.get_visible() and text.get_text()]
        left, low, right, high = np.array(boxes).T
        assert len(boxes) > 5, name
        assert min(left.min(), low.min()) >= -1, name
        assert right.max() <= figure.bbox.x1 + 1, name
        assert high.max() <= figure.bbox.y1 + 1, name
        beside = (left[:, None] > right - 2) | (low[:, None] > high - 2)  # [n, n]: right of the other, or above
        assert (beside | beside.T | np.eye(len(boxes), dtype=bool)).all(), name


def test_confusion_matrix_shows_counts_and_shares():
    figure = plots.confusion_matrix(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["3\n75.0%", "1\n25.0%", "0", "0"]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_browser_draws_it_all_and_fetches_nothing(page, browser, scheme, width):
    requests, complaints = [], []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("request", lambda request: None if request.url.startswith("data:") else requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    pictures = tab.evaluate(
        """async () => Promise.all([...document.images].map(async image => {
          await image.decode()
          const box = image.getBoundingClientRect()
          return {pixels: image.naturalWidth, width: box.width, height: box.height, alt: image.alt}
        }))"""
    )
    assert len(pictures) == len(ALWAYS) + 2
    text, paper = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (text, paper)]
    assert light[0] < 0.3
    assert light[1] > 0.9
    for picture in pictures:
        assert picture["width"] > 300
        assert picture["height"] > 150
        assert picture["pixels"] > 500
        assert picture["alt"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert (requests, complaints) == ([page.as_uri()], [])
    tab.close()


def test_a_users_matplotlibrc_changes_no_picture():
    images = torch.randint(0, 256, (5, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    before = plots.png(plots.samples(images, list("abcde")))
    theirs = {"image.interpolation": "bicubic", "font.family": "cursive", "savefig.transparent": True}
    with matplotlib.rc_context(theirs):
        assert plots.png(plots.samples(images, list("abcde"))) == before
