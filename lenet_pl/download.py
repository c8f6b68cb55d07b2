"""Gets the four Fashion-MNIST files and verifies them by their SHA-256, wherever they come from."""

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zlib
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from lenet_pl.atomic import write_atomic
from lenet_pl.errors import Failure

# The name of each file, with the SHA-256 and the size in bytes of its raw content.
FILES = {
    "train-images-idx3-ubyte": ("c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888", 47040016),
    "train-labels-idx1-ubyte": ("bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9", 60008),
    "t10k-images-idx3-ubyte": ("5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b", 7840016),
    "t10k-labels-idx1-ubyte": ("0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34", 10008),
}
# Folders, mirrors and a Debian package. They are tried in this order, after data_dir and LENET_PL_DATA_SOURCE.
SOURCES: tuple[str, ...] = (
    "/usr/share/datasets/fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # FashionMNIST.mirrors of torchvision
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",  # Keras's copy
    "apt:dataset-fashion-mnist",
)
TIMEOUT = 10.0  # seconds that a mirror may stay silent
APT_TIMEOUT = 300  # seconds for one apt command


class DataError(Failure):
    """The data cannot be fetched or stored."""


def ensure(data_dir: str | Path) -> Path:
    """Verifies the four raw files, fetches those that are missing or damaged, and returns their folder.

    Several processes may do this at once: a file appears whole and verified, or not at all.

    Args:
        data_dir: The ``root`` of ``torchvision.datasets.FashionMNIST``. The folder is ``FashionMNIST/raw`` in it.

    Raises:
        DataError: If a file came from no source (the message lists them), or ``data_dir`` cannot be read or written.
    """
    raw = Path(data_dir) / "FashionMNIST" / "raw"
    try:
        missing = [name for name in FILES if not _is_sound(raw / name)]
        if missing:
            raw.mkdir(parents=True, exist_ok=True)
            # The scratch folder lies beside the files, so that a read-only folder is noticed at once.
            with tempfile.TemporaryDirectory(dir=raw, prefix=".tmp-", ignore_cleanup_errors=True) as scratch:
                _fetch(raw, missing, Path(scratch).absolute())
    except OSError as error:
        raise DataError(
            f"{error.filename or raw}: {error.strerror or error}.\n"
            "Remove what is in the way, correct its permissions, or free space (150 MB while data is fetched); "
            "or name another data_dir, and in LENET_PL_DATA_SOURCE the folder with the files if you have them."
        ) from error
    return raw


def _is_sound(path: Path) -> bool:
    try:
        _verified(path.open("rb"), path.name)
        return path.stat().st_size == FILES[path.name][1]  # torchvision reads no compressed file
    except FileNotFoundError:
        return False
    except ValueError as error:
        _say(f"{path.parent}: {error}; fetching it again")
        return False


def _fetch(raw: Path, missing: list[str], scratch: Path) -> None:
    """Tries one source after another until no file is missing."""
    failures: dict[str, str] = {}  # source: reason
    named = os.path.expanduser(os.environ.get("LENET_PL_DATA_SOURCE", ""))  # noqa: PTH111 (it raises no error)
    sources = [str(raw), str(raw.parent.parent), *SOURCES]  # somebody may have put the files there, perhaps as .gz
    if named:
        if Path(named, "FashionMNIST/raw").is_dir():  # it is a data_dir itself
            named += "/FashionMNIST/raw"
        sources.insert(2, named)
    for source in sources:
        wanted = list(missing)
        remote = source.startswith(("http", "apt:"))
        if remote:
            _say(f"fetching Fashion-MNIST from {source}")
        for name in wanted:
            try:
                content = _get(source, name, scratch)
            except (OSError, ValueError, HTTPException) as error:  # the source is bad
                failures.setdefault(source, str(error) or type(error).__name__)
                if remote:  # a mirror that hangs must not hang once per file
                    break
            else:
                write_atomic(raw / name, content)
                missing.remove(name)
        if got := [name for name in wanted if name not in missing]:
            _say(f"{', '.join(got)}: from {source}")
        if not missing:
            return
        if source == named:
            _say(f"LENET_PL_DATA_SOURCE={named}: {failures[source]}")
    raise DataError(
        f"Fashion-MNIST could not be fetched: {', '.join(missing)} missing or damaged. Tried:\n"
        + "".join(f"  {source}: {reason}\n" for source, reason in failures.items())
        + f"Put the four files, raw or .gz, into {raw}, or name their folder in LENET_PL_DATA_SOURCE."
    )


def _get(source: str, name: str, scratch: Path) -> bytes:
    """Returns the verified raw content of a file from a folder, a mirror or a package."""
    if source.startswith("http"):
        return _download(f"{source}/{name}.gz", name)
    folder = _unpack(source[4:], scratch) if source.startswith("apt:") else Path(source)
    packed = folder / f"{name}.gz"
    try:
        return _verified((folder / name).open("rb"), name)
    except (OSError, ValueError):
        if not packed.exists():
            raise
    return _verified(packed.open("rb"), name)


def _verified(file: BinaryIO, name: str) -> bytes:
    """Verifies a file and returns its raw content. The file may be compressed or not, whatever its name says."""
    sha256, size = FILES[name]
    try:
        with file:
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            source = gzip.GzipFile(fileobj=file) if compressed else file
            content = source.read(size + 1)  # a limit, because a gzip bomb must not fill the memory
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name}.gz is damaged: {error}") from error
    if len(content) != size:
        raise ValueError(f"{name} is damaged: too {'long' if len(content) > size else 'short'}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{name} is damaged: wrong SHA-256")
    return content


def _download(url: str, name: str) -> bytes:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    columns = (*Progress.get_default_columns(), DownloadColumn())
    bar = Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not getattr(sys.stderr, "isatty", bool)()
    )
    limit = FILES[name][1] + 65536  # a mirror that never ends must not fill the memory
    body = bytearray()
    with urlopen(url, timeout=TIMEOUT) as response, bar:
        task = bar.add_task(f"{name}.gz", total=response.length)
        while len(body) < limit and (chunk := response.read1(65536)):
            body += chunk
            bar.update(task, completed=len(body))
    return _verified(BytesIO(body), name)


def _unpack(package: str, scratch: Path) -> Path:
    """Fetches and unpacks a Debian package. It needs no root, installs nothing and leaves the system's lists alone."""
    folder = scratch / "usr/share/datasets/fashion-mnist"
    if folder.exists():
        return folder
    (scratch / "lists/partial").mkdir(parents=True)  # apt requires it
    config = scratch / "apt.conf"
    config.write_text(f"""
        Dir::State::Lists "{scratch}/lists"; Dir::Cache "{scratch}/cache"; Acquire::Retries "1";
        Acquire::http::Timeout "{TIMEOUT:.0f}"; Acquire::https::Timeout "{TIMEOUT:.0f}";
    """)
    env = {**os.environ, "LC_ALL": "C", "APT_CONFIG": str(config)}
    # An update fails if one of several repositories is broken, but the download may still work.
    script = f"""
        bounded() {{ timeout --foreground -k 5 {APT_TIMEOUT} "$@"; }}
        bounded apt-get update; bounded apt-get download {package} && dpkg-deb -x *.deb .
    """
    apt = subprocess.run(["sh", "-c", script], cwd=scratch, env=env, input="", capture_output=True, text=True)
    if not folder.exists():
        told = [line for line in apt.stderr.splitlines() if "ailed" in line or line.startswith("E:")]
        raise ValueError(told[0] if told else f"apt-get took more than {APT_TIMEOUT} s")
    return folder


def _say(text: str) -> None:
    print(f"lenet_pl: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("-"):
        sys.exit("usage: python -m lenet_pl.download [FOLDER]      by default: data")
    try:
        print(ensure(sys.argv[1] if len(sys.argv) > 1 else "data"))
    except DataError as problem:
        sys.exit(str(problem))  # exit code 1
    except KeyboardInterrupt:
        sys.exit(130)
