"""Files that are written whole or not at all. This module imports neither torch nor Lightning."""

import errno
import os
from pathlib import Path

# The codes with which CIFS, FUSE and VirtualBox shares answer that they cannot fsync a folder.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the content of a file; at every moment either the old or the new content is there, whole.

    The temporary file lies beside ``path``, because renaming is atomic only within one file system.

    Args:
        path: The file. Missing folders above it are made.
        data: Its new content.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full. The error names ``path``, the
            old content is intact and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # with the id, because two commands may write it
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # without it, a power cut after the rename could leave an empty file
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C included
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk names no file, and other errors name the temporary one
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power cut, where the file system can do that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
