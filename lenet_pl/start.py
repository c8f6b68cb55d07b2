"""What a command starts from: a checkpoint with its settings, and the run that a training resumes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenet_pl import configs, runs
from lenet_pl.checkpoint import load_ours


@dataclass
class Start:
    """What a command starts from: nothing, where a training begins anew."""

    path: Path | None = None  # the checkpoint's file
    checkpoint: dict[str, Any] = field(default_factory=dict)  # its content
    settings: dict[str, Any] = field(default_factory=dict)  # with which it was trained
    resumed: Path | None = None  # the folder of the run that goes on; without it, a training gets a new folder


def of_training(word: str | None, root: Path, name: str | None, run_name: str | None) -> Start:
    """Finds what ``fit`` starts from.

    Args:
        word: The value of ``--ckpt_path``.
        root: The folder ``runs``.
        name: The value of ``--name``. A run goes on only under its own name; under another, a new run begins.
        run_name: That of the runs that ``auto``, ``last`` and ``best`` mean: ``--name``, or the config file's name.

    Raises:
        UsageError: If there is no such checkpoint, or if it or its run cannot be read.
    """
    if word is None:
        return Start()
    if word == "auto":
        resumed = next(iter(runs.all_runs(root, run_name or runs.DEFAULT_NAME)), None)
        if resumed is None:
            return Start()
        path = resumed / runs.LAST
        if not path.is_file():  # the run was stopped in its first epoch
            return Start(settings=configs.of_run(resumed), resumed=resumed)
    else:
        path = runs.find(word, root, run_name)
    checkpoint = load_ours(path, resume=True)
    folder = runs.folder_of(path)
    if folder is None:
        return Start(path, checkpoint, configs.of_checkpoint(checkpoint))
    settings = configs.of_run(folder)
    is_last = path.name == Path(runs.LAST).name
    goes_on = is_last and name in (None, settings.get("name"), folder.absolute().parent.name)
    return Start(path, checkpoint, settings, folder if goes_on else None)


def of_evaluation(word: str | None, root: Path, run_name: str | None) -> Start:
    """Finds what any other command starts from. Arguments and errors are those of :func:`of_training`."""
    if word is None:
        word = "best" if run_name or runs.all_runs(root) else "pretrained"
    path = runs.find(word, root, run_name)
    checkpoint = load_ours(path, resume=False)
    return Start(path, checkpoint, configs.of_checkpoint(checkpoint))
