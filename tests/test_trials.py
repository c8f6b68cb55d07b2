"""Trials: their statistics, and a queue that outlives its workers. Most run beside a stub in place of ``fit``."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import optuna
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.append(str(SCRIPTS))

import trials  # noqa: E402
import trials_table  # noqa: E402

# Takes the arguments of fit and leaves its files, an epoch a row; resumes, and trains nothing. Dropout is bad for it.
# While there is a file "hold", it stands still after the third epoch.
STUB = """
import json, sys, time
from pathlib import Path

flags = [part for arg in sys.argv[2:] for part in arg.split("=", 1)]
given = {name[2:]: value for name, value in zip(flags, flags[1:] + [""]) if name.startswith("--")}
number = lambda name, default: float(given.get(name, default))
epochs, dropout, pace = int(number("trainer.max_epochs", 3)), number("model.dropout", 0), number("model.pace", 0)
if not 0 <= dropout < 1:
    sys.exit(print("error: model.dropout: expected below 1", file=sys.stderr) or 2)
model, data = {"dropout": dropout, "lr": number("model.lr", 0.1)}, {"val_size": int(number("data.val_size", 5000))}
if "print_config" in given:
    trainer = {"max_epochs": epochs, "default_root_dir": given["trainer.default_root_dir"]}
    print(json.dumps({"trainer": trainer, "model": model, "data": data | {"data_dir": "data"}, "threads": 1}))
    sys.exit()
folder = Path(given["trainer.default_root_dir"], "runs", given["name"], "version_0")
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text("{}")
rows = folder / "results.csv"
if not rows.exists():
    rows.write_text("epoch,step,lr,train_loss,train_acc,val_loss,val_acc,seconds\\n")
done = len(rows.read_text().splitlines()) - 1
print(*sys.argv[1:])
print("begins after epoch", done, flush=True)
for epoch in range(done + 1, epochs + 1):
    time.sleep(pace)
    while epoch == 4 and Path("hold").exists():
        time.sleep(0.05)
    if given.get("model.lr") == "8":
        sys.exit(print("error: wrong for this trial alone", file=sys.stderr) or 2)
    if given.get("model.lr") == "9":
        sys.exit(print("error: the training diverged", file=sys.stderr) or 1)
    accuracy = 0.9 - dropout / 10 + epoch / 1000 + int(given["seed_everything"]) / 100
    with rows.open("a") as file:
        file.write(f"{epoch},{epoch},0.1,0.5,{accuracy + 0.01},0.5,{accuracy},2.0\\n")
if given["test"] == "true":
    (folder / "test.json").write_text(json.dumps({"test_acc": accuracy - 0.02}))
"""
START = "import sys; sys.path.insert(0, {scripts!r}); import trials, trials_plan, trials_queue;"
START += "trials_plan.FIT[:] = [sys.executable, {stub!r}, 'fit']; trials_queue.PAUSE = 0.1;"
START += "sys.argv[0] = 'scripts/trials.py'; sys.exit(trials.main())"


@pytest.fixture
def start(tmp_path):
    """Starts trials.py in an empty folder with the stub for ``fit``; those still there at the end are killed."""
    (tmp_path / "stub.py").write_text(STUB)
    code = START.format(scripts=str(SCRIPTS), stub=str(tmp_path / "stub.py"))
    started = []

    def run(*args, **options):
        command = [sys.executable, "-c", code, "--config", "lenet.yaml", "--heartbeat", "1", *map(str, args)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path} | options
        started.append(subprocess.Popen(command, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def finish(start):
    """Runs trials.py to its end; returns its JSON."""

    def run(*args):
        process = start(*args)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        return json.loads(out.splitlines()[-1])

    return run


def starts(folder):
    """Returns for each run the epochs that its processes began after."""
    return {
        log.parent.name: [int(line.split()[-1]) for line in log.read_text().splitlines() if line.startswith("begins")]
        for log in folder.glob("runs/*/fit.log")
    }


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def rows(folder):
    return sum(len(path.read_text().splitlines()) - 1 for path in folder.glob("runs/*/version_0/results.csv"))


def test_summary():
    half = 4.303 * 0.01 / math.sqrt(3)
    expected = {"mean": 0.91, "std": 0.01, "95 % from": 0.91 - half, "95 % to": 0.91 + half}
    assert trials_table.summary([0.90, 0.91, 0.92]) == pytest.approx(expected)
    assert trials_table.summary([0.9]) == {"mean": 0.9}
    assert trials_table.summary([0.0, 1.0] * 10)["95 % to"] == pytest.approx(0.5 + 2.262 * math.sqrt(5 / 19 / 20))


def test_quantiles():
    def density(x, n):
        return math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi) * (1 + x * x / n) ** (-(n + 1) / 2)

    for n, t in enumerate(trials_table.T, 1):  # Simpson's rule from 0 to t gives the other 47.5 %
        weights = [1, *[4, 2] * 499, 4, 1]
        area = sum(w * density(i * t / 1000, n) for i, w in enumerate(weights)) * t / 3000
        assert area == pytest.approx(0.475, abs=1e-4)


@pytest.mark.long
def test_seeds(finish, tmp_path):
    found = finish("--seeds", 3)
    (row,) = found["table"]
    assert found["metric"] == "val_acc"
    assert row["seeds"] == pytest.approx({"0": 0.903, "1": 0.913, "2": 0.923})
    assert row["val_acc"]["mean"] == pytest.approx(0.913)
    assert row["val_acc"]["std"] == pytest.approx(0.01)
    assert row["binomial_error"] == pytest.approx(math.sqrt(0.913 * 0.087 / 5000))
    assert row["seconds"] == pytest.approx({"mean": 6, "std": 0, "95 % from": 6, "95 % to": 6})
    (table,) = tmp_path.glob("runs/*.md")
    cells = " ".join(table.read_text().split())
    assert "`python scripts/trials.py --config lenet.yaml --heartbeat 1 --seeds 3`" in cells
    assert (
        "| lenet | 3 | 91.30 ± 1.00 % | 92.30 ± 1.00 % | 0.5 ± 0 | 6 ± 0 | 2 ± 0 | 88.82 to 93.78 % | 0.40 % |" in cells
    )
    assert set(map(tuple, starts(tmp_path).values())) == {(0,)}

    assert finish("--seeds", 3) == found
    assert finish("--seeds", 4)["table"][0]["n"] == 4
    assert list(starts(tmp_path).values()) == [[0]] * 4


@pytest.mark.long
def test_settings_are_never_mixed(finish, tmp_path):
    first = finish("--seeds", 1)
    other = finish("--seeds", 1, "--model.lr", 0.2)
    assert first["study"] != other["study"]
    assert len(starts(tmp_path)) == 2
    assert finish("--seeds", 1, "--model.lr", 0.1) == first  # it is the default

    grid = finish("--grid", "model.dropout=0.5", "--seeds", 1)
    assert finish("--grid", "model.dropout=0.5,0.2", "--seeds", 1)["study"] != grid["study"]
    assert sorted(map(len, starts(tmp_path).values())) == [1, 1, 1, 2]  # fit says at once that it is finished


@pytest.mark.long
def test_a_wrong_trial_does_not_stop_the_others(finish, start, tmp_path):
    process = start("--grid", "model.lr=0.1,8,0.2", "--seeds", 1, "--workers", 1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert "2 trials complete, 0 pruned, 1 failed; the same command tries them again" in out
    assert finish("--grid", "trainer.max_epochs=2,3", "--seeds", 1)["table"][0]["n"] == 1


@pytest.mark.long
def test_a_smaller_command_leaves_what_a_larger_one_has_queued(start, finish, tmp_path):
    (tmp_path / "hold").touch()
    larger = start("--seeds", 4, "--workers", 1, "--trainer.max_epochs", 8)
    wait_for(lambda: rows(tmp_path) == 3)
    larger.send_signal(signal.SIGINT)
    larger.communicate(timeout=60)
    (tmp_path / "hold").unlink()
    assert finish("--seeds", 1, "--trainer.max_epochs", 8)["table"][0]["n"] == 1
    assert len(starts(tmp_path)) == 1


@pytest.mark.long
def test_several_config_files_and_an_odd_root(start, tmp_path):
    root = tmp_path / "a b#c?d%20"
    process = start("--seeds", 1, "--config", "b.yaml", f"--trainer.default_root_dir={root}")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["study"].startswith("b-")
    assert {path.name for path in tmp_path.iterdir()} == {root.name, "stub.py"}
    assert (root / "runs/trials.db").is_file()
    (log,) = root.glob("runs/b-*/fit.log")
    assert "--config=lenet.yaml --config=b.yaml" in log.read_text()


@pytest.mark.long
def test_a_root_in_the_home_folder(start, tmp_path):
    process = start("--seeds", 1, "--trainer.default_root_dir=~/x", env=os.environ | {"HOME": str(tmp_path)})
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "x/runs/trials.db").is_file()


@pytest.mark.long
def test_grid(finish, tmp_path):
    table = finish("--grid", "model.dropout=0,0.5", "model.lr=0.1,0.2", "--seeds", 2)["table"]
    assert [(row["settings"]["model.dropout"], row["n"]) for row in table] == [
        ("0", 2),
        ("0", 2),
        ("0.5", 2),
        ("0.5", 2),
    ]
    assert {row["settings"]["model.lr"] for row in table} == {"0.1", "0.2"}
    assert [row["val_acc"]["mean"] for row in table] == pytest.approx([0.908, 0.908, 0.858, 0.858])
    assert len(starts(tmp_path)) == 8


@pytest.mark.long
def test_search(finish, tmp_path):
    space = ["--search", "model.dropout=0.0..0.9", "model.lr=1e-3..0.1:log", "--trainer.max_epochs", 6]
    found = finish(*space, "--trials", 4, "--workers", 4)
    values = [row["val_acc"]["mean"] for row in found["table"]]
    assert values == sorted(values, reverse=True)
    assert len(values) == 4
    for row in found["table"]:
        assert 0 <= row["settings"]["model.dropout"] <= 0.9
        assert 1e-3 <= row["settings"]["model.lr"] <= 0.1
    before = starts(tmp_path)
    assert finish(*space, "--trials", 4) == found
    assert starts(tmp_path) == before


@pytest.mark.long
def test_a_search_ends_trials_that_do_worse_than_the_median(finish, tmp_path):
    space = ["--search", "model.dropout=0.5..0.9", "--trainer.max_epochs", 6]
    found = finish(*space, "--trials", 1)
    study = optuna.load_study(study_name=found["study"], storage=f"sqlite:///{tmp_path}/runs/trials.db")
    for k in range(1, 6):  # better than the stub ever gets, and as many as the pruner waits for
        better = optuna.trial.create_trial(
            params={"model.dropout": 0.5},
            distributions=study.trials[0].distributions,
            value=0.99,
            intermediate_values=dict.fromkeys(range(1, 7), 0.99),
            user_attrs={**study.trials[0].user_attrs, "job": f"trial {k}"},
        )
        study.add_trial(better)
    table = finish(*space, "--trials", 9, "--workers", 3, "--model.pace", 0.7)["table"]
    assert sum(row["n"] for row in table) == 6
    pruned = study.get_trials(states=[optuna.trial.TrialState.PRUNED])
    assert len(pruned) == 3
    assert all(trial.last_step < 6 for trial in pruned)


@pytest.mark.long
def test_final(finish):
    found = finish("--seeds", 2, "--final", "--data.val_size", 0)
    assert (found["metric"], found["images"]) == ("test_acc", 10_000)
    assert found["table"][0]["test_acc"]["mean"] == pytest.approx(0.888)


@pytest.mark.long
@pytest.mark.parametrize("orphan", [False, True])
def test_a_killed_worker(start, tmp_path, orphan):
    arguments = ["--seeds", 4, "--workers", 1, "--trainer.max_epochs", 8]
    (tmp_path / "hold").touch()
    first = start(*arguments, start_new_session=True)
    wait_for(lambda: rows(tmp_path) == 3)
    second = start(*arguments)
    wait_for(lambda: rows(tmp_path) == 6)
    if orphan:
        first.kill()  # its fit trains on
    else:
        os.killpg(first.pid, signal.SIGKILL)
    (tmp_path / "hold").unlink()
    out, err = second.communicate(timeout=120)
    assert (second.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["table"][0]["n"] == 4
    assert rows(tmp_path) == 4 * 8  # no epoch was trained twice
    assert sorted(starts(tmp_path).values()) == [[0], [0], [0], [0, 8 if orphan else 3]]


@pytest.mark.long
def test_many_commands_at_once(start, tmp_path):
    """A SLURM array on an empty database: they make its tables, queue the same trials, and run each once."""
    processes = [start("--seeds", 6, "--workers", 2, "--model.pace", 0.1) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        found = json.loads(out.splitlines()[-1])
        assert found["table"][0]["n"] == 6
    assert len(optuna.load_study(study_name=found["study"], storage=f"sqlite:///{tmp_path}/runs/trials.db").trials) == 6
    assert list(starts(tmp_path).values()) == [[0]] * 6


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command(start, finish, tmp_path, number, code):
    arguments = ["--seeds", 2, "--workers", 2, "--trainer.max_epochs", 6]
    (tmp_path / "hold").touch()
    process = start(*arguments)
    wait_for(lambda: rows(tmp_path) == 6)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    (tmp_path / "hold").unlink()
    assert (process.returncode, err) == (code, "Stopped; the same command goes on where this one ended.\n")
    assert finish(*arguments)["table"][0]["n"] == 2
    assert list(starts(tmp_path).values()) == [[0, 3], [0, 3]]


@pytest.mark.long
def test_a_killed_trial_runs_again(start, tmp_path):
    (tmp_path / "hold").touch()
    process = start("--seeds", 1, "--trainer.max_epochs", 5)
    wait_for(lambda: rows(tmp_path) == 3)
    children = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/children")]
    os.kill(int("".join(children)), signal.SIGKILL)
    (tmp_path / "hold").unlink()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "exit code -9" in out
    assert list(starts(tmp_path).values()) == [[0, 3]]


@pytest.mark.long
def test_a_failed_trial(start, finish, tmp_path):
    process = start("--grid", "model.lr=0.1,9", "--seeds", 1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "exit code 1: the training diverged" in out
    assert [row["settings"] for row in json.loads(out.splitlines()[-1])["table"]] == [{"model.lr": "0.1"}]


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--grid", "model.lr=1..3"], "--grid takes single values"),
        (["--grid", "model.dropout=0,1", "--seeds", "1"], "model.dropout: expected below 1"),
        (["--model.dropout", "2"], "model.dropout: expected below 1"),
        (["--search", "model.lr=3..a"], "model.lr=3..a: could not convert string to float: 'a'"),
        (["--search", "model.lr=0.0..1:log"], "model.lr=0.0..1:log: "),
        (["--search", "model.lr=0.1..1", "--final"], "exclude each other"),
        (["--grid", "model.lr=0.1", "model.lr=0.2"], "appears twice"),
        (["--grid", "seed_everything=1,2"], "seed_everything is the same for all trials or belongs to each"),
        (["--grid", "data.val_size=60,90"], "data.val_size is the same"),
        (["--ckpt_path", "pretrained"], "ckpt_path is the same for all trials or belongs to each"),
        (["--search", "model.lr=0.1..0.2:linear"], "'linear' is no scale"),
        (["--data.val_size", "0"], "no validation images to compare trials by: add --data.val_size 10000"),
        (["--storage", "nonsense"], "Could not parse"),
        (["--storage", "postgresql://someone:secret@127.0.0.1:1/x"], "postgresql"),
    ],
)
def test_mistakes(start, tmp_path, arguments, message):
    process = start(*arguments)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in err
    assert "secret" not in err
    assert len(err.splitlines()) <= 3
    assert not list(tmp_path.glob("runs/*/version_0/results.csv"))


def test_without_optuna(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ImportError")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPTS / "trials.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: trials need Optuna, on Linux or macOS: pip install 'lenet_pl[trials]'\n"


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("final", [False, pytest.param(True, marks=pytest.mark.long)])
def test_no_trial_reads_a_test_image(cli, workdir, monkeypatch, capsys, final):
    """The real ``fit``, in this process: which of the two sets is opened."""
    from lenet_pl import datamodule

    opened, real = [], datamodule.FashionMNIST
    monkeypatch.setattr(
        datamodule, "FashionMNIST", lambda folder, train: opened.append(train) or real(folder, train=train)
    )

    class InProcess:
        def __init__(self, command, stdout, stderr):
            self.code = cli(*command[3:])[0]

        def poll(self):
            return self.code

        wait = terminate = poll

    def run(command, **options):
        code, out, _ = cli(*command[3:])
        return subprocess.CompletedProcess(command, code, out)

    monkeypatch.setattr(subprocess, "Popen", InProcess)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    recipe = "trainer: {max_epochs: 2}\ndata: {val_size: 60, batch_size: 8}\n"
    (workdir / "tiny.yaml").write_text(recipe)
    arguments = ["--config", "tiny.yaml", "--seeds", "2", "--workers", "1", *["--final"] * final]
    monkeypatch.setattr(sys, "argv", ["trials.py", *arguments])
    assert trials.main() == 0
    assert opened == [True, False, True, False] if final else opened == [True, True]
    for folder in workdir.glob("runs/*/version_0"):
        assert (folder / "test.json").exists() == final


@pytest.mark.long
def test_a_killed_worker_of_the_real_fit(workdir, tiny):
    """Two commands on one queue, one of them and its training killed: the weights are those of an undisturbed run."""
    patch = f"from lenet_pl import download\ndownload.FILES = {tiny[1]!r}\n"
    (workdir / "sitecustomize.py").write_text(patch)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(workdir), str(SCRIPTS.parent)])}
    weights = []
    for root in ("disturbed", "quiet"):
        command = [
            sys.executable,
            str(SCRIPTS / "trials.py"),
            "--config",
            "lenet.yaml",
            "--seeds",
            "2",
            "--workers",
            "1",
        ]
        command += ["--heartbeat", "2", "--trainer.max_epochs", "30", "--data.val_size", "60", "--data.batch_size", "8"]
        command += ["--trainer.default_root_dir", root]
        options = {"env": env, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        first = subprocess.Popen(command, **options)
        wait_for(lambda root=root: rows(workdir / root) >= 2)
        if root == "disturbed":
            second = subprocess.Popen(command, **options)
            os.killpg(first.pid, signal.SIGKILL)
            first.communicate()
            first = second
        out, _ = first.communicate(timeout=300)
        assert first.returncode == 0
        assert json.loads(out.splitlines()[-1])["table"][0]["n"] == 2
        assert rows(workdir / root) == 60
        weights.append(
            [conftest.weights(path) for path in sorted((workdir / root).glob("runs/*/*/checkpoints/last.ckpt"))]
        )
    assert conftest.same(*weights)
