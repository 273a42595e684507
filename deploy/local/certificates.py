"""An authority and the certificates that it issues, for the local stack and for tests."""

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

LIFE = timedelta(days=30)
SKEW = timedelta(minutes=5)


class Authority:
    """A certificate authority that lives as long as this object; what it issued stays in its files."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "holdfast local authority")])
        self._certificate = (
            self._builder(self._name, self._key, LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(Encoding.PEM)

    def issue(self, directory: Path, *names: str, uri: str = "", life: timedelta = LIFE) -> Path:
        """Write tls.crt, tls.key and ca.crt for these DNS names, and for 127.0.0.1; `life` may be over already."""
        key = ec.generate_private_key(ec.SECP256R1())
        uris = [x509.UniformResourceIdentifier(uri)] if uri else []
        alternatives = [*uris, *map(x509.DNSName, names), x509.IPAddress(IPv4Address("127.0.0.1"))]
        certificate = (
            self._builder(x509.Name([]), key, life)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        directory.mkdir(parents=True, exist_ok=True)
        contents = {
            "tls.crt": certificate.public_bytes(Encoding.PEM),
            "tls.key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "ca.crt": self.pem,
        }
        for name, content in contents.items():
            file = directory / name
            file.touch(mode=0o600)
            file.write_bytes(content)
        return directory

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, life: timedelta) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - abs(life) - SKEW)
            .not_valid_after(now + life)
        )
