"""Writes ``report.html``, one page on a checkpoint with the article beside it, and its pictures as PNG files."""

import contextlib
import inspect
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from lightning.pytorch import Trainer
from markupsafe import Markup

from lenet_pl import __version__, checkpoint, runs
from lenet_pl.apps import article, panels, plots
from lenet_pl.apps.article import Run
from lenet_pl.apps.classifier import Classifier
from lenet_pl.apps.scores import Scores, score
from lenet_pl.atomic import write_atomic
from lenet_pl.datamodule import FashionMNISTDataModule
from lenet_pl.lenet import layers
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line, quoted

ROOT = Path(__file__).parents[2]
PLACES = ("data_dir", "default_root_dir")  # settings that say where files lie, and nothing about the training


class Setting(NamedTuple):
    """A setting that is not at its default."""

    name: str
    value: Any
    default: Any


def write(
    ckpt_path: Path,
    model: LitLeNet,
    data: FashionMNISTDataModule,
    trainer_defaults: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report into the checkpoint's run folder, or beside a checkpoint that lies outside one.

    It uses results.csv and config.yaml where they are there, and the page says so where they are not.

    Args:
        ckpt_path: The checkpoint's file.
        model: The checkpoint's module, on any device; it is left in evaluation mode and in float32.
        data: A datamodule with the checkpoint's settings; it reads the images that it has not read yet.
        trainer_defaults: The command line's own defaults for the Trainer, where they differ from Lightning's.

    Returns:
        The page, ``report.html``.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        DataError: If the images are missing and cannot be fetched.
        OSError: If a file cannot be written; an earlier one is then intact.
    """
    state = checkpoint.load(ckpt_path)
    folder = runs.folder_of(ckpt_path) or ckpt_path.parent
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text("utf-8")) if config.is_file() else {}
    data.seed = state["seed"]  # for the order of the first epoch
    if data.train_set is None or data.test_set is None:
        data.prepare_data()
        data.setup("validate")  # reads the training images too
        data.setup("test")
    assert data.train_set is not None
    assert data.test_set is not None
    net_layers = layers(model.net)
    run = Run(
        epoch=state["epoch"] + 1,
        seed=state["seed"],
        steps=state["global_step"],
        epsilon=state["optimizer_states"][0]["param_groups"][0]["eps"],
        train_images=len(data.train_set[1]),
        parameters=sum(parameters for *_, parameters in net_layers),
        model=model.hparams,
        data=data.hparams,
        trainer=settings.get("trainer", {}),
        results=runs.read_results(folder),
    )
    classifier = Classifier(model.eval().float(), data.mean, data.std)
    logits = classifier.in_batches(data.test_set[0])
    scores = score(logits, data.test_set[1])
    drawn = panels.draw(classifier, data, logits, scores, run.results, run.epoch)
    pictures = {}
    for name, panel in drawn.items():
        if panel.figure is not None:
            plots.save(panel.figure, folder / f"{name}.png")
            pictures[name] = Markup(plots.svg(panel.figure))
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    path = one_line(ckpt_path)
    page = environment.get_template("report.html").render(
        accuracy=f"{scores.accuracy:.2%}",
        path=path,
        run=run,
        numbers=numbers(run, scores),
        source=article.SOURCE,
        article=article.rows(run, scores),
        panels=drawn,
        pictures=pictures,
        classes=scores.classes,
        layers=net_layers,
        settings=[
            *differences("model", LitLeNet, run.model),
            *differences("data", FashionMNISTDataModule, run.data),
            *differences("trainer", Trainer, run.trainer, trainer_defaults or {}),
        ],
        origin=origin(run, model.device),
        again=f"python -m lenet_pl report --ckpt_path {quoted(path)}",
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def numbers(run: Run, scores: Scores) -> list[tuple[str, str]]:
    """Returns the page's main numbers, each with its label."""
    return [
        (f"test accuracy, {scores.n:,} images", f"{scores.accuracy:.2%}"),
        ("test loss, nats", f"{scores.loss:.4f}"),
        ("mean F1 of the classes", f"{scores.f1:.2%}"),
        ("expected calibration error", f"{scores.calibration_error:.2%}"),
        ("parameters", f"{run.parameters:,}"),
    ]


def differences(
    part: str, kind: type, values: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> list[Setting]:
    """Returns the settings that are not at their defaults.

    Args:
        part: The settings' part of the configuration: ``model``, ``data`` or ``trainer``.
        kind: The class whose signature holds the defaults.
        values: The settings by name.
        own: Defaults that replace those of the signature.
    """
    parameters = inspect.signature(kind).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()} | dict(own or {})
    found = []
    for name, value in values.items():
        if name in defaults and name not in PLACES and value != defaults[name]:
            found.append(Setting(f"{part}.{name}", value, defaults[name]))
    return found


def origin(run: Run, device: torch.device) -> list[tuple[str, str]]:
    """Returns facts on the training, and with what and on which machine this process writes the report."""
    packages = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    versions = [f"lenet_pl {__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in packages]
    seconds = sum(float(row["seconds"]) for row in run.results)
    facts = [
        ("Seed", str(run.seed)),
        ("Trained", f"{run.steps:,} optimizer steps to this checkpoint, in epoch {run.epoch}"),
        ("Time", f"{seconds:,.0f} s for {len(run.results)} epochs, validation included" if seconds else "unknown"),
        ("Report written", datetime.now().astimezone().isoformat(" ", "seconds")),
        ("Versions", ", ".join(versions)),
        ("Machine", f"{platform.system()}, {_cpu()}, cores: {os.cpu_count()}, threads: {torch.get_num_threads()}"),
    ]
    if device.type == "cuda":
        facts.append(("GPU", torch.cuda.get_device_name(device)))
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy that it does not trust
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            facts.append(("Git commit", output.strip()))
    return facts


def _cpu() -> str:
    """Returns the processor's name; ``platform.processor()`` gives only its architecture on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()
