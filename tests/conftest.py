"""A tiny Fashion-MNIST in the real file format, and the real command line that runs on it."""

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lenet_pl import download, runs

ROOT = Path(__file__).parents[1]
TRAIN, TEST = 330, 53  # not multiples of a batch size, so that the last batches are smaller


def write_idx(folder: Path) -> dict[str, tuple[str, int]]:
    """Writes the four files and returns their SHA-256 and sizes.

    An image of class k is noise with a bright bar at a height of its own, which a net learns within some steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    files = {}
    for prefix, n in (("train", TRAIN), ("t10k", TEST)):
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 3 : 2 * label + 7, 4:20] += 150
        for name, data in (
            (f"{prefix}-images-idx3-ubyte", struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes()),
            (f"{prefix}-labels-idx1-ubyte", struct.pack(">II", 2049, n) + labels.tobytes()),
        ):
            (folder / name).write_bytes(data)
            files[name] = (hashlib.sha256(data).hexdigest(), len(data))
    return files


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The ``data_dir`` of the tiny data set, and the list of its files."""
    root = tmp_path_factory.mktemp("data")
    return root, write_idx(root / "FashionMNIST" / "raw")


@contextlib.contextmanager
def inside(folder, tiny):
    """Makes ``folder`` the current one, with the tiny data in ``data/``. The download expects the tiny files."""
    (folder / "data").symlink_to(tiny[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "FILES", tiny[1])
        patch.chdir(folder)
        yield patch


@pytest.fixture
def workdir(tiny, tmp_path):
    """A current folder that is empty except for the tiny data."""
    with inside(tmp_path, tiny):
        yield tmp_path


@pytest.fixture
def real_data(tmp_path, monkeypatch):
    """A current folder that is empty except for the real data, which lies in the checkout's ``data/``."""
    try:
        download.ensure(ROOT / "data")
    except download.DataError as error:
        pytest.skip(f"the real data could not be fetched: {error}")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(workdir, capsys):
    """Runs the command line in this process, and returns exit code, stdout and stderr."""

    def run(*args):
        from lenet_pl.__main__ import main

        capsys.readouterr()
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def spawn(workdir, tiny):
    """Starts the command line in a process of its own on the tiny data, and returns the Popen."""

    def start(*args, prelude="", **options):
        code = (
            "import sys; from lenet_pl import download; from lenet_pl.__main__ import main;"
            f"download.FILES = {tiny[1]!r}\n{prelude}\nsys.exit(main(sys.argv[1:]))"
        )
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, args)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env} | options
        return subprocess.Popen(command, cwd=workdir, **options)

    return start


@pytest.fixture(autouse=True)
def quick_end_of_fit(request, monkeypatch):
    """Skips the report at the end of a fit except in tests that are marked for it: it takes longer than a tiny fit."""
    if "report" not in request.keywords:
        monkeypatch.setattr("lenet_pl.commands.report", lambda *args: None)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny batches are fastest on one thread, and more threads would compete with subprocesses for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags, timeout=60_000)
        yield browser
        browser.close()


def as_pretrained(ckpt: Path, folder: Path, monkeypatch) -> Path:
    """Replaces the weights of the package by those of a checkpoint, without the state that a training resumes with."""
    state = torch.load(ckpt, weights_only=True)
    for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        state.pop(key, None)
    path = folder / "pretrained.ckpt"
    torch.save(state, path)
    monkeypatch.setattr(runs, "PRETRAINED", path)
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(a, b) -> bool:
    """Whether two nested structures hold the same values and bit-identical tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
