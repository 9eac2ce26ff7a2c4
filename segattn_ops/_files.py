"""Files that are whole or absent, and names from outside in messages. setup.py runs this file by path: it imports
neither torch nor the package."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SHOWN = 240  # characters of a name in a message
_MESSAGE = 8000  # characters of a message


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix, to write to. After the block it takes the place of ``path``;
    if the block raises (a full disk, an interrupt) it is removed, and the old file stays as it is.

    A link is followed: the file that it names is replaced. A device or a pipe is written itself. The content is on the
    disk before the name is, so that a loss of power leaves the old file or the new one. A new file has the usual
    permissions, one that takes the place of another has that one's.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target  # /dev/stdout; a folder raises where it is opened
        return
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem[:100]}.", suffix=target.suffix)
    part = Path(name)
    try:
        os.close(handle)
        yield part
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        part.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``Path.write_text`` by :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text)


def _umask() -> int:
    """The process's, which can be read only by setting it; from Linux's status where that is, as threads share it."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def shown(name: object, most: int = _SHOWN) -> str:
    """A name from outside as it stands in a message: control characters and lone surrogates escaped, and the middle of
    a long one left out."""
    text = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]} ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bounded(message: str) -> str:
    """A message that lists names, with the end of a very long one left out."""
    if len(message) <= _MESSAGE:
        return message
    return f"{message[:_MESSAGE]} ... ({len(message) - _MESSAGE} more characters)"
