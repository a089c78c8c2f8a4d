"""Opening data files: local paths, URLs and standard input, unpacked and as UTF-8 whatever they are.

What a file is packed with and how it is encoded is told by its first bytes, not by its name. A stream that is damaged
gives all that comes before the damage, then raises `DamagedError`.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import io
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from isal import isal_zlib

from steersman.errors import ConfigError, DataError, NotFoundError, SteersmanError, UnavailableError, why

STDIN = "-"
#: Endings of packed files, to be taken off before the ending that tells the format.
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
#: Endings of the files that a folder is searched for.
DATA_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Small, so that damage takes little of what lies before it, and a bomb of a file unpacks in bearable pieces.
_PIECE = 8192
_READ = 1 << 20


class DamagedError(Exception):
    """The bytes of a file end before its content does."""


#: What reading may raise once a file is open.
UNREADABLE: tuple[type[Exception], ...] = (DamagedError, OSError)


class Position:
    """How far into a file a reader is, for a progress bar."""

    def __init__(self) -> None:
        self.read = 0
        self.stream: IO[bytes] | None = None

    def tell(self) -> int:
        """Bytes consumed, before unpacking."""
        return self.read if self.stream is None or self.stream.closed else self.stream.tell()


def display_name(path: str | os.PathLike[str]) -> str:
    """How messages call a file: its own name, short enough to read."""
    name = os.fspath(path)
    return "standard input" if name == STDIN else name.rstrip("/").rsplit("/", 1)[-1]


def ending(path: str | os.PathLike[str]) -> str:
    """The ending that tells a file's format, as `.csv`: lower case, behind neither packing nor a URL's query."""
    name = os.fspath(path).lower()
    if "://" in name:
        name = name.partition("?")[0].partition("#")[0]
    name = display_name(name)
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Files that are meant: a folder's data files at any depth, those that a pattern matches, all others as named.

    Raises DataError for a folder or pattern without a data file.
    """
    found: list[str] = []
    for name in names:
        if name == STDIN or "://" in name or os.path.isfile(name):
            found.append(name)
            continue
        if os.path.isdir(name):
            within = sorted(
                str(path) for path in Path(name).rglob("*") if path.is_file() and _is_data(path, Path(name))
            )
            what = "no data file in the folder"
        elif any(mark in name for mark in "*?["):
            within, what = sorted(filter(os.path.isfile, glob.glob(name, recursive=True))), "no file matches"
        else:
            within, what = [name], ""
        if not within:
            raise DataError(f"{name}: {what}; known endings are {', '.join(DATA_FILES)}, each also packed")
        found.extend(within)
    return tuple(found)


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and ending(path) in DATA_FILES and path.name not in ("import.json", "card.json", "skipped.jsonl")


@contextmanager
def open_bytes(
    path: str | os.PathLike[str], position: Position | None = None, encoding: str | None = None
) -> Iterator[io.BufferedReader]:
    """Opens a local path, an fsspec URL or `-` for reading, unpacked and as UTF-8.

    Args:
        path: What to open.
        position: Follows the reading.
        encoding: Of text that is neither UTF-8 nor marked as something else.

    Raises:
        DataError: there is no such file.
        ConfigError: the library for this kind of URL is not installed, or there is no such encoding.
        UnavailableError: a server did not give the file.
    """
    with ExitStack() as stack:
        raw = _open(os.fspath(path), stack)
        stream = raw
        if position is not None and raw.seekable():
            position.stream = raw
        elif position is not None:
            stream = _buffered(_counted(raw, position))
        for _ in range(3):  # packed, and encoded within
            try:
                head = stream.peek(8)[:8]
            except DamagedError:
                break  # the reader meets it again, where it can say so
            packed = next((change for magic, change in _PACKINGS if head.startswith(magic)), None)
            change = packed or _encoding(head)
            if change is None:
                break
            stream = _buffered(change(stream))
            encoding = encoding if packed else None  # what is marked is read as marked
        if encoding is not None and not stream.peek(4).startswith(b"PAR1"):
            stream = _buffered(_recoded(_known(encoding))(stream))
        yield stream


def _open(target: str, stack: ExitStack) -> io.BufferedReader:
    if target == STDIN:
        return _buffered(iter(lambda: sys.stdin.buffer.read1(_READ), b""))  # type: ignore[union-attr]
    if "://" in target:
        return _buffered(_remote(target, stack))
    try:
        return stack.enter_context(open(target, "rb"))
    except FileNotFoundError:
        raise DataError(f"{target}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{target}: is a folder; name a file in it") from None
    except OSError as error:
        raise DataError(f"{target}: cannot be read ({why(error)}); check its permissions") from None


def _remote(url: str, stack: ExitStack) -> Iterator[bytes]:
    """Pieces of a remote file. HTTP is read from front to back, since many servers know no ranges, and from no address
    inside that nobody may ask (`steersman.net`)."""
    import fsspec

    try:
        if url.partition("://")[0] in ("http", "https"):
            from steersman.net import fetched

            return _unbroken(stack.enter_context(fetched(url)))
        remote = stack.enter_context(fsspec.open(url, "rb").open())
    except NotFoundError as error:
        raise DataError(error.message) from None
    except SteersmanError:
        raise
    except ImportError as error:
        raise ConfigError(f"{url}: cannot be read here ({error}); install it, or download the file") from None
    except FileNotFoundError:
        raise DataError(f"{url}: not found (404); check the address") from None
    except ValueError as error:
        raise ConfigError(f"{url}: {error}; use a path or a URL as s3://bucket/file.jsonl") from None
    except Exception as error:  # of any library behind fsspec: aiohttp, botocore ...
        raise UnavailableError(f"{url}: cannot be opened ({_reason(error)}); check address and access") from error
    return _remote_pieces(remote)


def _remote_pieces(remote: IO[bytes]) -> Iterator[bytes]:
    while True:
        try:
            piece = remote.read(_READ)
        except Exception as error:
            raise DamagedError(f"the connection broke: {_reason(error)}") from error
        if not piece:
            return
        yield piece


def _unbroken(pieces: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from pieces
    except Exception as error:
        raise DamagedError(f"the connection broke: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")
        self._failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._failure is not None:
            raise self._failure
        while not self._left:
            try:
                self._left = memoryview(next(self._pieces))
            except StopIteration:
                return 0
            except Exception as error:
                self._failure = error
                raise
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _buffered(pieces: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Pieces(pieces), _READ)


def _counted(raw: io.BufferedReader, position: Position) -> Iterator[bytes]:
    while piece := raw.read1(_READ):
        position.read += len(piece)
        yield piece


# --- packing ----------------------------------------------------------------------------------------------------


def _unpacked(new: Callable[[], Any], magic: bytes, kind: str) -> Callable[[IO[bytes]], Iterator[bytes]]:
    """Unpacks a stream of one or more packed members; NUL bytes behind one are padding."""

    def pieces(stream: IO[bytes]) -> Iterator[bytes]:
        inner, data = new(), b""
        while True:
            data = data or stream.read(_PIECE)
            if inner.eof:
                data = data.lstrip(b"\0")
                while data and len(data) < len(magic) and (more := stream.read(_PIECE)):
                    data += more
                if not data:
                    if not (data := stream.read(_PIECE)):
                        return
                    continue
                if not data.startswith(magic):
                    raise DamagedError(f"bytes that are no {kind} follow its end")
                inner = new()
            elif not data:
                raise DamagedError(f"the {kind} stream was cut off")
            try:
                piece = inner.decompress(data)
            except Exception as error:
                raise DamagedError(f"broken {kind} stream: {_reason(error)}") from error
            data = inner.unused_data if inner.eof else b""
            if piece:
                yield piece

    return pieces


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


_PACKINGS: tuple[tuple[bytes, Callable[[IO[bytes]], Iterator[bytes]]], ...] = tuple(
    (magic, _unpacked(new, magic, kind))
    for magic, new, kind in (
        (b"\x1f\x8b", lambda: isal_zlib.decompressobj(wbits=31), "gzip"),
        (b"\x28\xb5\x2f\xfd", _zstandard, "zstd"),
        (b"BZh", bz2.BZ2Decompressor, "bzip2"),
        (b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), "xz"),
    )
)


_ARCHIVES = (
    (0, b"PK\x03\x04", "a ZIP archive or an Excel file"),
    (0, b"\xd0\xcf\x11\xe0", "an Excel file"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a", "a RAR archive"),
    (0, b"\x04\x22\x4d\x18", "packed by LZ4"),
    (0, b"SQLite format 3", "an SQLite database"),
    (0, b"ARROW1", "an Arrow file"),
    (257, b"ustar", "a tar archive"),
)


def archive_of(stream: io.BufferedReader) -> str | None:
    """What a stream is by its first bytes, where it is no text and no Parquet."""
    try:
        head = stream.peek(512)
    except DamagedError:
        return None  # the reader meets it again
    return next((what for at, magic, what in _ARCHIVES if head.startswith(magic, at)), None)


# --- encodings --------------------------------------------------------------------------------------------------


def _encoding(head: bytes) -> Callable[[IO[bytes]], Iterator[bytes]] | None:
    """What turns UTF-16 or UTF-32 into UTF-8; without a mark they are told by the zero bytes of their first letters."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return _recoded("utf-32")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _recoded("utf-16")
    if len(head) >= 4 and [byte == 0 for byte in head[:4]] in ([False, True] * 2, [True, False] * 2):
        return _recoded("utf-16-le" if head[1] == 0 else "utf-16-be")
    return None


def _known(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise ConfigError(f"encoding {encoding!r} is not known; use a name as utf-16-le, cp1252 or shift_jis") from None


def _recoded(encoding: str) -> Callable[[IO[bytes]], Iterator[bytes]]:
    def pieces(stream: IO[bytes]) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(encoding)()
        while True:
            data = stream.read(_PIECE)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DamagedError(f"not {encoding.upper()}: {error.reason}") from None
            if text:
                yield text.encode()
            if not data:
                return

    return pieces
