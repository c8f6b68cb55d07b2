"""Writes a file whole or not at all. This module needs neither torch nor Lightning."""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

# Errors that fsync of a folder gives on file systems that cannot do it, such as network shares, FUSE and VirtualBox.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EBADF}


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the content of a file. At every moment the file holds the complete old or the complete new content.

    Missing folders are made. The content goes to a temporary file in the same folder, which is then renamed: that is
    atomic only within one file system.

    Raises:
        OSError: If the file cannot be written, for example without permission or space. ``filename`` of the error is
            ``path``, whose old content is intact, or a folder above it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    real = Path(os.path.realpath(path))  # a link stays a link, unless it leads to a folder that is gone
    if not real.parent.is_dir():
        real = path
    temporary = real.with_name(f".{real.name[:50]}.{secrets.token_hex(8)}.tmp")  # two processes may write the same file
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # without this, a power cut after the rename could leave an empty file
        with contextlib.suppress(OSError):  # there is no old file
            shutil.copymode(real, temporary)
        temporary.replace(real)
    except OSError as error:
        error.filename = str(path)  # otherwise it is empty or the temporary file
        raise
    finally:  # after Ctrl-C too; a rename has left nothing to delete
        with contextlib.suppress(OSError):  # a file system that can only be read refuses this
            temporary.unlink(missing_ok=True)
    _sync_folder(real.parent)


def _sync_folder(folder: Path) -> None:
    """Makes sure that a rename in ``folder`` survives a power cut, where the file system can do that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            error.filename = str(folder)
            raise
    finally:
        os.close(descriptor)
