"""The run folder: which run is the newest, and which checkpoint a word means."""

import os
from pathlib import Path

import pytest

from lenet_pl import runs
from lenet_pl.errors import CheckpointError
from lenet_pl.runs import find


def touch(path: Path, seconds: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (1e9 + seconds, 1e9 + seconds))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(run: str, file: str, seconds: float = 0) -> Path:
    return touch(Path("runs", run, "checkpoints", file), seconds)


def test_find_a_path(here: Path) -> None:
    path = made("lenet/version_0", "best.ckpt")
    assert find(str(path)) == path
    assert find(path) == path


@pytest.mark.parametrize("name", ["best", "best.ckpt", "last", "last.ckpt"])
def test_find_short_names_in_the_newest_run(name: str, here: Path) -> None:
    file = name.removesuffix(".ckpt") + ".ckpt"
    made("lenet/version_9", file, seconds=1)
    newest = made("fast/version_1", file, seconds=2)  # a smaller number, an earlier name: the time decides
    made("zoo/version_old", file, seconds=4)  # no run folder
    Path("runs/lenet/version_10/checkpoints", file).mkdir(parents=True)  # no file
    assert find(name) == newest
    assert find(name, name="lenet") == Path(f"runs/lenet/version_9/checkpoints/{file}")


def test_best_is_never_silently_an_older_runs(here: Path) -> None:
    made("lenet/version_0", "best.ckpt", seconds=1)
    last = made("article/version_0", "last.ckpt", seconds=2)  # a recipe without validation
    assert find("best") == last
    touch(Path("runs/fast/version_0/config.yaml"), seconds=3)  # a run in its first epoch
    for name in ("best", "last"):
        assert "the newest run, runs/fast/version_0, has no checkpoint of a finished epoch" in lost(name)
    assert find("best", name="lenet") == Path("runs/lenet/version_0/checkpoints/best.ckpt")
    assert "there is no run of the name 'zoo'" in " ".join(lost("last", name="zoo").split())


def test_a_run_that_goes_on_is_the_newest_again(here: Path) -> None:
    made("lenet/version_0", "last.ckpt", seconds=1)
    made("fast/version_0", "last.ckpt", seconds=2)
    touch(Path("runs/lenet/version_0/config.yaml"), seconds=3)
    assert find("last") == Path("runs/lenet/version_0/checkpoints/last.ckpt")


def test_a_name_is_no_pattern(here: Path) -> None:
    made("lenet [1]/version_0", "last.ckpt")
    assert find("last", name="lenet [1]") == Path("runs/lenet [1]/version_0/checkpoints/last.ckpt")


def test_rows_are_replaced_whole_and_a_torn_one_is_left_out(here: Path) -> None:
    row = dict.fromkeys(runs.COLUMNS, "") | {"epoch": "1", "step": "34", "seconds": "0.5"}
    runs.write_results(here, [row, row | {"epoch": "2"}])
    assert [read["epoch"] for read in runs.read_results(here)] == ["1", "2"]
    with (here / runs.RESULTS).open("a") as file:
        file.write("3,102,0.001")
    assert [read["epoch"] for read in runs.read_results(here)] == ["1", "2"]
    assert runs.read_results(here / "nowhere") == []


def test_find_numbers_decide_between_equal_times(here: Path) -> None:
    for number in (2, 10, 9):
        made(f"lenet/version_{number}", "best.ckpt", seconds=5)
    assert find("best") == Path("runs/lenet/version_10/checkpoints/best.ckpt")


def test_find_prefers_a_file_of_that_very_name(here: Path) -> None:
    run = made("lenet/version_0", "best.ckpt")
    touch(Path("best.ckpt"))
    assert find("best.ckpt") == Path("best.ckpt")
    assert find("best") == run  # no file has that name
    Path("last.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        find("last.ckpt")


def test_find_looks_under_the_given_root(here: Path) -> None:
    path = touch(here / "elsewhere/lenet/version_0/checkpoints/best.ckpt")
    assert find("best", here / "elsewhere") == path


def lost(word: str, name: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(word, name=name)
    text = str(caught.value)
    assert repr(word) in text
    assert len(text.splitlines()) <= 3
    return text


def test_find_nothing_says_how_to_make_one(here: Path) -> None:
    for name in ("best", "last.ckpt", "no/such.ckpt"):
        assert "python -m lenet_pl fit --config lenet" in lost(name)
    assert "there is no run in 'runs'" in lost("best")


def test_find_nothing_lists_what_exists(here: Path) -> None:
    for number in range(5):
        made(f"article/version_{number}", "last.ckpt", seconds=number)
    text = lost("bset")
    assert text.count("runs/article") == 3
    assert "version_4" in text  # the newest first


def test_find_suggests_the_nearest(here: Path) -> None:
    made("fast/version_0", "best.ckpt", seconds=1)
    path = made("lenet/version_3", "best.ckpt")
    assert f"Give one of these: {path}" in lost("runs/lenet/version_3/checkpoint/best.ckpt")
    assert f"Give one of these: {path}" in lost("runs/lent/version_3/checkpoints/best.ckpt")
    touch(Path("mine/trained.ckpt"))
    assert "Give one of these: mine/trained.ckpt" in lost("mine/traind.ckpt")


@pytest.mark.parametrize("folder", ["runs/lenet/version_0", "runs/lenet/version_0/checkpoints"])
def test_find_refuses_a_folder_and_lists_its_files(folder: str, here: Path) -> None:
    made("lenet/version_0", "best.ckpt")
    made("lenet/version_0", "last.ckpt")
    text = lost(folder)
    assert "is not a file" in text
    assert "version_0/checkpoints/best.ckpt" in text
    assert "version_0/checkpoints/last.ckpt" in text


def test_find_odd_names(here: Path) -> None:
    lost("")
    lost("nul\0byte")
    lost("x" * 5000)
