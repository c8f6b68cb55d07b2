"""The wheel: what it holds, and that it works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, which is all that pip does with it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("lenet_pl", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture
def run(installed, spawn):
    """Runs the command line of the wheel as a process of its own; returns exit code, stdout and stderr."""
    prelude = f"import lenet_pl; assert lenet_pl.__path__ == [{str(installed / 'lenet_pl')!r}]"
    env = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*args):
        process = spawn(*args, prelude=prelude, env=env)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


def files(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)}


def test_the_wheel_holds_the_package_and_the_recipes(installed):
    recipes = {f"recipes/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert recipes >= {f"recipes/{name}.yaml" for name in ("article", "best", "classic", "fast", "lenet")}
    assert files(installed / "lenet_pl") == files(ROOT / "lenet_pl") | recipes
    (information,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"lenet_pl", information.name}
    assert (information / "licenses/LICENSE").is_file()
    (script,) = Distribution.at(information).entry_points
    assert (script.name, script.value) == ("lenet-pl", "lenet_pl.__main__:entry")


@pytest.mark.long
def test_a_recipe_that_does_not_exist(run):
    code, _, err = run("fit", "--config", "nope")
    assert code == 2
    assert "one of the recipes article, best, classic, fast, lenet\n" in err


@pytest.mark.long
def test_a_run_of_the_wheel(run, workdir):
    code, _, err = run("fit", "--config", "best", "--trainer.max_epochs", 1)
    assert (code, err) == (0, "")
    folder = workdir / "runs/best/version_0"
    assert yaml.safe_load((folder / "config.yaml").read_text("utf-8"))["model"]["init"] == "orthogonal"
    assert (folder / "report.html").is_file()
    start = run()[1].partition("start here:")[2].splitlines()[0].split()
    code, _, err = run(*start[3:], "--trainer.max_epochs", 1, "--data.val_size", 60)  # after python -m lenet_pl
    assert (code, err) == (0, "")
    assert (workdir / "runs/lenet/version_0/test.json").is_file()
