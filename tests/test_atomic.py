"""``write_atomic``, also on file systems that cannot do all that it asks for."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from lenet_pl.atomic import write_atomic


def fail_on_folders(monkeypatch, code):
    """Makes fsync of a folder fail with ``code``, as it does on some network file systems."""
    fsync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


def test_missing_folders_are_made_and_old_content_is_replaced(tmp_path):
    path = tmp_path / "a/b/file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_two_machines_may_write_the_same_file(tmp_path, monkeypatch):
    """Their processes may have the same number."""
    fsync = os.fsync

    def write_meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomic(tmp_path / "file", b"other")

    monkeypatch.setattr(os, "fsync", write_meanwhile)
    write_atomic(tmp_path / "file", b"mine")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_a_folder_is_no_error(tmp_path, monkeypatch, code):
    fail_on_folders(monkeypatch, code)
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_folder_that_fails_to_sync_for_another_reason_is_an_error(tmp_path, monkeypatch):
    fail_on_folders(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(tmp_path / "file", b"new")


def test_it_needs_neither_torch_nor_lightning():
    code = "import sys, lenet_pl.atomic, lenet_pl.download\nsys.exit(bool({'torch', 'lightning'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
