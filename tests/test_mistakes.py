"""Every mistake costs one to three lines and the right exit code, before any work, and it changes no file."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lenet_pl import download
from lenet_pl.__main__ import COMMANDS, main

TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 2)
RUN = Path("runs/lenet/version_0")
LAST = RUN / "checkpoints/last.ckpt"

CONFIGS = {  # name: content
    "flow.yaml": b"model:\n  lr: [0.1\ndata: {}\n",
    "tab.yaml": b"model:\n\tlr: 0.1\n",
    "alias.yaml": b"model: *it\n",
    "list.yaml": b"- model\n- data\n",
    "scalar.yaml": b"hello\n",
    "empty.yaml": b"",
    "comments.yaml": b"# model:\n#   lr: 0.1\n",
    "binary.yaml": bytes(range(256)),
    "zeros.yaml": bytes(9),
    "utf16.yaml": "model: {lr: 0.1}".encode("utf-16"),
    "code.yaml": b'model: !!python/object/apply:os.system ["touch executed"]\n',
    "month.yaml": b"name: 2024-13-01\n",
    "key.yaml": b"trainer:\n  max_epoch: 3\n",
    "group.yaml": b"modle:\n  lr: 0.1\n",
    "twice3.yaml": b"trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    class_path: Timer\n",
    "class.yaml": b"model:\n  class_path: os.system\n",
    "type.yaml": b"model:\n  lr: fast\n",
    "number.yaml": b"1: 2\n",
    "nogroup.yaml": b"trainer:\n  max_epochs: 3\nmodel:\n",
    "nomapping.yaml": b"data: [1, 2]\n",
    "twice.yaml": b"model:\n  lr: 0.1\ntrainer: {}\nmodel:\n  dropout: 0.1\n",
    "twice2.yaml": b"model:\n  lr: 0.1\n  lr: 0.2\n",
    "command.yaml": b"fit:\n  model:\n    lr: 0.1\n",
    "range.yaml": b"model:\n  lr: -1\n",
    "gone.yaml": b"ckpt_path: gone.ckpt\n",
    "lenet.yaml": b"data:\n  val_size: 60\n",
    "cut.json": b'{"model": {"lr": 0.1',
}
CPU = "--trainer.accelerator cpu"
needs_no = {
    "GPU": pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has a GPU"),
    "CUDA": pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU of NVIDIA"),
    "MPS": pytest.mark.skipif(torch.backends.mps.is_available(), reason="has a GPU of Apple"),
}

# Command line -> what the message must contain: name, value, and what to do.
WRONG_USE = [
    # The command
    ("fti", "'fti'", "did you mean 'fit'"),
    ("Test", "'Test'", "did you mean 'test'"),
    ("train", "'train'", *COMMANDS),
    ("--config lenet.yaml fit", "'--config'", "the command comes first: python -m lenet_pl fit"),
    ("--model.lr 0.1", "'--model.lr'", "expected one of fit"),
    # Flags
    ("fit --confg lenet.yaml", "--confg", "did you mean --config?", "fit --help"),
    ("fit --modle.lr 0.1", "--modle.lr", "did you mean --model.lr?"),
    ("fit --modle.lr=0.1", "--modle.lr", "did you mean --model.lr?"),
    ("fit --lr 0.1", "--lr", "did you mean --model.lr?"),
    ("fit --trainer.max_epoch 3", "--trainer.max_epoch", "did you mean --trainer.max_epochs?"),
    ("fit --epochs 3", "--epochs", "did you mean --trainer.max_epochs?"),
    ("fit --seed 3", "--seed", "did you mean --seed_everything?"),
    ("fit model.lr=0.1", "model.lr", "did you mean --model.lr?"),
    ("fit lenet", "'lenet' stands alone", "--config"),
    ("test best", "'best' stands alone", "--ckpt_path"),
    ("test --data.images photos", "data.images=['photos']", "the command predict"),
    ("fit --name=", "name=''", "1 to 100 characters"),
    ("fit --model.learning_rate 3", "--model.learning_rate", "fit --help"),
    ("fit extra", "extra", "fit --help"),
    ("test --bogus", "--bogus", "test --help"),
    ("test --ckpt best", "--ckpt", "test --help"),
    ("fit --data.batchsize 8", "--data.batchsize", "did you mean --data.batch_size?"),
    ("fit --model.lr", "--model.lr", "expected one argument"),
    ("fit --config", "--config", "expected one argument"),
    ("fit --print_config=all", "print_config", "all"),
    # Types
    ("fit --model.lr fast", "model.lr=fast", "a number"),
    ("fit --model.lr null", "model.lr=None", "a number"),
    ("fit --model.lr=", "model.lr", "a number"),
    ("fit --data.batch_size 3.5", "data.batch_size=3.5", "an integer"),
    ("fit --data.batch_size 1e3", "data.batch_size=1000.0", "an integer"),
    ("fit --data.flip maybe", "data.flip=maybe", "true or false"),
    ("fit --trainer.max_epochs many", "trainer.max_epochs=many", "an integer or null"),
    ("fit --model 3", "model=", "3", "--model.lr 0.001"),
    ("fit --trainer null", "trainer=", "null", "expected settings"),
    # Config files
    (f"fit --config {'x' * 300}", "xxx", "does not exist"),
    (f"fit --name {'🥾' * 100}", "🥾", "1 to 100 characters"),
    ("fit --ckpt_path=", "Checkpoint ''", "does not exist"),
    ("fit --config 12345678", "12345678", "does not exist", "one of the recipes article, best"),
    ("fit --config lent.yaml", "lent.yaml", "did you mean lenet.yaml?"),
    ("fit --config besst", "besst", "did you mean best?"),
    ("fit --trainer.max_epochs=1e2", "trainer.max_epochs=1e2: expected an integer or null"),
    ("fit --config=lent.yaml", "lent.yaml", "did you mean lenet.yaml?"),
    ("test -c lent.yaml", "lent.yaml", "did you mean lenet.yaml?"),
    ("fit --config http://127.0.0.1/x.yaml", "http://127.0.0.1/x.yaml", "does not exist"),
    ("fit --config folder.yaml", "folder.yaml", "directory", "YAML"),
    ("fit --config flow.yaml", "flow.yaml, line 3", "','", "lr: 0.001"),
    ("fit --config tab.yaml", "tab.yaml, line 2", r"'\t'"),
    ("fit --config alias.yaml", "alias.yaml, line 1", "undefined alias 'it'"),
    ("fit --config cut.json", "cut.json, line 1", "expected ',' or '}'"),
    ("fit --config list.yaml", "list.yaml", "lr: 0.001"),
    ("fit --config scalar.yaml", "scalar.yaml", "lr: 0.001"),
    ("fit --config empty.yaml", "empty.yaml", "lr: 0.001"),
    ("fit --config comments.yaml", "comments.yaml", "lr: 0.001"),
    ("fit --config binary.yaml", "binary.yaml", "UTF-8"),
    ("fit --config zeros.yaml", "zeros.yaml", "lr: 0.001"),
    ("fit --config utf16.yaml", "utf16.yaml", "UTF-8"),
    ("fit --config code.yaml", "code.yaml, line 1", "python/object/apply:os.system"),
    ("fit --config month.yaml", "month.yaml", "month"),
    ("fit --config key.yaml", "trainer.max_epoch", "did you mean trainer.max_epochs?", "fit --help"),
    ("fit --config group.yaml", "modle.lr", "did you mean model.lr?"),
    ("fit --config twice3.yaml", "line 4", "class_path appears twice"),
    ("fit --config class.yaml", "class_path"),
    ("fit --config command.yaml", "fit.model.lr", "did you mean model.lr?"),
    ("fit --config type.yaml", "model.lr=fast", "a number"),
    ("fit --config range.yaml", "model.lr=-1", "above 0"),
    ("fit --config number.yaml", "1", "string"),
    ("fit --config nogroup.yaml", "nogroup.yaml, line 3: model", "lr: 0.001"),
    ("fit --config nomapping.yaml", "nomapping.yaml, line 1: data", "lr: 0.001"),
    ("fit --config twice.yaml", "twice.yaml, line 4: model", "appears twice; merge the two"),
    ("fit --config twice2.yaml", "twice2.yaml, line 3: lr", "appears twice; merge the two"),
    ("fit --config lenet.yaml --config type.yaml", "model.lr=fast"),
    ("fit --config gone.yaml", "gone.ckpt", "Give one of these"),
    # Ranges
    ("fit --data.val_size -1", "data.val_size=-1", "from 0 to 59999"),
    ("fit --data.val_size 60000", "data.val_size=60000", "from 0 to 59999"),
    ("fit --data.batch_size 0", "data.batch_size=0", "from 1 to 60000"),
    ("fit --data.batch_size 99999999999999999999", "data.batch_size=99999999999999999999", "from 1 to 60000"),
    ("fit --data.steps_per_execution 0", "data.steps_per_execution=0", "from 1"),
    ("fit --data.split_seed -1", "data.split_seed=-1", "from 0"),
    ("fit --data.shift 28", "data.shift=28", "from 0 to 27"),
    ("fit --data.std 0", "data.std=0", "above 0"),
    ("fit --data.std .nan", "data.std=nan", "above 0"),
    pytest.param("fit --data.std .inf", "data.std=inf", "finite"),
    pytest.param("fit --data.mean .nan", "data.mean=nan", "finite"),
    ("fit --model.lr 0", "model.lr=0", "above 0"),
    ("fit --model.lr -0.1", "model.lr=-0.1", "above 0"),
    ("fit --model.lr .nan", "model.lr=nan", "finite"),
    ("fit --model.lr nan", "model.lr=nan", "number"),
    ("fit --model.lr .inf", "model.lr=inf", "finite"),
    ("fit --model.dropout 1", "model.dropout=1", "from 0 to below 1"),
    ("fit --model.dropout -0.1", "model.dropout=-0.1", "from 0 to below 1"),
    ("fit --model.weight_decay -1", "model.weight_decay=-1", "at least 0"),
    ("fit --model.warmup 0", "model.warmup=0", "between 0 and 1"),
    ("fit --model.label_smoothing 2", "model.label_smoothing=2", "from 0 to 1"),
    ("fit --model.schedule cosine", "model.schedule=cosine", "'one_cycle'"),
    ("fit --model.variant lenet", "model.variant=lenet", "'article', 'classic'"),
    ("fit --seed_everything -1", "seed_everything=-1", "from 0 to 4294967295"),
    ("fit --seed_everything true", "seed_everything=True", "from 0 to 4294967295"),
    ("fit --seed_everything 4294967296", "seed_everything=4294967296", "from 0 to 4294967295"),
    # The trainer
    *((f"fit --trainer.max_epochs {n}", f"trainer.max_epochs={n}", "above 0") for n in (0, -5)),
    ("fit --trainer.max_steps 0", "trainer.max_steps=0", "above 0"),
    ("fit --trainer.max_time 1h", "1h", "DD:HH:MM:SS"),
    ("fit --trainer.limit_train_batches 0", "trainer.limit_train_batches=0", "above 0"),
    ("fit --trainer.limit_train_batches 1.5", "1.5 for limit_train_batches", "[0.0, 1.0] or an int"),
    ("test --trainer.limit_test_batches 0", "trainer.limit_test_batches=0", "above 0"),
    ("validate --trainer.limit_val_batches 0", "trainer.limit_val_batches=0", "above 0"),
    ("validate --data.val_size 0", "data.val_size=0", "use test"),
    ("fit --trainer.accumulate_grad_batches -1", "trainer.accumulate_grad_batches=-1", "above 0"),
    ("fit --trainer.check_val_every_n_epoch 0", "trainer.check_val_every_n_epoch=0", "above 0"),
    ("fit --trainer.gradient_clip_val -1", "trainer.gradient_clip_val=-1", "above 0"),
    ("fit --trainer.gradient_clip_algorithm x", "gradient_clip_algorithm", "x", "'norm'"),
    ("fit --trainer.precision 7", "trainer.precision=7", "'bf16-mixed'"),
    ("fit --trainer.precision half", "trainer.precision=half", "'bf16-mixed'"),
    ("fit --trainer.strategy nonsense", "strategy='nonsense'", "auto, ddp"),
    *((f"fit --trainer.strategy ddp_{s}", f"strategy=ddp_{s}", "auto or ddp") for s in ("spawn", "fork", "notebook")),
    ("fit --trainer.logger nonsense", "trainer.logger=nonsense", "a class such as"),
    ("fit --trainer.logger CSVLogger", "trainer.logger=", "CSVLogger", "save_dir"),
    ("fit --trainer.callbacks nonsense", "trainer.callbacks=nonsense", "a class such as"),
    ("fit --trainer.callbacks os.system", "trainer.callbacks=os.system", "a subclass of Callback"),
    ("fit --trainer.callbacks EarlyStopping", "trainer.callbacks=", "EarlyStopping", "monitor"),
    (
        "fit --trainer.callbacks EarlyStopping --trainer.callbacks.patience x",
        "EarlyStopping",
        "patience=x",
        "an integer",
    ),
    (
        "fit --trainer.callbacks EarlyStopping --trainer.callbacks.patiense 3",
        "EarlyStopping",
        "unknown option patiense",
    ),
    ("fit --trainer.logger WandbLogger", "WandbLogger", "wandb"),
    ("fit --trainer.callbacks EarlyStopping --trainer.callbacks.monitor val_acc --trainer.callbacks.mode up", "got up"),
    ("fit --trainer.callbacks ModelCheckpoint --trainer.callbacks.train_time_interval soon", "soon", "h:m:s"),
    ("fit --trainer.callbacks broken.X", "broken.X", "No module named"),
    ("predict --data.images", "--data.images", "at least one"),
    ("predict --trainer.limit_predict_batches 0", "trainer.limit_predict_batches=0", "above 0"),
    ("fit --trainer.profiler nonsense", "profiler", "'simple'"),
    ("fit --trainer.default_root_dir s3://bucket", "s3://bucket", "a folder"),
    *((f"fit {CPU} --trainer.devices {n}", f"trainer.devices={n}", "from 1 to") for n in (0, 9999)),
    *((f"fit {CPU} --trainer.devices {n}", "devices", "an int > 0") for n in (-1, -3, "x", [0])),
    pytest.param("fit --trainer.accelerator gpu", "No supported gpu backend", CPU, marks=needs_no["GPU"]),
    pytest.param("test --trainer.accelerator cuda", "CUDAAccelerator", CPU, marks=needs_no["CUDA"]),
    pytest.param("fit --trainer.accelerator mps", "MPSAccelerator", CPU, marks=needs_no["MPS"]),
    pytest.param("fit --trainer.accelerator tpu", "tpu", CPU, marks=needs_no["GPU"]),
    ("fit --trainer.accelerator nonsense", "accelerator='nonsense'", "cpu"),
    # The name of the run
    *(
        (f"fit --name {name}", f"name='{name}'", "1 to 100 characters")
        for name in ("a/b", "../up", "..", ".", "x" * 101)
    ),
    # Checkpoints
    ("test --ckpt_path gone.ckpt", "'gone.ckpt'", "does not exist", "Give one of these"),
    ("test --ckpt_path=", "''", "does not exist"),
    ("test --ckpt_path folder.ckpt", "'folder.ckpt'", "is not a file"),
    (f"test --ckpt_path {RUN}", f"'{RUN}'", "is not a file", str(LAST)),
    ("test --ckpt_path http://127.0.0.1/x.ckpt", "'http://127.0.0.1/x.ckpt'", "download it"),
    ("fit --ckpt_path file:///x.ckpt", "'file:///x.ckpt'", "download it"),
    ("test --ckpt_path empty.ckpt", "'empty.ckpt'", "empty", "--ckpt_path"),
    ("test --ckpt_path cut.ckpt", "'cut.ckpt'", "cut off", "--ckpt_path"),
    ("fit --ckpt_path cut.ckpt", "'cut.ckpt'", "cut off", "--ckpt_path"),
    ("test --ckpt_path random.ckpt", "'random.ckpt'", "not a checkpoint", "--ckpt_path"),
    ("validate --ckpt_path flipped.ckpt", "'flipped.ckpt'", "CRC", "--ckpt_path"),
    (f"test --ckpt_path {LAST}".replace("last", "lsat"), "lsat.ckpt", str(LAST)),
    ("predict --data.images gone.png", "gone.png", "no such file"),
    ("predict --ckpt_path bomb.ckpt", "'bomb.ckpt'", "would run code", "system", "--ckpt_path"),
    ("fit --ckpt_path bomb.ckpt", "'bomb.ckpt'", "would run code", "nothing was executed"),
    ("test --ckpt_path foreign.ckpt", "'foreign.ckpt'", "lacks hyper_parameters", "--ckpt_path"),
    ("fit --ckpt_path weights.ckpt", "'weights.ckpt'", "no training to resume", "optimizer_states"),
    ("test --ckpt_path settings.ckpt", "'settings.ckpt'", "width"),
    ("test --ckpt_path net.ckpt", "'net.ckpt'", "do not fit the net", "net.classifier.0.weight"),
    ("fit --ckpt_path net.ckpt", "'net.ckpt'", "do not fit the net", "net.classifier.0.weight"),
    ("test --model.variant classic", str(RUN), "model.variant=classic", "Leave that option"),
    ("fit --ckpt_path last --data.mean 0", "data.mean=0.0", str(LAST), "expected 0.286", "without --ckpt_path"),
    ("fit --ckpt_path last --data.val_size 50", "data.val_size=50", str(LAST), "expected 60, as in"),
    ("fit --ckpt_path last --data.split_seed 1", "data.split_seed=1", "expected 0, as in"),
    ("fit --config article --ckpt_path last", "there is no run of the name 'article'"),
    (f"fit --config article --ckpt_path {LAST}", "data.mean=0.0", "expected 0.286"),
    ("fit --threads 0", "threads=0", "from 1 to"),
    ("fit --ckpt_path last --model.variant classic", str(LAST), "model.variant=classic"),
    ("fit --ckpt_path last --trainer.max_epochs 1", "trainer.max_epochs=1", str(LAST), "epoch 2"),
    ("fit --ckpt_path last --model.lr oops", "model.lr=oops", "a number"),
    (
        "fit --data.val_size 60 --model.schedule one_cycle --trainer.max_epochs null --trainer.max_time 00:00:01:00",
        "model.schedule='one_cycle'",
        "max_epochs",
    ),
    ("predict --output empty.yaml", "output=empty.yaml", "expected a folder"),
    ("export --output empty.yaml", "output=empty.yaml", "expected a folder"),
    *((f"{command} --output x", "unknown option --output") for command in ("fit", "test", "validate", "report")),
]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A folder with a finished run of two epochs, damaged checkpoints, and config files."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "FILES", tiny[1])
        patch.chdir(folder)
        assert main(["fit", *map(str, TINY), "--data.data_dir", str(tiny[0])]) == 0
        content, whole = torch.load(LAST, weights_only=True), LAST.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for name, data in {
            "empty.ckpt": b"",
            "cut.ckpt": whole[: len(whole) // 2],
            "random.ckpt": torch.arange(5000).mul(7919).to(torch.uint8).numpy().tobytes(),
            "flipped.ckpt": bytes(flipped),
            **CONFIGS,
        }.items():
            Path(name).write_bytes(data)
        hyper = content["hyper_parameters"]
        torch.save(content | {"x": Bomb()}, "bomb.ckpt")
        torch.save({"state_dict": content["state_dict"]}, "foreign.ckpt")
        torch.save({k: v for k, v in content.items() if k != "optimizer_states"}, "weights.ckpt")
        torch.save(content | {"hyper_parameters": hyper | {"width": 3}}, "settings.ckpt")
        torch.save(content | {"hyper_parameters": hyper | {"variant": "classic"}}, "net.ckpt")
        for name in ("folder.yaml", "folder.ckpt"):
            Path(name).mkdir()
    return folder


class Bomb:
    """An object whose pickle runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def here(trained, workdir):
    """The current folder with a copy of ``trained``."""
    shutil.copytree(trained, workdir, dirs_exist_ok=True)
    return workdir


def files(folder):
    """All files and folders in a folder, with the content of the files."""
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def check_message(err, *needles):
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 3, err
    assert len(err) < 800, err
    assert "Traceback" not in err
    for needle in needles:
        assert needle in err, err


def rows(table, quick=1):
    """Turns the rows of a table into cases. One of ``quick`` belongs to the fast suite; the others are long proofs."""
    for number, row in enumerate(table):
        command, *needles = getattr(row, "values", row)
        marks = [*getattr(row, "marks", ()), *([pytest.mark.long] if number % quick else [])]
        yield pytest.param(command, needles, marks=marks, id=command[:60])


@pytest.mark.parametrize(("command", "needles"), list(rows(WRONG_USE, quick=2)))
def test_wrong_use(cli, here, command, needles):
    before = files(here)
    code, _, err = cli(*command.split(" "))
    assert code == 2, err
    check_message(err, *needles)
    assert files(here) == before


def test_nothing_to_resume_or_to_score(cli, workdir):
    for command, name in (
        ("test --ckpt_path best", "best"),
        ("predict --ckpt_path best", "best"),
        ("fit --ckpt_path last", "last"),
    ):
        code, _, err = cli(*command.split())
        assert code == 2
        check_message(err, repr(name), "none yet but the package's", "fit --config lenet\n")
    assert [p.name for p in workdir.iterdir()] == ["data"]


def test_a_finished_run_is_no_mistake(cli, here):
    before = files(here)
    code, out, err = cli("fit", "--ckpt_path", "last")
    assert (code, err) == (0, "")
    assert "Test accuracy" in out
    after = files(here)
    assert all(after[p] == before[p] for p in before if p.suffix in (".ckpt", ".csv"))


# What goes wrong at run time: exit code 1


def test_a_file_in_the_place_of_the_data(cli, workdir):
    Path("taken").write_text("mine")
    code, _, err = cli("fit", *TINY, "--data.data_dir", "taken")
    assert code == 1
    check_message(err, "taken", "Not a directory", "data_dir")
    assert {p.name for p in workdir.iterdir()} == {"data", "taken"}


def test_neither_data_nor_network(cli, workdir, monkeypatch):
    monkeypatch.setattr(download, "SOURCES", ("/nowhere",))
    code, _, err = cli("fit", "--data.data_dir", "other")
    assert code == 1
    assert "Traceback" not in err
    for needle in ("/nowhere", "other/FashionMNIST/raw", "LENET_PL_DATA_SOURCE"):
        assert needle in err
    assert not (workdir / "runs").exists()


@pytest.mark.parametrize("place", ["runs", "runs/lenet"])
def test_a_file_in_the_place_of_the_runs(cli, workdir, place):
    (workdir / place).parent.mkdir(exist_ok=True)
    (workdir / place).write_text("mine")
    code, out, err = cli("fit", *TINY)
    assert code == 1
    check_message(err, place, "--trainer.default_root_dir")
    assert "epoch" not in out
    assert (workdir / place).read_text() == "mine"


def test_no_permission_for_the_run_folder(cli, workdir, monkeypatch):
    def refuse(self, *args, **kwargs):
        if "runs" in self.parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return mkdir(self, *args, **kwargs)

    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write everywhere
    code, out, err = cli("fit", *TINY)
    assert code == 1
    check_message(err, "runs/lenet/version_0", "Permission denied", "--trainer.default_root_dir")
    assert "epoch" not in out


@pytest.mark.parametrize("writes", [0, 3, 5])
def test_full_disk(cli, workdir, monkeypatch, writes):
    """The disk is full before anything is written, or after some writes of the first or the second epoch."""

    def fsync(file):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    sync, left = os.fsync, 2 * writes  # file and folder
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        code, _, err = cli("fit", *TINY)
    assert code == 1
    check_message(err, "No space left on device", "--trainer.default_root_dir")
    assert not list(workdir.rglob("*.tmp"))
    assert RUN.exists() == (writes > 0)
    if writes == 5:  # config, row, best and last of the first epoch, row of the second
        code, _, err = cli("fit", "--ckpt_path", "last")
        assert code == 0, err
        assert cli("fit", *TINY, "--name", "whole")[0] == 0
        whole = weights(str(LAST).replace("lenet", "whole"))
        assert all(torch.equal(w, whole[name]) for name, w in weights(LAST).items())


# Around the messages


def test_debug_shows_the_traceback(cli, workdir, monkeypatch):
    monkeypatch.setenv("LENET_PL_DEBUG", "1")
    code, _, err = cli("fit", "--model.lr", 0)
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: model.lr=0.0")


def test_an_unforeseen_error_is_named_with_its_kind(cli, workdir, monkeypatch):
    def fail(data_dir):
        raise KeyError("mystery\n" * 500)

    monkeypatch.setattr(download, "ensure", fail)
    code, _, err = cli("fit", *TINY)
    assert code == 1
    check_message(err, "KeyError", "mystery", "LENET_PL_DEBUG=1")


def test_a_mistake_in_the_command_is_told_without_importing_torch(spawn):
    process = spawn("fti", prelude="import atexit; atexit.register(lambda: print('torch' in sys.modules))")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "False\n")
    check_message(err, "did you mean 'fit'?")


@pytest.mark.long
def test_the_exit_code_reaches_the_shell(spawn, workdir):
    process = spawn("fit", "--model.lr", "fast")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    check_message(err, "model.lr=fast: expected a number")
    assert not (workdir / "runs").exists()


@pytest.mark.long
def test_the_console_stays_clean(spawn, here):
    """There are no warnings, tips or deprecations, in an ordinary process on a terminal that knows only ASCII."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    before = "for command in (['fit', '--help'], ['validate'], ['test'], ['predict']): assert main(command) == 0"
    process = spawn("fit", "--ckpt_path", "last", "--trainer.max_epochs", 3, prelude=before, env=env)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "Tip" not in out
    for needle in ("--model.dropout", "val_acc", "Test accuracy", "epoch 3/3"):
        assert needle in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_console_that_takes_nothing(spawn):
    with Path("/dev/full").open("w") as full:
        process = spawn("--help", stdout=full)
        assert process.communicate(timeout=30)[1] == "error: standard output: No space left on device\n"
    assert process.returncode == 1


@pytest.mark.parametrize("error", ["OSError('libgomp.so.1: no such file')", "ModuleNotFoundError('torch')"])
def test_a_library_is_missing(spawn, error):
    prelude = "class Finder:\n    def find_spec(name, path, target=None):\n"
    prelude += f"        if name == 'torch': raise {error}\n"
    prelude += "sys.meta_path.insert(0, Finder)"
    process = spawn("test", prelude=prelude)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    first, *rest = err.splitlines()
    kind, _, text = error.partition("('")
    assert first == f"error: {kind}: {text[:-2]}"
    assert len(rest) == 2
    assert ".venv/bin/activate" in rest[0]


# Fuzz: whatever is given, never a traceback

KEYS = ["trainer", "model", "data", "max_epochs", "devices", "callbacks", "lr", "dropout", "val_size", "std", "name"]
FLAGS = ["--config", "--ckpt_path", "--model", "--model.lr", "--data.flip", "--trainer.logger", "--trainer.devices"]
FLAGS += ["--trainer.precision", "--seed_everything", "--name", "--print_config", "--", "-c", "--no"]
VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**30, "1e-3"])
)
TREES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | VALUES, inner, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(
    st.sampled_from(KEYS[:3]), st.dictionaries(st.sampled_from(KEYS[3:]), TREES, max_size=2), max_size=3
)
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", 15)),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check_fuzzed(outcome):
    code, _, err = outcome
    assert code in (0, 2), err
    if code or err:
        check_message(err)


@FUZZ
@given(
    content=st.binary(max_size=50)
    | st.text(max_size=50).map(str.encode)
    | st.text("-: []{}&*!#|>'\"\n\tmodel", max_size=50).map(str.encode)
    | (TREES | SETTINGS).map(lambda tree: yaml.safe_dump(tree).encode())
)
def test_any_config_file(cli, workdir, content):
    Path("fuzz.yaml").write_bytes(content)
    check_fuzzed(cli("fit", "--config", "fuzz.yaml", "--trainer.max_steps", 0))  # refused at the end: nothing trains


@FUZZ
@given(flags=st.lists(st.sampled_from(FLAGS) | VALUES | TREES, max_size=5))
def test_any_flags(cli, workdir, flags):
    check_fuzzed(cli("fit", *flags, "--trainer.max_steps", 0))


@FUZZ
@given(name=st.sampled_from(FLAGS[2:]), value=TREES | st.text())
def test_any_value(cli, workdir, name, value):
    check_fuzzed(cli("fit", f"{name}={value}", "--print_config"))
