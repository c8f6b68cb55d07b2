"""What a checkpoint is worth, on one page: ``report.html`` and its pictures."""

import contextlib
import inspect
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from lightning.pytorch import Trainer
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional import classification as metrics
from torchvision.transforms.v2.functional import InterpolationMode, affine

from lenet_pl import __version__, checkpoint, runs
from lenet_pl.apps import plots
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNIST, FashionMNISTDataModule
from lenet_pl.lenet import layers
from lenet_pl.loader import EVAL_BATCH_SIZE, generator, normalise
from lenet_pl.module import LitLeNet

HERE = Path(__file__).parent
NAMES: list[str] = FashionMNIST.classes
TRAINER = {"max_epochs": 30, "num_sanity_val_steps": 0, "log_every_n_steps": 1}  # the command line's own defaults


def write(ckpt_path: Path, model: LitLeNet, data: FashionMNISTDataModule) -> Path:
    """Writes the report on a checkpoint into its run folder, or beside it where it lies outside one.

    Uses results.csv and config.yaml if they are there; the page says so where they are not.

    Args:
        ckpt_path: The checkpoint's file.
        model: The checkpoint's module, on any device; left in evaluation mode.
        data: With the checkpoint's settings; reads the images it has not read yet.

    Returns:
        The page, ``report.html``.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        DataError: If the images cannot be had.
        OSError: If a file cannot be written; each is whole or as it was before.
    """
    state = checkpoint.load(ckpt_path)
    folder = runs.folder_of(ckpt_path) or ckpt_path.parent
    rows, epoch = runs.read_results(folder), state["epoch"] + 1
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text("utf-8")) if config.is_file() else {}
    trainer = settings.get("trainer", {})
    data.seed = state["seed"]
    if data.train_set is None or data.test_set is None:
        data.prepare_data()
        data.setup("validate")  # reads the training images too
        data.setup("test")
    assert data.train_set is not None
    assert data.test_set is not None
    images, labels = data.test_set
    logits = _logits(model.eval().float(), data, images)
    figures = _figures(model, data, logits)
    if rows:
        figures["curves"] = plots.curves(rows, epoch)
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png")
    page = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    html = page.render(
        path=ckpt_path,
        state=state,
        epoch=epoch,
        rows=rows,
        row=next((row for row in rows if int(row["epoch"]) == epoch), None),
        trainer=trainer,
        pictures={name: Markup(plots.svg(figure)) for name, figure in figures.items()},
        scores=_scores(logits, labels),
        layers=layers(model.net),
        model=model.hparams,
        data=data.hparams,
        train_images=len(data.train_set[1]),
        differences=[
            *_differences("model", LitLeNet, model.hparams),
            *_differences("data", FashionMNISTDataModule, data.hparams),
            *_differences("trainer", Trainer, trainer, TRAINER),
        ],
        made=_made(model.device),
    )
    write_atomic(folder / "report.html", html.encode())
    return folder / "report.html"


@torch.inference_mode()
def _logits(model: LitLeNet, data: FashionMNISTDataModule, images: Tensor) -> Tensor:
    """Returns the logits of uint8 images, ``[N, 10]``, on the CPU."""
    parts = (normalise(part.to(model.device), data.mean, data.std) for part in images.split(EVAL_BATCH_SIZE))
    return torch.cat([model(part).cpu() for part in parts])


def _scores(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Returns accuracy, loss, expected calibration error, and precision, recall, F1 and size of each class."""
    precision, recall, f1 = (
        score(logits, labels, len(NAMES), average="none").tolist()
        for score in (metrics.multiclass_precision, metrics.multiclass_recall, metrics.multiclass_f1_score)
    )
    return {
        "n": len(labels),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "ece": metrics.multiclass_calibration_error(logits, labels, len(NAMES), n_bins=15).item(),
        "classes": list(zip(NAMES, precision, recall, f1, labels.bincount(minlength=10).tolist(), strict=True)),
        "f1": sum(f1) / len(f1),
    }


def _figures(model: LitLeNet, data: FashionMNISTDataModule, logits: Tensor) -> dict[str, Figure]:
    """Draws everything but the curves; the names are the files'."""
    assert data.test_set is not None
    images, labels = data.test_set
    confidence, predicted = logits.softmax(1).max(1)
    correct = predicted == labels
    said, true = ([NAMES[label] for label in some] for some in (predicted, labels))
    first_images, first_labels = data.first_images(25)
    few, few_labels = images[:500], labels[:500]
    damage = _robustness(few, lambda x: (_logits(model, data, x).argmax(1) == few_labels).double().mean().item())
    first: Any = model.net.features[0]
    with torch.inference_mode():
        responses = first(normalise(images[:1].to(model.device), data.mean, data.std))[0]
    shown: list[int | None] = []  # a column for each class: two right above two wrong, or gaps
    for right, place in ((True, 0), (True, 1), (False, 0), (False, 1)):
        for label in range(len(NAMES)):
            found = ((labels == label) & (correct == right)).nonzero().flatten().tolist()
            shown.append(found[place] if place < len(found) else None)
    figures = {
        "samples": plots.samples(first_images, [NAMES[label] for label in first_labels]),
        "confusion_matrix": plots.confusion_matrix(
            metrics.multiclass_confusion_matrix(logits, labels, len(NAMES)), NAMES
        ),
        "reliability": plots.reliability(confidence, correct),
        "right_and_wrong": plots.samples(
            [None if i is None else images[i] for i in shown],
            ["" if i is None else f"{'✓' if correct[i] else '✗'} {said[i]}" for i in shown],
            columns=len(NAMES),
        ),
        "robustness": plots.robustness(damage),
        "filters": plots.filters(first.weight.detach(), images[0], responses),
    }
    wrong = (~correct).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:25].tolist()
    if worst:
        captions = [f"{said[i]} {confidence[i]:.1%}\nis: {true[i]}" for i in worst]
        figures["mistakes"] = plots.samples(images[worst], captions)
    return figures


def _robustness(images: Tensor, score: Callable[[Tensor], float]) -> dict[str, dict[str, dict[float, float]]]:
    """Scores rotated, slanted, shifted and noisy copies of the images, for ``plots.robustness``."""

    def moved(angle: float = 0, right: int = 0, down: int = 0, slant: float = 0) -> Tensor:
        copy: Tensor = affine(images, angle, [right, down], 1.0, [slant, 0.0], InterpolationMode.BILINEAR)
        return copy

    noise = torch.randn(images.shape, generator=generator(0))
    angles, pixels = range(-45, 46, 15), range(-6, 7, 2)
    return {
        "angle, degrees": {
            "rotated": {x: score(moved(angle=x)) for x in angles},
            "slanted": {x: score(moved(slant=x)) for x in angles},
        },
        "shift, pixels": {
            "right": {x: score(moved(right=x)) for x in pixels},
            "down": {x: score(moved(down=x)) for x in pixels},
        },
        "noise, standard deviation in grey levels": {
            "Gaussian noise": {x: score((images + x * noise).round().clamp(0, 255).byte()) for x in range(0, 101, 20)}
        },
    }


def _differences(
    part: str, kind: type, values: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> list[tuple[str, Any, Any]]:
    """Returns name, value and default of each setting that is not at its default and no mere place of files."""
    parameters = inspect.signature(kind).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()} | dict(own or {})
    return [
        (f"{part}.{name}", value, defaults[name])
        for name, value in values.items()
        if name in defaults and value != defaults[name] and name not in ("data_dir", "default_root_dir")
    ]


def _made(device: torch.device) -> dict[str, str]:
    """Returns when, with what and on which machine this process makes the report."""
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() tells the architecture only
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    made = {
        "Made": datetime.now().astimezone().isoformat(" ", "seconds"),
        "Versions": f"lenet_pl {__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in packages),
        "Machine": f"{platform.system()}, {cpu}, cores: {os.cpu_count()}, threads: {torch.get_num_threads()}",
    }
    if device.type == "cuda":
        made["GPU"] = torch.cuda.get_device_name(device)
    if (HERE.parent / ".git").exists():
        command = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy that it does not trust
            made["Git commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return made
