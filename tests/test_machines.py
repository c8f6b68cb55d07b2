"""What other people's machines have: notebooks, odd names, home folders, locales, closed streams, busy cores."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, same, weights
from lightning.pytorch import Trainer

from lenet_pl import FashionMNISTDataModule, LitLeNet, commands, process
from lenet_pl.__main__ import main
from lenet_pl.callbacks import RunWriter
from lenet_pl.names import quoted
from lenet_pl.trainer import set_threads

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 1)
RECIPE = "trainer: {max_epochs: 1}\ndata: {val_size: 60, batch_size: 8}\n"
RUN = Path("runs/lenet/version_0")
ODD = ["my recipe.yaml", "lenet@home.yaml", "größe.yaml", "a'b.yaml", "$HOME.yaml", "[x].yaml"]


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Notebooks


@pytest.mark.long
@pytest.mark.parametrize("backend", ["nonsense", "ipympl"])
def test_any_backend_that_the_environment_names(workdir, backend):
    env = os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "lenet_pl", "test", "--help"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
@pytest.mark.report
def test_the_backend_of_a_notebook_that_is_not_installed_here(spawn):
    env = os.environ | {"MPLBACKEND": "module://no_such_package.backend_inline", "PYTHONPATH": str(ROOT)}
    flags = [str(flag) for flag in TINY]
    before = f"for command in (['fit', *{flags}], ['report']): assert main(command) == 0"
    process = spawn("predict", prelude=before, env=env)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "Tip" not in out  # Lightning's advertisements
    assert (RUN / "curves.png").exists()


def test_from_a_thread(workdir, cli):
    results = []
    thread = threading.Thread(target=lambda: results.append(cli("fit", *TINY)))
    thread.start()
    thread.join(timeout=120)
    ((code, _, err),) = results
    assert (code, err) == (0, "")


def test_twice_in_one_process_as_a_notebook_does(cli):
    assert cli("fit", *TINY)[0] == 0
    assert cli("fit", *TINY, "--name", "again")[0] == 0
    assert same(weights(RUN / "checkpoints/last.ckpt"), weights("runs/again/version_0/checkpoints/last.ckpt"))


# Names and folders


@pytest.mark.parametrize(
    "name",
    ["lenet (copy).yaml", *(pytest.param(name, marks=pytest.mark.long) for name in ODD)],
)
def test_a_config_file_may_have_any_name(cli, workdir, name):
    Path(name).write_text(RECIPE)
    code, out, err = cli("fit", "--config", name)
    assert (code, err) == (0, "")
    folder = Path("runs") / Path(name).stem / "version_0"
    assert (folder / "test.json").exists()
    (line,) = [line for line in out.splitlines() if line.startswith("next: ")]
    shown = subprocess.run(
        ["sh", "-c", line.replace("next: python -m lenet_pl", "printf '%s\\n'")], capture_output=True
    )
    assert shown.stdout.decode().splitlines() == ["test", "--ckpt_path", str(folder / "checkpoints/best.ckpt")]
    code, _, err = cli("fit", "--config", name, "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert (code, err) == (0, "")
    assert len(rows(folder)) == 2


def test_a_tilde_is_the_home_folder_in_every_path(cli, workdir, monkeypatch, tiny):
    home = workdir / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "images").symlink_to(tiny[0])
    (home / "r.yaml").write_text(f"{RECIPE}name: x\n")
    Path("mine.yaml").write_text(
        "trainer:\n  max_epochs: 1\n  default_root_dir: ~/here\n  callbacks:\n  - class_path: ModelCheckpoint\n"
        "    init_args: {dirpath: ~/kept}\ndata: {val_size: 60, batch_size: 8, data_dir: ~/images}\n"
    )
    code, _, err = cli("fit", "--config", "mine.yaml")
    assert (code, err) == (0, "")
    assert (home / "here/runs/mine/version_0/test.json").exists()
    assert list((home / "kept").iterdir())
    code, _, err = cli("fit", "--config=~/r.yaml", "--data.data_dir=~/images", "--trainer.default_root_dir", "~/there")
    assert (code, err) == (0, "")
    best = "~/there/runs/x/version_0/checkpoints/best.ckpt"
    assert cli("test", f"--ckpt_path={best}")[0] == 0
    assert cli("predict", "--ckpt_path", best, "--output=~/out")[0] == 0
    assert (home / "out/predictions.csv").exists()
    assert not Path("~").exists()


def test_a_path_with_spaces_is_one_word_for_the_shell_of_the_system(monkeypatch):
    assert [quoted(path) for path in ("a/b.ckpt", "a b/c.ckpt")] == ["a/b.ckpt", "'a b/c.ckpt'"]
    assert quoted("-dash/b.ckpt") == "./-dash/b.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr("os.name", "nt")
        assert [quoted(path) for path in (r"a\b.ckpt", r"a b\c.ckpt")] == [r"a\b.ckpt", r'"a b\c.ckpt"']


@pytest.mark.long
def test_utf8_whatever_the_locale(spawn, workdir):
    (workdir / "plain.yaml").write_text(f"# Größe ≤ 3 – für alle\n{RECIPE}", encoding="utf-8")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    flags = [str(flag) for flag in TINY]
    before = f"assert main(['fit', '--config', 'plain.yaml', *{flags}]) == 0"
    process = spawn("fit", "--config", ROOT / "configs/lenet.yaml", *TINY, prelude=before, env=env)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    saved = yaml.safe_load((workdir / "runs/plain/version_0/config.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["val_size"] == 60


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_rank_of_another_job_hides_nothing(spawn, workdir, name):
    env = os.environ | {name: "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out, err = spawn("fit", *TINY, "--trainer.max_epochs", 1, env=env).communicate(timeout=120)
    assert err == ""
    for needle in ("Test accuracy", "run folder", "next: "):
        assert needle in out
    assert list(workdir.glob("runs/lenet/version_0/events*"))


def test_a_container_has_fewer_cores(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "150000 100000\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert set_threads(None, "auto") == 1
    monkeypatch.setattr(Path, "read_text", lambda self: "max 100000\n")
    assert set_threads(None, "auto") == 4


# Streams


def test_an_output_that_only_writes(cli, monkeypatch):
    class Tee:
        def write(self, text):
            return len(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Tee())
    assert main(["fit", *map(str, TINY)]) == 0


def test_two_signals_at_once(spawn, workdir):
    process = spawn("fit", *TINY, "--trainer.max_epochs", 1000)
    for _ in range(1200):
        if (workdir / "runs/lenet/version_0/checkpoints/last.ckpt").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.long
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_process_without_streams_runs_silently(workdir, tiny, closed):
    code = f"import sys; from lenet_pl import download; download.FILES = {tiny[1]!r}\n"
    code += "from lenet_pl.__main__ import main; sys.exit(main(sys.argv[1:]))"
    Path("run.py").write_text(code)
    command = f"{sys.executable} run.py fit {' '.join(map(str, TINY))} {closed}"
    done = subprocess.run(command, shell=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert json.loads((RUN / "test.json").read_text())["n"] == 53
    torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)


# Threads


def test_threads_belong_to_the_run(cli):
    code, _, err = cli("fit", *TINY, "--threads", 2)
    assert code == 0, err
    assert torch.get_num_threads() == 2
    assert yaml.safe_load((RUN / "config.yaml").read_text())["threads"] == 2
    torch.set_num_threads(1)
    assert cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)[0] == 0
    assert torch.get_num_threads() == 2
    assert cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, "--threads", 1)[0] == 0
    assert yaml.safe_load((RUN / "config.yaml").read_text())["threads"] == 1


def test_no_more_threads_than_gain_something(cli):
    torch.set_num_threads(64)
    assert cli("fit", *TINY, "--test", "false")[0] == 0
    assert yaml.safe_load((RUN / "config.yaml").read_text())["threads"] == 4


@pytest.mark.parametrize(
    ("cores", "processes", "used"), [(16, 2, 4), (16, 8, 2), (6, 2, 3), (2, 4, 1), (3, 1, 3), (1, 1, 1)]
)
def test_every_process_gets_the_same_share_of_the_cores(monkeypatch, cores, processes, used):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is restored
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(cores)
    assert set_threads(None, str(processes)) == used
    if processes > 1:
        assert os.environ["OMP_NUM_THREADS"] == str(used)
        assert set_threads(None, str(processes)) == used  # in a process that Lightning starts


def test_an_epoch_that_takes_three_times_the_fastest_is_mentioned_once(capsys):
    torch.set_num_threads(2)
    folder = RunWriter(Path("runs/x"), "")
    for seconds in (5.0, 4.0, 11.0, 13.0, 4.0, 40.0):
        folder._warn_if_slow(seconds)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("This epoch took 3 times as long as the fastest one")
    assert "--threads 1" in line
    torch.set_num_threads(1)
    folder = RunWriter(Path("runs/x"), "")
    for seconds in (4.0, 40.0):
        folder._warn_if_slow(seconds)
    assert capsys.readouterr().out == ""


# The right run


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--trainer.precision", "bf16-mixed"),
        pytest.param(("--trainer.precision", "64-true"), marks=pytest.mark.long),
        pytest.param(("--trainer.precision", "bf16-true"), marks=pytest.mark.long),
        pytest.param(("--data.mean", 0, "--data.std", 1), marks=pytest.mark.long),
        ("--model.variant", "classic"),
        ("--data.val_size", 0),
        pytest.param(("--data.split_seed", 3, "--seed_everything", 9), marks=pytest.mark.long),
        (
            "--model.dropout",
            0.3,
            "--model.label_smoothing",
            0.1,
            "--model.schedule",
            "one_cycle",
            "--data.flip",
            "true",
        ),
        pytest.param(("--trainer.max_epochs", 3, "--data.batch_size", 16), marks=pytest.mark.long),
    ],
)
def test_what_fit_prints_for_a_checkpoint_is_what_test_says_of_it(cli, flags):
    code, out, err = cli("fit", *TINY, *flags)
    assert code == 0, err
    printed = [line for line in out.splitlines() if line.startswith("Test accuracy")]
    before = (RUN / "test.json").read_bytes()
    for command in (("test",), ("test", "--ckpt_path", json.loads(before)["ckpt_path"])):
        code, out, err = cli(*command)
        assert code == 0, err
        assert [line for line in out.splitlines() if line.startswith("Test accuracy")] == printed
        assert (RUN / "test.json").read_bytes() == before
    if "--data.val_size" not in flags:
        best = max(rows(RUN), key=lambda row: float(row["val_acc"]))
        _, out, _ = cli("validate")
        assert f"val_acc {float(best['val_acc']):.2%}  val_loss {float(best['val_loss']):.4f}" in out


def test_a_recipe_named_on_resume_means_its_own_newest_run(cli):
    Path("a.yaml").write_text(RECIPE)
    Path("b.yaml").write_text(RECIPE + "model: {lr: 0.01}\n")
    for name in ("a", "b"):
        assert cli("fit", "--config", f"{name}.yaml")[0] == 0
    code, out, err = cli("fit", "--config", "a.yaml", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert code == 0, err
    assert [len(rows(Path(f"runs/{name}/version_0"))) for name in ("a", "b")] == [2, 1]
    code, out, _ = cli("test", "--name", "b")
    assert "checkpoint: runs/b/version_0/checkpoints/best.ckpt" in out


def test_a_path_with_another_name_begins_a_run_of_that_name(cli):
    setting = ("--trainer.accumulate_grad_batches", 2)
    assert cli("fit", *TINY, *setting, "--name", "a", "--trainer.max_epochs", 2)[0] == 0
    folder = Path("runs/a/version_0")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    last = folder / "checkpoints/last.ckpt"
    code, _, err = cli("fit", "--ckpt_path", last, "--name", "b")
    assert code == 2
    assert "has finished epoch 2" in err
    code, out, err = cli("fit", "--ckpt_path", last, "--name", "b", "--trainer.max_epochs", 3)
    assert (code, err) == (0, "")
    assert "run folder: runs/b/version_0" in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [(row["epoch"], row["step"]) for row in rows(Path("runs/b/version_0"))] == [("3", "51")]
    assert cli("fit", "--ckpt_path", last, "--name", "a", "--trainer.max_epochs", 3)[0] == 0
    assert len(rows(folder)) == 3


@pytest.mark.parametrize(
    ("change", "is_fine"),
    [
        (lambda text: "\ufeff" + text.replace("\n1,", "\n1.0,").replace("\n", "\r\n"), True),
        (lambda text: text.replace(",", ";"), False),
        (lambda text: text.replace("seconds", "seconds,note"), False),
    ],
)
def test_results_that_a_spreadsheet_has_saved(cli, change, is_fine):
    assert cli("fit", *TINY)[0] == 0
    path = RUN / "results.csv"
    path.write_bytes(change(path.read_text()).encode())
    before = path.read_bytes()
    code, _, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    if is_fine:
        assert (code, err) == (0, "")
        assert len(rows(RUN)) == 2
    else:
        assert code == 2
        assert f"the first line of {path} is " in err
        assert path.read_bytes() == before


def test_a_training_does_not_mind_what_happens_to_its_rows(cli, monkeypatch):
    real = RunWriter.on_train_epoch_start

    def edit(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            (self.create() / "results.csv").write_text("\ufeffopened in a spreadsheet")
        real(self, trainer, pl_module)

    monkeypatch.setattr(RunWriter, "on_train_epoch_start", edit)
    code, _, err = cli("fit", *TINY, "--trainer.max_epochs", 2)
    assert (code, err) == (0, "")
    assert len(rows(RUN)) == 2


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # our callbacks did not make it
def test_a_checkpoint_that_was_saved_after_the_training(cli):
    trainer = Trainer(max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(LitLeNet(), FashionMNISTDataModule(batch_size=8, val_size=60))
    trainer.save_checkpoint("end.ckpt")
    code, _, err = cli("fit", "--ckpt_path", "end.ckpt", "--trainer.max_epochs", 3)
    assert (code, err) == (0, "")
    assert [row["epoch"] for row in rows(RUN)] == ["3"]


def test_a_run_that_has_lost_its_last_checkpoint_goes_on_from_the_best(cli):
    command = ("fit", *TINY, "--ckpt_path", "auto")
    assert cli(*command)[0] == 0
    (RUN / "checkpoints/last.ckpt").unlink()
    assert cli(*command, "--trainer.max_epochs", 2)[0] == 0
    assert len(rows(RUN)) == 2


def test_a_data_folder_that_is_gone(cli, tiny):
    Path("mine").symlink_to(tiny[0])
    assert cli("fit", *TINY, "--data.data_dir", "mine")[0] == 0
    Path("mine").unlink()
    code, _, err = cli("fit", "--ckpt_path", "last", "--trainer.max_epochs", 2)
    assert (code, err) == (0, "")
    assert not Path("mine").exists()


def test_a_folder_named_like_a_recipe(cli):
    Path("fast").mkdir()
    code, _, err = cli("fit", "--config", "fast", *TINY, "--trainer.check_val_every_n_epoch", 1)
    assert (code, err) == (0, "")
    assert Path("runs/fast/version_0").is_dir()


# Signals and names


def test_a_signal_that_the_parent_ignores_is_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background of a script
    try:
        with process.stopping():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems know no such names")
def test_a_name_that_is_no_utf_8_is_refused(cli):
    code, _, err = cli("fit", *TINY, "--name", os.fsdecode(b"\xff"))
    assert code == 2
    assert "in UTF-8" in err


def test_ctrl_c_while_the_libraries_are_imported(workdir):
    Path("torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(10)")
    command = [sys.executable, "-m", "lenet_pl", "test"]
    env = os.environ | {"PYTHONPATH": f"{workdir}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_a_name_may_begin_like_a_comment_of_yaml(cli):
    assert cli("fit", *TINY, "--name", "#3")[0] == 0
    assert Path("runs/#3/version_0/results.csv").is_file()
    Path("#c.ckpt").write_bytes(Path("runs/#3/version_0/checkpoints/last.ckpt").read_bytes())
    code, out, err = cli("predict", "--ckpt_path", "#c.ckpt", "--output", "#o")
    assert (code, err) == (0, "")
    assert out.startswith("checkpoint: #c.ckpt")
    assert Path("#o/predictions.csv").is_file()


def test_the_seed_is_not_announced_under_slurm():
    record = logging.LogRecord("lightning", logging.INFO, "", 0, "[rank: 0] Seed set to 0", None, None)
    assert not process._is_asked_for(record)


def test_a_score_is_shown_where_nothing_can_be_written(cli, monkeypatch):
    assert cli("fit", *TINY)[0] == 0

    def refuse(path, data):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(commands, "write_atomic", refuse)
    code, out, err = cli("test")
    assert code == 1
    assert "Test accuracy: " in out
    assert "test.json: Read-only file system" in err
