"""The secret that a gateway signs with, kept apart from the database, and the pseudonyms made with it.

Feedback tokens, browser sessions and pseudonyms are keyed with it: who has it can forge the first two. It comes from an
environment variable, or from a file that only its owner can read; beside a SQLite file that file is made by itself.
Several gateways on one PostgreSQL that were given neither share one through the database.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from steersman.environment import secret_in
from steersman.errors import ConfigError, why
from steersman.store.engine import Store
from steersman.store.serving import Secret

LEAST_LENGTH = 32
_NAME = "signing"


def read_secret(store: Store, file: Path | None = None, env: str | None = None) -> bytes:
    """The secret of this database's gateways; made when there is none yet.

    Args:
        file: A file of its own, mode 0600; made when it is not there.
        env: Name of an environment variable that holds at least 32 characters.

    Raises:
        ConfigError: the variable or the file holds no secret, or others can read the file.
    """
    if env is not None:
        return secret_in(env, "secretEnv", least=LEAST_LENGTH).encode()
    if store.engine.dialect.name != "sqlite":
        return _from_file(file) if file is not None else bytes.fromhex(_from_database(store))
    database = store.engine.url.database
    if file is None and database in (None, "", ":memory:"):
        return secrets.token_bytes(32)
    file = file or Path(f"{database}.secret")
    secret = _from_file(file, known=_kept_in_database(store))
    with store.transaction() as session:
        session.execute(sa.delete(Secret))
    return secret


def pseudonym(secret: bytes, *parts: str) -> str:
    """A name for a person or address that says nothing without the secret: 32 hexadecimal digits.

    Args:
        parts: Tenant and the customer's key in its business systems; their borders are part of the name.
    """
    key = hmac.digest(secret, b"pseudonym", hashlib.sha256)
    encoded = [part.encode(errors="surrogatepass") for part in parts]
    message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


def _from_file(file: Path, known: str | None = None) -> bytes:
    try:
        if not file.exists():
            _make(file, known or secrets.token_hex(32))
        status, text = file.stat(), file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{file} cannot be read or made ({why(error)})"
        raise ConfigError(f"secretFile: {reason}; name another, or secretEnv") from None
    # A mounted Secret belongs to somebody else, and nobody else is in its pod.
    if status.st_mode & 0o007 and status.st_uid == os.geteuid() and not file.is_symlink():
        raise ConfigError(f"secretFile: everybody on this machine can read {file}; chmod 600 it")
    if len(text) < LEAST_LENGTH:
        raise ConfigError(
            f"secretFile: {file} must hold at least {LEAST_LENGTH} characters; delete it to get a new one"
        )
    try:
        return bytes.fromhex(text)
    except ValueError:
        return text.encode()


def _make(file: Path, text: str) -> None:
    """Writes a new file, whole or not at all; another process may do the same at this moment, the first one counts."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, file)
    finally:
        partial.unlink()


def _kept_in_database(store: Store) -> str | None:
    """The secret that an earlier version kept in the SQLite file."""
    with store.reading() as session:
        return session.scalar(sa.select(Secret.value).where(Secret.name == _NAME))


def _from_database(store: Store) -> str:
    with store.transaction() as session:
        made = postgresql.insert(Secret).values(name=_NAME, value=secrets.token_hex(32)).on_conflict_do_nothing()
        session.execute(made)
        return session.scalars(sa.select(Secret.value).where(Secret.name == _NAME)).one()
