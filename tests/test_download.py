"""Every damaged or false file from any source is detected, and replaced or named. None is used."""

import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lenet_pl import download
from lenet_pl.download import DataError, ensure

NAMES = tuple(download.FILES)
REAL_FILES, REAL_SOURCES = dict(download.FILES), download.SOURCES
REAL_NAMED = os.environ.get("LENET_PL_DATA_SOURCE", "")


def idx(name: str) -> bytes:
    """A tiny file in the real format: 6 training or 3 test images of 28x28, or their labels."""
    n, draw = (6 if name.startswith("train") else 3), random.Random(name)
    if "images" in name:
        return struct.pack(">4i", 2051, n, 28, 28) + draw.randbytes(n * 28 * 28)
    return struct.pack(">2i", 2049, n) + bytes(draw.randrange(10) for _ in range(n))


CONTENT = {name: idx(name) for name in NAMES}


@pytest.fixture(autouse=True, scope="module")
def tiny_set() -> Iterator[None]:
    """The download expects the tiny files, knows only the sources that a test names, and waits only a moment."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_files = {name: (hashlib.sha256(raw).hexdigest(), len(raw)) for name, raw in CONTENT.items()}
        patch.setattr(download, "FILES", tiny_files)
        patch.setattr(download, "SOURCES", ())
        patch.setattr(download, "TIMEOUT", 0.5)
        patch.delenv("LENET_PL_DATA_SOURCE", raising=False)
        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(proxy, raising=False)
        yield


def fill(folder: Path, form: str = "raw") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in CONTENT.items():
        if form == "raw":
            (folder / name).write_bytes(raw)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
    return folder


def raw_folder(data_dir: Path) -> Path:
    return data_dir / "FashionMNIST" / "raw"


def assert_whole(raw: Path) -> None:
    assert {name: (raw / name).read_bytes() for name in NAMES} == CONTENT
    assert not list(raw.glob(".tmp-*")), "a temporary folder was left behind"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return fill(tmp_path / "good", "gz")


# ---- the data folder --------------------------------------------------------------------------------------------


def test_files_in_place_are_verified_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = fill(raw_folder(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in raw.iterdir()}
    assert ensure(str(tmp_path)) == raw
    assert {path.name: path.stat().st_mtime_ns for path in raw.iterdir()} == before
    assert capsys.readouterr() == ("", "")


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Some content that differs from the given one."""
    kind = draw(st.sampled_from(["cut", "flip", "longer", "magic", "other", "zeros", "random"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "flip":
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]
    if kind == "longer":
        return content + draw(st.binary(min_size=1, max_size=20))
    if kind == "magic":
        magic = draw(st.integers(0, 2**32 - 1).map(lambda number: struct.pack(">I", number)))
        return (magic if magic != content[:4] else b"\0\0\0\0") + content[4:]
    if kind == "other":
        return draw(st.sampled_from([raw for raw in CONTENT.values() if raw != content]))
    return bytes(len(content)) if kind == "zeros" else random.Random(draw(st.integers())).randbytes(len(content))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_damaged_raw_files_are_replaced_or_named(data: st.DataObject) -> None:
    broken = {
        name: data.draw(damage(CONTENT[name]), label=name)
        for name in data.draw(st.sets(st.sampled_from(NAMES), min_size=1))
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        raw = fill(raw_folder(Path(folder)))
        for name, content in broken.items():
            (raw / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            ensure(folder)
        assert all((name in str(caught.value)) == (name in broken) for name in NAMES)
        patch.setenv("LENET_PL_DATA_SOURCE", str(fill(Path(folder) / "good", "gz")))
        assert_whole(ensure(folder))


def test_swapped_raw_files_are_fetched_again(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = fill(raw_folder(tmp_path))
    sound = (raw / NAMES[3]).stat().st_ino
    for a, b in ((0, 1), (1, 0)):
        (raw / NAMES[a]).write_bytes(CONTENT[NAMES[b]])
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    assert_whole(ensure(tmp_path))
    assert (raw / NAMES[3]).stat().st_ino == sound, "a sound file was replaced"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "damaged" in lines[0]
    assert str(good) in lines[2]


@pytest.mark.parametrize("stays", [True, False])
def test_gz_dropped_into_the_raw_folder(tmp_path: Path, stays: bool) -> None:
    raw = fill(raw_folder(tmp_path), "gz")
    if stays:  # a damaged raw file beside a good .gz
        (raw / NAMES[0]).write_bytes(b"damaged")
    assert_whole(ensure(tmp_path))


@pytest.mark.parametrize("inside", ["empty", "full"])
def test_folder_in_the_place_of_a_file(
    tmp_path: Path, good: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = fill(raw_folder(tmp_path))
    (raw / NAMES[2]).unlink()
    (raw / NAMES[2]).mkdir()
    if inside == "full":
        (raw / NAMES[2] / "file").touch()
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    with pytest.raises(DataError, match=rf"{NAMES[2]}: Is a directory[^$]*Remove"):
        ensure(tmp_path)
    assert (raw / NAMES[2]).is_dir()


@pytest.mark.parametrize("place", [".", "FashionMNIST", "FashionMNIST/raw"])
def test_file_in_the_place_of_a_folder(tmp_path: Path, place: str) -> None:
    blocked = tmp_path / "data" / place
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("in the way")
    with pytest.raises(DataError, match="Not a directory"):
        ensure(tmp_path / "data")
    assert blocked.read_text() == "in the way"


def test_unreadable_raw_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fill(raw_folder(tmp_path))
    stock = Path.open

    def locked(path: Path, mode: str = "r") -> object:  # chmod would not stop root
        if path == raw / NAMES[1]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stock(path, mode)

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(DataError, match=f"{NAMES[1]}: Permission denied"):
        ensure(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not stop root")
def test_read_only_folder(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    raw = fill(raw_folder(tmp_path))
    raw.chmod(0o555)
    ensure(tmp_path)  # complete: nothing to write
    (raw / NAMES[0]).chmod(0o644)
    (raw / NAMES[0]).write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"raw.*: Permission denied"):
        ensure(tmp_path)
    raw.chmod(0o755)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, good: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "SOURCES", (str(good),))
    raw = fill(raw_folder(tmp_path))
    (raw / NAMES[0]).write_bytes(b"damaged")
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(DataError, match=f"{NAMES[0]}: No space left on device.\n.*free space"):
        ensure(tmp_path)
    assert sorted(path.name for path in raw.iterdir()) == sorted(NAMES)
    assert (raw / NAMES[0]).read_bytes() == b"damaged"


def spawn(tmp_path: Path, good: Path, before: str = "") -> "subprocess.Popen[str]":
    script = f"""
import os, signal
from lenet_pl import download
download.FILES, download.SOURCES = {download.FILES!r}, ({str(good)!r},)
{before}
print(download.ensure({str(tmp_path)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_processes_at_once(tmp_path: Path, good: Path) -> None:
    processes = [spawn(tmp_path, good) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.strip() == str(raw_folder(tmp_path))
    assert_whole(raw_folder(tmp_path))


def test_killed_while_writing_leaves_no_half_file(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = spawn(tmp_path, good, "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not any((raw_folder(tmp_path) / name).exists() for name in NAMES)
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    raw = ensure(tmp_path)
    assert {name: (raw / name).read_bytes() for name in NAMES} == CONTENT


# ---- folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "gz"])
def test_named_folder_comes_first(
    tmp_path: Path, good: Path, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = fill(tmp_path / "named", form)
    monkeypatch.setenv("LENET_PL_DATA_SOURCE", str(named))
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    assert_whole(ensure(tmp_path))
    err = capsys.readouterr().err
    assert str(named) in err
    assert str(good) not in err


def test_named_folder_that_fails_is_mentioned(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LENET_PL_DATA_SOURCE", "/no/such/folder")
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    assert_whole(ensure(tmp_path))
    assert "LENET_PL_DATA_SOURCE=/no/such/folder: " in capsys.readouterr().err


def test_a_gz_that_holds_raw_content_is_welcome(tmp_path: Path) -> None:
    """A proxy or a browser may have unpacked the file and kept its name."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / f"{name}.gz").write_bytes(CONTENT[name])
    ensure(tmp_path)
    assert_whole(raw)


def test_a_compressed_file_under_the_raw_name_is_replaced(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision could not read it."""
    raw = raw_folder(tmp_path)
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).write_bytes((good / f"{name}.gz").read_bytes())
    monkeypatch.setattr(download, "SOURCES", (str(good),))
    ensure(tmp_path)
    assert_whole(raw)


def test_files_scattered_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [fill(tmp_path / str(n)) for n in range(4)]
    for folder, kept in zip(folders, NAMES, strict=True):
        for name in set(NAMES) - {kept}:
            (folder / name).unlink()
    monkeypatch.setattr(download, "SOURCES", tuple(str(folder) for folder in reversed(folders)))
    assert_whole(ensure(tmp_path))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_gz_never_gets_in(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    packed = gzip.compress(CONTENT[name])
    bad = data.draw(damage(packed) | st.builds(gzip.compress, damage(CONTENT[name])))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # 1,000 of them take seconds
        source = fill(Path(folder) / "bad", "gz")
        (source / f"{name}.gz").write_bytes(bad)
        patch.setattr(download, "SOURCES", (str(source),))
        try:
            ensure(folder)
        except DataError as error:
            message = str(error)
        else:  # a flipped time stamp in the gzip header harms nothing
            return assert_whole(raw_folder(Path(folder)))
        assert f"  {source}: {name}" in message
        assert not (raw_folder(Path(folder)) / name).exists()
        return None


def test_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fill(tmp_path / "bad", "gz")
    (bad / f"{NAMES[0]}.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    monkeypatch.setattr(download, "SOURCES", (str(bad),))
    taken: list[int] = []
    stock = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: taken.append(size) or stock(file, size))
    with pytest.raises(DataError, match=f"{NAMES[0]} is damaged: too long"):
        ensure(tmp_path)
    assert all(0 <= size <= len(CONTENT[NAMES[0]]) + 1 for size in taken)


# ---- mirrors ----------------------------------------------------------------------------------------------------


class Mirror(BaseHTTPRequestHandler):
    """Answers requests for ``/<behaviour>/<name>.gz``."""

    asked: list[str]
    done: threading.Event
    endless = 0  # bytes sent by never_ends

    def do_GET(self) -> None:
        behaviour, name = self.path.strip("/").removesuffix(".gz").split("/")
        self.asked.append(behaviour)
        packed = gzip.compress(CONTENT[name])
        if behaviour.isdigit():
            return self.send_error(int(behaviour))
        if behaviour == "hangs":
            self.done.wait(5)
            return None
        self.send_response(200)
        body = {
            "sends_html": b"<!doctype html><title>Please log in</title>",
            "sends_another_file": gzip.compress(CONTENT[NAMES[NAMES.index(name) ^ 1]]),
            "sends_a_bomb": gzip.compress(bytes(10_000_000)),
        }.get(behaviour, packed)
        if behaviour != "never_ends":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour in ("truncates", "resets", "stalls"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        if behaviour == "stalls":
            self.done.wait(5)
        if behaviour == "never_ends":
            while not self.done.is_set():
                Mirror.endless += self.wfile.write(b"x" * 65536)
        if behaviour == "resets":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        return None

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:  # the client hung up
        pass


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Mirror, "asked", [], raising=False)
    monkeypatch.setattr(Mirror, "done", threading.Event(), raising=False)
    with Server(("127.0.0.1", 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        Mirror.done.set()
        server.shutdown()
        thread.join()


MISCHIEF = {  # behaviour: what the message says
    "truncates": "ended before the end-of-stream marker",
    "resets": "reset",
    "hangs": "timed out",
    "stalls": "timed out",
    "404": "404",
    "503": "503",
    "sends_html": "is damaged: too short",
    "sends_another_file": "too short",
    "sends_a_bomb": "too long",
    "never_ends": "damaged",
}


@pytest.mark.parametrize("behaviour", MISCHIEF)
def test_bad_mirror_is_left_for_the_next(
    tmp_path: Path, mirror: str, behaviour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SOURCES", (f"{mirror}/{behaviour}", f"{mirror}/good"))
    assert_whole(ensure(tmp_path))
    assert Mirror.asked == [behaviour] + ["good"] * 4
    assert Mirror.endless < 100_000_000  # what socket buffers hold, not what the mirror would like to send


def test_message_lists_every_mirror(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    sources = {f"{mirror}/{behaviour}": text for behaviour, text in MISCHIEF.items()}
    sources |= {
        closed: "Connection refused",
        "http://mirror.invalid": "urlopen error",
        "/no/such/folder": "No such file",
    }
    monkeypatch.setattr(download, "SOURCES", tuple(sources))
    with pytest.raises(DataError) as caught:
        ensure(tmp_path)
    first, in_raw, in_data_dir, *lines, last = str(caught.value).splitlines()
    assert all(name in first for name in NAMES)
    assert "No such file" in in_raw
    assert "No such file" in in_data_dir
    for line, (source, text) in zip(lines, sources.items(), strict=True):
        assert line.startswith(f"  {source}: ")
        assert text in line
    assert str(raw_folder(tmp_path)) in last
    assert "LENET_PL_DATA_SOURCE" in last
    assert list(raw_folder(tmp_path).iterdir()) == []
    assert all(line.startswith("lenet_pl: ") for line in capsys.readouterr().err.splitlines())  # no progress bar


def test_only_what_is_missing_is_transferred(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = fill(raw_folder(tmp_path))
    (raw / NAMES[1]).unlink()
    monkeypatch.setattr(download, "SOURCES", (f"{mirror}/good",))
    assert_whole(ensure(tmp_path))
    assert Mirror.asked == ["good"]


def test_progress_bar_on_a_terminal(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(download, "SOURCES", (f"{mirror}/good",))
    ensure(tmp_path)
    assert all(f"{name}.gz" in sys.stderr.getvalue() for name in NAMES)
    assert "100%" in sys.stderr.getvalue()


def test_the_real_list_holds_torchvisions_mirrors() -> None:
    from torchvision.datasets import FashionMNIST

    first = 1  # after the system's folder
    mirrors = [mirror.rstrip("/") for mirror in FashionMNIST.mirrors]
    assert list(REAL_SOURCES[first : first + len(mirrors)]) == mirrors
    assert [f"{name}.gz" for name in REAL_FILES] == [name for name, _ in FashionMNIST.resources]


# ---- Debian's package -------------------------------------------------------------------------------------------


@pytest.fixture
def apt(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts imitations of apt-get and dpkg-deb first in the path, and returns their folder."""
    if not shutil.which("timeout"):
        pytest.skip("no coreutils here")
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {
        "apt-get": """
            grep -q "^ *Dir::State::Lists \\"$PWD/lists\\"" "$APT_CONFIG" && [ -d lists/partial ] || exit 1
            if read -r answer; then exit 1; fi  # nobody is asked
            [ "$1" = update ] && { echo "W: Failed to fetch one repository of several" >&2; touch lists/all; exit 100; }
            [ -e lists/all ] && [ "$*" = "download dataset-fashion-mnist" ] && touch dataset_1_all.deb
        """,
        "dpkg-deb": f"""
            [ "$*" = "-x dataset_1_all.deb ." ] || exit 1
            mkdir -p usr/share/datasets && cp -r '{good}' usr/share/datasets/fashion-mnist
        """,
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(download, "SOURCES", ("apt:dataset-fashion-mnist",))
    return tools


def test_apt(tmp_path: Path, apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_whole(ensure("data"))  # relative: apt itself runs elsewhere


def test_apt_that_fails_tells_why(tmp_path: Path, apt: Path) -> None:
    (apt / "dpkg-deb").write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(DataError, match="apt:dataset-fashion-mnist: W: Failed to fetch one repository"):
        ensure(tmp_path)
    assert list(raw_folder(tmp_path).iterdir()) == []


def test_apt_that_hangs_is_stopped(tmp_path: Path, apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (apt / "apt-get").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(download, "APT_TIMEOUT", 0.2)
    with pytest.raises(DataError, match=r"apt-get took more than 0\.2 s"):
        ensure(tmp_path)


def test_no_apt_here(tmp_path: Path, apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (apt / "apt-get").unlink()
    for needed in "sh", "timeout":
        (apt / needed).symlink_to(str(shutil.which(needed)))
    monkeypatch.setenv("PATH", str(apt))
    with pytest.raises(DataError, match=r"apt:dataset-fashion-mnist: .*apt-get.*No such file"):
        ensure(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"apt:dataset-fashion-mnist: .*No such file"):
        ensure(tmp_path)


# ---- the script, the real files ---------------------------------------------------------------------------------


def run_script(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "lenet_pl.download", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_script_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run_script(str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(Path(REAL_SOURCES[0]).exists(), reason="this machine has Debian's package installed")
def test_script_without_network_and_data(tmp_path: Path) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nobody listens there
    done = run_script(str(tmp_path / "data"), PATH="", **proxies)
    assert (done.returncode, done.stdout) == (1, "")
    assert all(f"\n  {source}: " in done.stderr for source in REAL_SOURCES)
    assert "Traceback" not in done.stderr


@pytest.mark.data
def test_the_real_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from torchvision.datasets import FashionMNIST

    data_dir = Path(__file__).parents[1] / "data"
    done = run_script(str(data_dir), LENET_PL_DATA_SOURCE=REAL_NAMED)
    assert (done.returncode, done.stdout.strip()) == (0, str(raw_folder(data_dir))), done.stderr
    monkeypatch.setattr(download, "FILES", REAL_FILES)
    assert ensure(data_dir) == raw_folder(data_dir)
    assert capsys.readouterr() == ("", "")
    train, test = FashionMNIST(data_dir, train=True), FashionMNIST(data_dir, train=False)
    assert (train.data.shape, test.data.shape) == ((60_000, 28, 28), (10_000, 28, 28))
    assert train.targets.bincount().tolist() == [6000] * 10
    pixels = train.data.double() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((0.2860, 0.3530), abs=5e-5)
