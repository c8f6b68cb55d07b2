"""Writes a file whole or not at all; needs neither torch nor Lightning."""

import errno
import os
from pathlib import Path

# Network shares, FUSE and VirtualBox folders may know no fsync of a folder.
_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EBADF}


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the content of a file: at every moment the old or the new content is there, whole.

    Missing folders are made. The temporary file lies beside ``path``, because a rename is atomic only within one file
    system.

    Args:
        path: The file.
        data: Its new content.

    Raises:
        OSError: If there is no permission, no space …; the previous file is intact, the temporary one is removed, and
            ``filename`` of the error is ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut after the rename could leave an empty file
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C too
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file, other errors name the temporary one
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` outlast a power cut, where the file system can do that."""
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
