"""Checkpoints are written atomically, and every damaged or foreign file is refused."""

import errno
import io
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lenet_pl.atomic import write_atomic
from lenet_pl.checkpoint import AtomicCheckpointIO, load
from lenet_pl.errors import CheckpointError
from lenet_pl.runs import find

# Lightning 2.6 builds a class that torch 2.14 deprecates; newer releases of either may need no filter.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


class Tiny(LightningModule):
    """A module of 33,000 weights. With Adam's two moments its checkpoint has about 400 KB."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 1))

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def trainer(epochs: int) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
    )


class Batches:
    """A loader of two batches. A list would not do, because Lightning takes it for several loaders."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.linspace(-1, 1, 1024).reshape(2, 2, 256))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint written by a Trainer through the plugin, after one epoch of two steps."""
    path = tmp_path_factory.mktemp("made") / "new" / "folders" / "last.ckpt"
    torch.manual_seed(0)
    t = trainer(1)
    t.fit(Tiny(), Batches())
    t.save_checkpoint(path)
    return path


def same(a: Any, b: Any) -> bool:
    """Whether two nested containers of tensors and plain values are equal to the bit, with types and key order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def refusal(path: Path | str, **kwargs: Any) -> str:
    """The message with which ``load`` refuses a file. It must name the file and be short."""
    with pytest.raises(CheckpointError) as caught:
        load(path, **kwargs)
    text = str(caught.value)
    assert str(path) in text
    assert len(text.splitlines()) <= 3
    assert max(map(len, text.splitlines())) < 160 + len(str(path))
    return text


# Saving


def test_trainer_saves_and_resumes_through_the_plugin(sound: Path) -> None:
    content = load(sound)
    assert sound.stat().st_size > 390_000
    assert (content["global_step"], content["hyper_parameters"]) == (2, {"lr": 0.1})
    assert same(content, torch.load(sound, weights_only=True))  # stays a plain torch file
    assert same(Tiny.load_from_checkpoint(sound).state_dict(), content["state_dict"])
    resumed = trainer(2)
    resumed.fit(Tiny(), Batches(), ckpt_path=sound)
    assert resumed.global_step == 4
    assert [p.name for p in sound.parent.iterdir()] == ["last.ckpt"]


def test_resuming_from_a_damaged_file_is_refused(sound: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "last.ckpt"
    damaged.write_bytes(flipped(sound.read_bytes(), 200_000))
    with pytest.raises(CheckpointError, match=r"last\.ckpt' is damaged"):
        trainer(2).fit(Tiny(), Batches(), ckpt_path=damaged)


def test_map_location_is_honoured_and_weights_only_is_not(sound: Path, tmp_path: Path) -> None:
    io_plugin = AtomicCheckpointIO()
    meta = io_plugin.load_checkpoint(sound, map_location="meta")
    assert {t.device.type for t in meta["state_dict"].values()} == {"meta"}
    bomb, witness = tmp_path / "bomb.ckpt", tmp_path / "executed"
    torch.save(Bomb(witness), bomb)
    with pytest.raises(CheckpointError, match="would run code"):
        io_plugin.load_checkpoint(str(bomb), weights_only=False)
    assert not witness.exists()


def test_remove(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    AtomicCheckpointIO().remove_checkpoint(str(tmp_path / "a.ckpt"))
    AtomicCheckpointIO().remove_checkpoint(tmp_path / "a.ckpt")  # absent: fine
    assert list(tmp_path.iterdir()) == []


def test_only_local_paths_and_no_storage_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="URL"):
        AtomicCheckpointIO().save_checkpoint({}, "s3://bucket/last.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, "last.ckpt", storage_options={})
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "a", []
    path.write_bytes(b"old")

    def fsync(descriptor: int) -> None:
        files = {p.stat().st_ino: p for p in tmp_path.iterdir()}
        target = files.get(os.fstat(descriptor).st_ino)
        events.append(target.read_bytes() if target else "folder")

    replace = Path.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda a, b: [events.append("rename"), replace(a, b)])
    write_atomic(path, b"new")
    assert events == [b"new", "rename", "folder"]
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()  # others may read it, as with a plain open


def umask() -> int:
    os.umask(value := os.umask(0))
    return value


class Full(io.FileIO):
    """A file on a disk that has space for 1000 bytes."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_at(step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises ``error`` at a step of ``write_atomic``. Real permissions prove little: root ignores them."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    if step == "write":
        monkeypatch.setattr(Path, "open", lambda self, mode: Full(self, mode))
    else:
        monkeypatch.setattr({"open": Path, "fsync": os, "replace": Path}[step], step, fail)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("open", PermissionError(errno.EACCES, "Permission denied")),  # swallowed by Lightning's own plugin
        ("open", OSError(errno.EROFS, "Read-only file system")),
        ("write", OSError(errno.ENOSPC, "No space left on device")),
        ("fsync", OSError(errno.EIO, "Input/output error")),
        ("replace", KeyboardInterrupt()),  # between the two
    ],
)
def test_a_failed_save_raises_and_keeps_the_previous_checkpoint(
    step: str, error: BaseException, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(sound.read_bytes())
    with monkeypatch.context() as patch:
        fails_at(step, error, patch)
        with pytest.raises(type(error)) as caught:
            AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(99_999)}}, path)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert path.read_bytes() == sound.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file_in_the_place_of_the_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OSError, match="checkpoints"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_raises(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")


def test_the_leftover_of_a_killed_writer_does_no_harm(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    (tmp_path / ".last.ckpt.4711.tmp").write_bytes(b"half")  # another process may be writing it just now
    path.write_bytes(sound.read_bytes())
    AtomicCheckpointIO().save_checkpoint(load(path), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".last.ckpt.4711.tmp", "last.ckpt"]
    assert same(load(path), load(sound))


# Loading

MINIMAL = {"state_dict": {}, "hyper_parameters": {}, "global_step": 0, "pytorch-lightning_version": "2.6.6"}


def flipped(data: bytes, position: int, mask: int = 0xFF) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def silently_wrong(
    reader: Callable[[Path], Any], sound: Path, folder: Path, positions: list[tuple[int, int]]
) -> list[int]:
    """Returns the positions where a flip changes the content and is not refused. Errors that are not ours get out."""
    data, truth = sound.read_bytes(), load(sound)
    path, wrong, texts = folder / "flipped.ckpt", [], []
    for position, mask in positions:
        path.write_bytes(flipped(data, position, mask))
        try:
            content = reader(path)
        except CheckpointError as e:
            texts.append(str(e))
        else:
            wrong += [] if same(content, truth) else [position]
    assert all(str(path) in text and len(text.splitlines()) <= 3 for text in texts)
    assert len(texts) + len(wrong) > 0.2 * len(positions)  # the flips hit something
    return wrong


def test_every_997th_byte_flipped_is_reported_or_harmless(sound: Path, tmp_path: Path) -> None:
    positions = [(i, 0xFF) for i in range(0, sound.stat().st_size, 997)]
    assert len(positions) > 390
    assert silently_wrong(load, sound, tmp_path, positions) == []


@pytest.mark.long
def test_every_byte_of_a_small_checkpoint_flipped_is_reported_or_harmless(tmp_path: Path) -> None:
    """No CRC covers most of this file: headers, names, padding, directory. In each byte all bits flip, then one."""
    small = tmp_path / "small.ckpt"
    weights = {"w": torch.arange(9.0), "n": torch.tensor(3)}
    AtomicCheckpointIO().save_checkpoint({**MINIMAL, "state_dict": weights}, small)
    draw = random.Random(0)
    masks = [(i, mask) for i in range(small.stat().st_size) for mask in (0xFF, 1 << draw.randrange(8))]
    assert silently_wrong(load, small, tmp_path, masks) == []


def test_negative_control_plain_torch_lets_a_flip_through(sound: Path, tmp_path: Path) -> None:
    middle = sound.stat().st_size // 2

    def plain(path: Path) -> Any:
        return torch.load(path, weights_only=True)

    assert silently_wrong(plain, sound, tmp_path, [(middle, 0xFF)]) == [middle]
    assert silently_wrong(load, sound, tmp_path, [(middle, 0xFF)]) == []


def test_a_member_said_to_be_a_folder_is_read_all_the_same(sound: Path, tmp_path: Path) -> None:
    """``testzip`` cannot see this flip, and plain ``torch.load`` returns uninitialised memory after it."""
    data, path = sound.read_bytes(), tmp_path / "flipped.ckpt"
    with zipfile.ZipFile(sound) as archive:
        entries = [i for i in range(archive.start_dir, len(data)) if data.startswith(b"PK\x01\x02", i)]
        assert len(entries) == len(archive.infolist())
    for entry in entries:
        path.write_bytes(flipped(data, entry + 38, 0x10))  # external attributes, DOS directory bit
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert same(load(path), load(sound))


class Bomb:
    """An object that makes a file when the standard unpickler reads it."""

    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("disguise", ["whole", "hyper_parameters", "protocol 4", "bare pickle", "legacy torch"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    disguise: str, sound: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path, witness = tmp_path / "best.ckpt", tmp_path / "executed"
    bomb = Bomb(witness)
    if disguise == "bare pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif disguise == "legacy torch":
        torch.save(bomb, path, _use_new_zipfile_serialization=False)
    elif disguise == "protocol 4":
        torch.save(bomb, path, pickle_protocol=4)
    else:
        torch.save(bomb if disguise == "whole" else {**load(sound), "hyper_parameters": bomb}, path)
    text = refusal(path)
    assert not witness.exists()
    assert not recwarn.list  # torch warns about protocol 4: more lines than a mistake may cost
    assert {
        "bare pickle": "was not opened",
        "legacy torch": "was not opened",
        "protocol 4": "holds more than tensors and plain values: it was refused, and nothing was executed",
    }.get(disguise, "system): it was refused, and nothing was executed") in text
    if disguise == "whole":  # negative control: the bomb is live
        torch.load(path, weights_only=False)
        assert witness.exists()


@pytest.mark.parametrize("kept", [1, 3, 4, 100, 0.3, 0.9, -300, -22, -1])
def test_truncated(kept: float, sound: Path, tmp_path: Path) -> None:
    data = sound.read_bytes()
    path = tmp_path / "last.ckpt"
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert "damaged, cut off or not a checkpoint" in refusal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (random.Random(0).randbytes(5000), "does not begin like one"),
        (b"PK\x03\x04" + random.Random(0).randbytes(5000), "not a zip file"),
        (b"lr: 0.1\n", "does not begin like one"),
        (pickle.dumps({"state_dict": {}}), "does not begin like one"),
    ],
    ids=["empty", "random", "random after the magic", "text", "pickle"],
)
def test_no_archive(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": 1}, "lacks state_dict, hyper_parameters, global_step, pytorch-lightning_version"),
        (nn.Linear(2, 2).state_dict(), "lacks state_dict"),
        ([1, 2], "lacks state_dict"),
        ({"state_dict": 7, "hyper_parameters": {}, "global_step": 1}, "lacks state_dict, pytorch-lightning"),
        (nn.Linear(2, 2), "would run code (torch.nn.modules.linear.Linear)"),
    ],
    ids=["dict", "weights", "list", "wrong types", "module"],
)
def test_foreign_torch_files(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    assert reason in refusal(path)


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "data.pkl" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert "'archive/data.pkl' is compressed" in refusal(path)


def test_no_file(tmp_path: Path) -> None:
    assert "does not exist or is not a file" in refusal(tmp_path / "missing.ckpt")
    assert "does not exist or is not a file" in refusal(tmp_path)
    assert "does not exist or is not a file" in refusal("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    assert "does not exist or is not a file" in refusal(tmp_path / "pipe")  # and does not wait for a writer
    with pytest.raises(CheckpointError, match="does not exist"):
        load("nul\0byte")
    with pytest.raises(CheckpointError, match=r"name too long|does not exist"):  # by Python's version
        load("x" * 5000)


def test_an_unreadable_file(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fails_at("open", PermissionError(errno.EACCES, "Permission denied"), patch)
        text = refusal(sound)
    assert "cannot be read: Permission denied." in text


URLS = ["http://127.0.0.1:1/x.ckpt", "https://h/x", "s3://b/x", "file:///x", "memory://x", "a::gs://x", "HTTP:/h/x"]


@pytest.mark.parametrize("url", URLS)
def test_urls_are_refused(url: str) -> None:
    for refuse in (load, find):
        for given in (url, Path(url)):
            with pytest.raises(CheckpointError, match="is a URL: download it"):
                refuse(given)


def test_loading_takes_milliseconds(sound: Path) -> None:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        load(sound)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05  # 2 to 5 ms on a quiet machine
