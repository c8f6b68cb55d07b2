"""The layout of a run folder."""

from pathlib import Path

from lenet_pl import checkpoint
from lenet_pl.callbacks import RunFolder


def folder_of(ckpt_path: Path) -> Path | None:
    """Returns the run folder that holds a checkpoint, or None where it lies outside one."""
    return checkpoint.run_folder(ckpt_path)


def read_results(folder: Path) -> list[dict[str, str]]:
    """Returns the rows of a run's results.csv, or an empty list where there is none."""
    return RunFolder(folder, "").rows()
