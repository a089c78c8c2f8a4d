"""Where the certificates of servers and clients lie."""

from __future__ import annotations

from pathlib import Path

from steersman.config.base import FrozenModel


class Tls(FrozenModel):
    """Files of a server in PEM format; new ones are taken without a restart."""

    cert: Path
    """Certificate chain."""
    key: Path
    """Private key."""
    client_ca: Path | None = None
    """Clients must show a certificate of this authority (mTLS); None: any client."""


class ClientTls(FrozenModel):
    """Files of a client in PEM format; new ones are taken without a restart."""

    ca: Path
    """Authority that signed the server's certificate."""
    cert: Path | None = None
    """Own certificate, for mTLS."""
    key: Path | None = None
    """Own private key, for mTLS."""
    server_name: str | None = None
    """Name that the server's certificate must carry; None: the one in its address."""

    @staticmethod
    def in_folder(folder: Path) -> ClientTls:
        """The files of a Kubernetes Secret of type tls: `ca.crt`, and for mTLS `tls.crt` and `tls.key`."""
        cert, key = folder / "tls.crt", folder / "tls.key"
        mutual = cert.exists() or key.exists()
        return ClientTls(ca=folder / "ca.crt", cert=cert if mutual else None, key=key if mutual else None)
