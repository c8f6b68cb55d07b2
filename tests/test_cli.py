"""The command line: commands, the run folder, names of checkpoints, and which settings win over others."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TEST, same, weights

from lenet_pl import LitLeNet, __version__
from lenet_pl.__main__ import COMMANDS

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 3)
CONFIGS = Path(__file__).parents[1] / "configs"
RUN = Path("runs/lenet/version_0")


@pytest.mark.report
def test_fit_leaves_a_complete_run_folder(cli):
    code, out, err = cli("fit", "--config", CONFIGS / "lenet.yaml", *TINY)
    assert (code, err) == (0, "")
    assert "107,786" in out
    with (RUN / "results.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["epoch", "step", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "seconds"]
        rows = list(reader)
    assert [(r["epoch"], r["step"]) for r in rows] == [("1", "34"), ("2", "68"), ("3", "102")]
    assert all(0 <= float(r["val_acc"]) <= 1 for r in rows)
    best = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)
    accuracies = [float(r["val_acc"]) for r in rows]
    assert best["epoch"] == accuracies.index(max(accuracies))  # the earlier one on a tie
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    result = json.loads((RUN / "test.json").read_text())
    assert result.keys() == {"test_acc", "test_loss", "n", "ckpt_path", "seed"}
    assert (result["n"], result["seed"]) == (TEST, 0)
    assert f"Test accuracy: {result['test_acc']:.2%}" in out
    assert result["ckpt_path"] == str(RUN / "checkpoints/best.ckpt")
    assert f"python -m lenet_pl test --ckpt_path {RUN}/checkpoints/best.ckpt" in out
    assert list(RUN.glob("events.out.tfevents*"))
    for name in ("samples", "curves", "confusion_matrix"):
        assert (RUN / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result['test_acc']:.2%}" in (RUN / "report.html").read_text()
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    assert re.fullmatch(
        r"epoch 1/3  train_loss \d\.\d{4}  train_acc \d+\.\d\d%  val_loss \d\.\d{4}  val_acc \d+\.\d\d%  \d+\.\d s",
        lines[0],
    )


def test_test_needs_only_the_checkpoint(cli):
    shift = ("--data.mean", 0.1, "--data.std", 0.5, "--model.variant", "classic", "--seed_everything", 7)
    assert cli("fit", *TINY, *shift)[0] == 0
    before = json.loads((RUN / "test.json").read_text())
    (RUN / "test.json").unlink()
    for name in ("best", "best.ckpt", str(RUN / "checkpoints/best.ckpt")):
        code, out, _ = cli("test", "--ckpt_path", name)
        assert code == 0
        assert json.loads((RUN / "test.json").read_text()) == before
        assert f"checkpoint: {RUN}/checkpoints/best.ckpt" in out
    assert before["seed"] == 7
    code, out, _ = cli("test")  # best is what it uses by itself
    assert f"{before['test_acc']:.2%}" in out


def test_no_command_scores_a_checkpoint_with_other_settings_than_it_was_trained_with(cli):
    cli("fit", *TINY)
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    for command in ("test", "validate", "predict", "report", "export", "demo"):
        code, _, err = cli(command, "--data.std", 3)
        assert code == 2
        assert err.startswith(f"error: data.std=3.0: expected 0.353, as in {RUN}/checkpoints/best.ckpt\n")
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before
    assert cli("test", "--data.std", 0.353)[0] == 0


def test_a_checkpoint_outside_a_run_folder_gets_its_test_json_beside_it(cli, workdir):
    cli("fit", *TINY)
    (workdir / "elsewhere").mkdir()
    moved = (RUN / "checkpoints/best.ckpt").rename(workdir / "elsewhere/best.ckpt")
    assert cli("test", "--ckpt_path", moved)[0] == 0
    assert json.loads((workdir / "elsewhere/test.json").read_text())["n"] == TEST


def test_validate_gives_the_accuracy_of_the_best_epoch(cli):
    cli("fit", *TINY)
    with (RUN / "results.csv").open(newline="") as file:
        best = max(float(row["val_acc"]) for row in csv.DictReader(file))
    code, out, _ = cli("validate", "--ckpt_path", "best")
    assert code == 0
    assert f"val_acc {best:.2%}" in out


def test_the_saved_config_repeats_the_run_to_the_bit(cli, workdir):
    cli("fit", *TINY, "--model.dropout", 0.2, "--data.flip", "true", "--seed_everything", 5)
    code, _, err = cli("fit", "--config", RUN / "config.yaml")
    assert code == 0, err
    again = RUN.with_name("version_1")
    assert same(weights(RUN / "checkpoints/last.ckpt"), weights(again / "checkpoints/last.ckpt"))
    assert yaml.safe_load((again / "config.yaml").read_text()) == yaml.safe_load((RUN / "config.yaml").read_text())


def test_runs_are_numbered_and_named_after_their_recipe(cli, workdir):
    (workdir / "mine.yaml").write_text("trainer: {max_epochs: 1}\ndata: {val_size: 60}\n")
    for _ in range(2):
        cli("fit", "--config", "mine.yaml")
    cli("fit", "--config", "mine.yaml", "--name", "other")
    assert sorted(str(p) for p in Path("runs").glob("*/*")) == [
        "runs/mine/version_0",
        "runs/mine/version_1",
        "runs/other/version_0",
    ]


def test_without_validation_the_last_epoch_is_scored(cli):
    code, out, _ = cli("fit", "--config", CONFIGS / "article.yaml", "--trainer.max_epochs", 2)
    assert code == 0
    run = Path("runs/article/version_0")
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert json.loads((run / "test.json").read_text())["ckpt_path"].endswith("last.ckpt")
    assert "val_" not in out


def test_last_goes_on_in_the_same_folder(cli):
    cli("fit", *TINY)
    code, out, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 5)
    assert (code, err) == (0, "")
    assert [p.name for p in RUN.parent.iterdir()] == ["version_0"]
    with (RUN / "results.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == list("12345")
    assert out.count("\nepoch ") == 2


def test_a_finished_run_can_be_resumed_without_harm(cli):
    cli("fit", *TINY)
    before = (RUN / "results.csv").read_bytes()
    code, out, _ = cli("fit", "--ckpt_path", "last")
    assert code == 0
    assert "Test accuracy" in out
    assert (RUN / "results.csv").read_bytes() == before


@pytest.mark.parametrize("recipe", sorted(p.name for p in CONFIGS.glob("*.yaml")))
def test_each_recipe_parses_and_says_only_what_differs(cli, recipe):
    code, out, err = cli("fit", "--config", CONFIGS / recipe, "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["trainer"]["max_epochs"] > 0
    defaults = yaml.safe_load(cli("fit", "--print_config")[1])
    for group, settings in yaml.safe_load((CONFIGS / recipe).read_text()).items():
        for key, value in settings.items():
            assert value != defaults[group][key] or (group, key) == ("trainer", "max_epochs"), key
    assert (CONFIGS / recipe).read_text().startswith("# ")


def test_a_checkpoint_loads_from_python(cli):
    cli("fit", *TINY, "--model.lr", 0.002)
    model = LitLeNet.load_from_checkpoint(RUN / "checkpoints/best.ckpt", weights_only=True).eval()
    assert model.hparams["lr"] == 0.002
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:The number of training batches")  # the tiny data are one block an epoch
def test_the_snippet_of_the_readme_runs(workdir):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    snippet = snippet.replace("FashionMNISTDataModule()", "FashionMNISTDataModule(val_size=60)")
    exec(snippet.replace("max_epochs=30", "max_epochs=1"), scope)
    assert isinstance(scope["model"], LitLeNet)


def test_the_help_of_a_command_opens_with_what_people_change(cli):
    code, out, err = cli("fit", "--help")
    assert (code, err) == (0, "")
    first, rest = out.split("All options\n")
    assert "--model.lr LR" in first
    assert "default: 0.001" in first
    assert "--trainer.max_epochs" in first
    assert len(first.splitlines()) < 90
    assert "usage: lenet-pl fit" in rest
    assert "--output" not in out
    for command, option in (("predict", "--output"), ("export", "--output"), ("demo", "--port"), ("test", "--threads")):
        assert option in cli(command, "--help")[1]


def test_help_and_version_answer_at_once(spawn):
    for args in ((), ("--help",), ("--version",)):
        process = spawn(*args, prelude="import atexit; atexit.register(lambda: print('torch' in sys.modules))")
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert out.strip().endswith("False")  # torch is what takes seconds
        assert __version__ in out
        assert args == ("--version",) or all(name in out for name in COMMANDS)
