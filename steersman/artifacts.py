"""Folders that appear whole or not at all, and the hashes that prove what is in them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steersman.errors import ChecksumError, NotFoundError, SteersmanError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EMFILE, errno.ENFILE}
_PARTIAL = ".partial-"


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """Yields a path beside `final` for a file that becomes `final` when the block ends without an error.

    So it is there whole or as it was before, whoever reads or writes it at the same time. Its folder is made.
    """
    partial = final.with_name(f".{final.name}{_PARTIAL}{secrets.token_hex(4)}")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file whole or not at all; see `whole_file`."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_dir(final: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `final` that becomes `final` when the block ends without an error.

    Everything is flushed to disk before the rename. An existing `final` is replaced, and stays as it was when the
    block fails. Leftovers of killed writers of the same `final` are removed.

    Raises:
        StorageError: the disk is full or refuses; the message says how much room is needed.
    """
    final = final.absolute()
    partial = final.with_name(f".{final.name}{_PARTIAL}{secrets.token_hex(4)}")
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f".{final.name}{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                _flush(path)
            _flush(partial)
            _swap(partial, final)
            _flush(final.parent)
        except BaseException as error:
            if _is_full(error):
                error.steersman_written = folder_size(partial)  # type: ignore[attr-defined]
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turns a full disk or quota inside the block into one StorageError that names the target and the mend."""
    try:
        yield
    except SteersmanError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        written = getattr(error, "steersman_written", 0)
        free = shutil.disk_usage(_existing_parent(target)).free
        need = max(2 * written, 64 * 2**20) - free
        raise StorageError(
            f"disk full while saving {target}: free at least {max(need, 2**20) // 2**20} MiB "
            "or set spec.artifacts to another place",
            details={"path": str(target), "free_bytes": free},
        ) from error


def refusal(error: BaseException) -> StorageError | None:
    """One sentence for an OSError that says why a file or folder cannot be used; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    mend = "give a folder that can be read and written"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        mend = "raise the limit of open files (ulimit -n)"
    return StorageError(f"{error.filename or 'a file'} cannot be used ({error.strerror}); {mend}")


def read_json(path: Path, mend: str) -> dict[str, Any] | None:
    """Content of a file that holds one JSON object; None when there is no such file.

    Args:
        mend: what to do when it is damaged.

    Raises:
        ChecksumError: it is cut short or no JSON object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ChecksumError(f"{path} is damaged ({error}); {mend}") from None
    if not isinstance(content, dict):
        raise ChecksumError(f"{path} is damaged (it holds no JSON object); {mend}")
    return content


def _is_full(error: BaseException) -> bool:
    """True for ENOSPC, also where a library (safetensors, torch) carries it only in its text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        text = str(seen)
        if "No space left on device" in text or "os error 28" in text or "Disk quota exceeded" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


def _flush(path: Path) -> None:
    if path.is_symlink():
        return
    if path.is_file():
        path.chmod(0o644)  # safetensors writes 0600, which another user's service could not read
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, final: Path) -> None:
    if not final.exists():
        os.rename(partial, final)
        return
    old = final.with_name(f".{final.name}{_PARTIAL}{secrets.token_hex(4)}")
    os.rename(final, old)
    try:
        os.rename(partial, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def manifest_of_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 in hexadecimal of every file below `folder`, by its relative POSIX path, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Checks that the files of a manifest are there and unchanged; further files are not looked at.

    Raises:
        NotFoundError: a file is missing.
        ChecksumError: a file has other content.
    """
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise NotFoundError(f"{path}: the file is missing; run the stage that writes it again")
        if file_digest(path) != expected:
            raise ChecksumError(f"{path}: the content has changed since it was written; run its stage again")
