"""Every mistake costs one to three kind lines with name, value and remedy, and leaves nothing behind."""

import os
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BEST = "runs/lenet/version_0/checkpoints/best.ckpt"

# command → exit code, and what has to stand on stderr
TABLE = [
    # the command
    ("fti", 2, ["'fti'", "'fit'"]),
    ("train", 2, ["'train'", "fit"]),
    ("--config mine.yaml fit", 2, ["the command comes first", "fit --config"]),
    ("--model.lr 1", 2, ["--model.lr"]),
    # flags and keys
    ("fit --modle.lr 1", 2, ["--modle.lr", "--model.lr"]),
    ("fit --model.lrr=1", 2, ["--model.lrr", "--model.lr"]),
    ("fit --lr 0.1", 2, ["--lr", "--model.lr"]),
    ("fit --data.batchsize 8", 2, ["--data.batchsize", "--data.batch_size"]),
    ("fit surplus", 2, ["surplus"]),
    ("test --ckpt best", 2, ["--ckpt", "test --help"]),
    ("fit --config absent.yaml", 2, ["absent.yaml"]),
    ("fit --config key.yaml", 2, ["model.lrr", "model.lr"]),
    ("fit --config syntax.yaml", 2, ["syntax.yaml", "line"]),
    ("fit --config list.yaml", 2, ["list.yaml"]),
    ("fit --config scalar.yaml", 2, ["scalar.yaml"]),
    ("fit --config binary.yaml", 2, ["binary.yaml"]),
    ("fit --config folder.yaml", 2, ["folder.yaml"]),
    ("fit --config type.yaml", 2, ["data.batch_size=many"]),
    # types
    ("fit --model.lr fast", 2, ["model.lr=fast", "a number"]),
    ("fit --data.batch_size 1.5", 2, ["data.batch_size=1.5", "an integer"]),
    ("fit --data.flip maybe", 2, ["data.flip=maybe", "true or false"]),
    ("fit --trainer.max_epochs soon", 2, ["trainer.max_epochs=soon", "an integer"]),
    ("fit --trainer.precision 7", 2, ["trainer.precision=7"]),
    ("fit --seed_everything x", 2, ["seed_everything=x"]),
    ("fit --seed_everything=-1", 2, ["seed_everything=-1"]),
    # ranges
    ("fit --data.val_size=-1", 2, ["data.val_size=-1", "0 to 59999"]),
    ("fit --data.val_size 60000", 2, ["data.val_size=60000", "0 to 59999"]),
    ("fit --data.batch_size 0", 2, ["data.batch_size=0", "1 to"]),
    ("fit --data.steps_per_execution 0", 2, ["data.steps_per_execution=0", "1 to"]),
    ("fit --data.shift 28", 2, ["data.shift=28", "0 to 27"]),
    ("fit --data.std 0", 2, ["data.std=0", "above 0"]),
    ("fit --data.split_seed=-1", 2, ["data.split_seed=-1"]),
    ("fit --model.lr 0", 2, ["model.lr=0", "above 0"]),
    ("fit --model.lr=-0.1", 2, ["model.lr=-0.1", "above 0"]),
    ("fit --model.lr nan", 2, ["model.lr=nan", "a number"]),
    ("fit --model.lr inf", 2, ["model.lr=inf", "a number"]),
    ("fit --model.dropout 1", 2, ["dropout=1", "below 1"]),
    ("fit --model.weight_decay=-1", 2, ["model.weight_decay=-1", "at least 0"]),
    ("fit --model.ema_decay 1", 2, ["model.ema_decay=1", "below 1"]),
    ("fit --model.label_smoothing 2", 2, ["model.label_smoothing=2", "0 to 1"]),
    ("fit --model.warmup 0", 2, ["model.warmup=0", "between 0 and 1"]),
    ("fit --model.schedule linear", 2, ["model.schedule='linear'", "one_cycle"]),
    ("fit --model.variant resnet", 2, ["variant='resnet'", "classic"]),
    ("fit --model.tta rotate", 2, ["model.tta='rotate'", "flip"]),
    ("fit --trainer.max_epochs=-5", 2, ["max_epochs=-5"]),
    ("fit --name a/b", 2, ["name='a/b'", "letters"]),
    # the machine
    ("fit --trainer.accelerator gpu", 2, ["accelerator=gpu", "--trainer.accelerator cpu"]),
    ("fit --trainer.accelerator cuda", 2, ["accelerator=cuda", "--trainer.accelerator cpu"]),
    ("fit --trainer.accelerator warp", 2, ["accelerator=warp", "cpu"]),
    ("fit --trainer.accelerator cpu --trainer.devices 0", 2, ["devices=0"]),
    ("fit --trainer.strategy telepathy", 2, ["telepathy"]),
    # checkpoints
    ("test", 2, ["'best'", "fit --config configs/lenet.yaml"]),
    ("fit --ckpt_path last", 2, ["'last'", "fit --config configs/lenet.yaml"]),
    ("test --ckpt_path absent.ckpt", 2, ["absent.ckpt", "fit --config configs/lenet.yaml"]),
    ("test --ckpt_path http://example.org/best.ckpt", 2, ["http://example.org/best.ckpt", "local"]),
    ("test --ckpt_path odd/empty.ckpt", 2, ["empty.ckpt", "empty"]),
    ("test --ckpt_path odd/random.ckpt", 2, ["random.ckpt"]),
    ("test --ckpt_path odd/foreign.ckpt", 2, ["foreign.ckpt", "lenet_pl"]),
    ("test --ckpt_path folder.yaml", 2, ["folder.yaml"]),
]


@pytest.fixture
def mistakes(workdir, monkeypatch):
    """The files that the table's commands name."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, text in {
        "mine.yaml": "model: {lr: 0.01}\n",
        "key.yaml": "model:\n  lrr: 0.1\n",
        "syntax.yaml": "model:\n  lr: [\n",
        "list.yaml": "- 1\n- 2\n",
        "scalar.yaml": "lenet\n",
        "type.yaml": "data:\n  batch_size: many\n",
    }.items():
        Path(name).write_text(text)
    Path("binary.yaml").write_bytes(bytes(range(256)))
    Path("folder.yaml").mkdir()
    Path("odd").mkdir()
    Path("odd/empty.ckpt").touch()
    Path("odd/random.ckpt").write_bytes(os.urandom(1000))
    torch.save({"weights": torch.zeros(3)}, "odd/foreign.ckpt")
    return workdir


@pytest.mark.parametrize(("command", "code", "said"), TABLE, ids=[row[0] for row in TABLE])
def test_a_mistake_costs_three_lines_at_most(cli, mistakes, command, code, said):
    before = sorted(mistakes.rglob("*"))
    got, _, err = cli(*shlex.split(command))
    assert got == code, err
    assert 1 <= len(err.strip().splitlines()) <= 3, err
    assert "Traceback" not in err
    for text in said:
        assert text in err
    assert sorted(mistakes.rglob("*")) == before


def test_the_table_is_long_enough():
    assert len({row[0] for row in TABLE}) >= 40


TINY = ("--data.val_size", 60, "--data.batch_size", 8, "--trainer.max_epochs", 1)


def test_mistakes_with_a_run_at_hand(cli, mistakes):
    assert cli("fit", *TINY)[0] == 0
    data = Path(BEST).read_bytes()
    Path("cut.ckpt").write_bytes(data[:5000])
    for args, said in [
        (("test", "--ckpt_path", "best", "--model.variant", "classic"), ["classic", "--ckpt_path"]),
        (("test", "--ckpt_path", "cut.ckpt"), ["cut.ckpt"]),
        (("test", "--ckpt_path", BEST.replace("best", "bset")), ["bset.ckpt", BEST]),
        (("fit", "--ckpt_path", "last", "--model.schedule", "one_cycle"), ["one_cycle", "constant"]),
        (("predict", "--data.images", "absent.png"), ["absent.png", "no such file"]),
        (("validate", "--data.val_size", 0), ["data.val_size=0"]),
    ]:
        code, _, err = cli(*args)
        assert code == 2, err
        assert len(err.strip().splitlines()) <= 3
        assert all(text in err for text in said), err


def test_a_pickle_that_would_run_code_runs_nothing(cli, mistakes):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    code, _, err = cli("test", "--ckpt_path", "bomb.ckpt")
    assert code == 2
    assert "bomb.ckpt" in err
    assert "nothing was executed" in err
    assert not Path("exploded").exists()


def test_no_data_and_no_network_says_what_was_tried(cli, mistakes, monkeypatch):
    monkeypatch.setattr("lenet_pl.download.SOURCES", ("/nowhere",))
    code, _, err = cli("fit", "--data.data_dir", "other")
    assert code == 1
    assert "/nowhere" in err
    assert "LENET_PL_DATA_SOURCE" in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_a_run_folder_that_cannot_be_made_is_named(cli, mistakes):
    Path("runs").write_text("a file in the way")
    code, _, err = cli("fit", *TINY)
    assert code == 1
    assert "runs" in err
    assert len(err.strip().splitlines()) <= 3


def test_debug_shows_the_traceback(cli, mistakes, monkeypatch):
    monkeypatch.setenv("LENET_PL_DEBUG", "1")
    code, _, err = cli("fit", "--model.lr", "0")
    assert code == 2
    assert "Traceback" in err


words = st.text("abcdefghilmnoprstuvxyz_.-=0123456789 []{}:,'\"\\\n", max_size=30)
quick = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(
    st.lists(words | st.sampled_from(["--model.lr", "--config", "mine.yaml", "--data.flip", "--ckpt_path"]), max_size=4)
)
def test_no_flags_give_a_traceback(cli, mistakes, args):
    code, _, err = cli("fit", *args, "--print_config")
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert code == 0 or 1 <= len(err.strip().splitlines()) <= 3, err


@quick
@given(
    st.binary(max_size=60)
    | words.map(str.encode)
    | st.just(b"model:\n  lr: ").flatmap(lambda p: words.map(lambda w: p + w.encode()))
)
def test_no_config_file_gives_a_traceback(cli, mistakes, content):
    Path("fuzz.yaml").write_bytes(content)
    code, _, err = cli("fit", "--config", "fuzz.yaml", "--print_config")
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert code == 0 or 1 <= len(err.strip().splitlines()) <= 3, err
