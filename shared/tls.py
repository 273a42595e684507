"""Mutual TLS: who serves and who calls both show a certificate of an authority that the other trusts.

A directory holds tls.crt (the chain), tls.key and ca.crt, as cert-manager's secrets do. A server takes up new files
with the next connection; `shared.channel` opens a new connection. Connections that stand are left alone: they end by
`connection_age_seconds_max`, and no call fails.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from shared.files import Watched

FILES = ("tls.crt", "tls.key", "ca.crt")


class Certificates(NamedTuple):
    """PEM: the own certificate with its chain, its key, and the authorities whose certificates are trusted."""

    chain: bytes
    key: bytes
    authorities: bytes


def watch(directory: str) -> Watched[Certificates]:
    """The certificates of a directory, read again when they change. Raises OSError or ValueError."""
    return Watched(f"certificates in {directory}", [Path(directory) / name for name in FILES], _parse)


def server_credentials(certificates: Watched[Certificates]) -> grpc.ServerCredentials:
    """For a server that asks every caller for a certificate, and shows what is in force at each connection."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        chain, key, authorities = certificates.current()
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)

    return grpc.dynamic_ssl_server_credentials(configuration(), configuration, require_client_authentication=True)


def channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    """For a channel that shows these for as long as it is open."""
    chain, key, authorities = certificates
    return grpc.ssl_channel_credentials(authorities, key, chain)


def _parse(contents: Sequence[bytes]) -> Certificates:
    """Check that certificate and key belong together: half of a pair would refuse every connection."""
    found = Certificates(*contents)
    try:
        certificate = x509.load_pem_x509_certificates(found.chain)[0]
        x509.load_pem_x509_certificates(found.authorities)
        key = load_pem_private_key(found.key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("tls.crt, tls.key and ca.crt must be PEM, the key without a password") from None
    if key.public_key() != certificate.public_key():
        raise ValueError("tls.key is not the key of tls.crt")
    return found
