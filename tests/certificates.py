"""Certificates for servers of tests, by an authority of their own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Authority:
    """A certificate authority of our own, whom only those trust who read `file`."""

    file: Path
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def founded(cls, folder: Path) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate("Authority", key, issuer="Authority", signer=key, is_authority=True)
        file = folder / "authority.pem"
        file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        return cls(file, key)

    def certify(self, host: str, folder: Path) -> Path:
        """A key and its certificate for a host, in one file."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(host, key, issuer="Authority", signer=self.key, is_authority=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file = folder / f"{host}.pem"
        file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
        return file


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    *,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    is_authority: bool,
) -> x509.Certificate:
    now = datetime.now(UTC)
    subject, signed_by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in (name, issuer))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(signer, hashes.SHA256())
    )
