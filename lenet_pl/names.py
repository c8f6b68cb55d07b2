"""File names as text. A name may contain line ends, terminal codes and bytes that are not UTF-8; all are shown."""

import os
import re
import shlex
import subprocess
from pathlib import Path

_BYTE = re.compile("[\udc80-\udcff]")  # Python turns a byte that it cannot decode into 0xDC00 plus the byte
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def decoded(name: str | Path) -> str:
    r"""Returns a name as text that can be written as UTF-8. Bytes that are not UTF-8 become text like ``\xff``."""
    text = _BYTE.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", str(name))
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(name: str | Path) -> str:
    r"""Returns a name as one line for a terminal, picture or page. Control characters, too, become text like ``\n``."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), decoded(name))


def quoted(name: str | Path) -> str:
    """Returns a path as one word for a shell, and not as an option. Windows' shell knows no single quotes."""
    text = f"./{name}" if str(name).startswith("-") else str(name)
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
