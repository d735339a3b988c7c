"""The mesh's own CA: one root key in one folder, which several processes may share (flock, also on NFS).

Rules:

* The root is made once, by whoever comes first; it is never overwritten. What is broken is an IdentityError that
  names the file.
* The certificate is written after the key: a key alone is a creation that was interrupted, and is finished. A
  certificate alone is a lost key, and is refused.
* The key is refused when others than its owner can read it.

Blocks on files: for start-up and for control processes, not for a data path's loop.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..addr import SpiffeId
from ..errors import IdentityError
from .spiffe import check_trust_domain, parse_id, trust_domain_of
from .trust import check_root, parse_certificates, utc

LEAF_TTL_S = 24 * 3600.0
_ROOT_LIFE = datetime.timedelta(days=3650)
_BACKDATE = datetime.timedelta(seconds=20)
"""Clocks of nodes under NTP differ by far less; more would widen what a stolen clock gains."""

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class CertificateAuthority:
    """The root of one trust domain, ready to sign. Made by `open`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, trust_domain: str) -> None:
        self._key = key
        self.certificate = certificate
        self.trust_domain = trust_domain

    def __repr__(self) -> str:
        return f"<CertificateAuthority {self.trust_domain} until {self.certificate.not_valid_after_utc:%Y-%m-%d}>"

    @classmethod
    def open(cls, folder: Path | str, trust_domain: str, *, now: float) -> CertificateAuthority:
        """The CA in `folder`, made at the first call. `now` is Unix time. Raises IdentityError."""
        check_trust_domain(trust_domain)
        folder = Path(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(folder / "lock"):
                return cls._open(folder, trust_domain, now)
        except OSError as exc:
            raise IdentityError(f"{exc.filename or folder}: {exc.strerror}") from exc

    @classmethod
    def _open(cls, folder: Path, trust_domain: str, now: float) -> CertificateAuthority:
        key_path, certificate_path = folder / "ca.key", folder / "ca.pem"
        if not key_path.exists():
            if certificate_path.exists():
                raise IdentityError(f"{key_path}: missing, but {certificate_path.name} exists")
            pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
            )
            write_private(key_path, pem)
        key = _load_key(key_path)
        if not certificate_path.exists():
            write_private(certificate_path, _make_root(key, trust_domain, now).public_bytes(Encoding.PEM))
        try:
            certificate = _load_root(certificate_path.read_text("ascii"), key, trust_domain, now)
        except (IdentityError, UnicodeDecodeError) as exc:
            raise IdentityError(f"{certificate_path}: {exc}") from exc
        return cls(key, certificate, trust_domain)

    @property
    def bundle_pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def issue(
        self,
        identity: SpiffeId,
        subject: x509.CertificateSigningRequest | PublicKey,
        *,
        now: float,
        ttl_s: float = LEAF_TTL_S,
    ) -> str:
        """The chain (PEM, leaf first, without the root) of an X509-SVID. Raises IdentityError.

        Of a signing request only the key is taken: who asks is decided by the caller, not by the request.
        The leaf never outlives the root.
        """
        if trust_domain_of(parse_id(identity)) != self.trust_domain:
            raise IdentityError(f"{identity} is not in the trust domain {self.trust_domain}")
        key = _public_key(subject)
        start = utc(now)
        end = min(start + datetime.timedelta(seconds=ttl_s), self.certificate.not_valid_after_utc)
        if end <= start:
            raise IdentityError("the CA's root has expired" if ttl_s > 0 else "a certificate must live longer than 0 s")
        root_key_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - _BACKDATE)
            .not_valid_after(end)
            # Critical, since the subject is empty (RFC 5280 section 4.2.1.6).
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(sign_data=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(root_key_id), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return leaf.public_bytes(Encoding.PEM).decode()


def write_private(path: Path, data: bytes) -> None:
    """Whole or not at all, 0600, on disk when it returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise IdentityError(f"{path}: others than its owner can read the key (mode {mode:04o}, must be 0600)")
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as exc:
        raise IdentityError(f"{path}: not a private key in PEM: {exc}") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: not an elliptic-curve key")
    return key


def _load_root(pem: str, key: ec.EllipticCurvePrivateKey, trust_domain: str, now: float) -> x509.Certificate:
    certificate, *more = parse_certificates(pem)
    if more:
        raise IdentityError("more than one certificate")
    check_root(certificate, trust_domain)
    if _spki(certificate.public_key()) != _spki(key.public_key()):  # type: ignore[arg-type]
        raise IdentityError("the certificate is not that of the key in ca.key")
    if not certificate.not_valid_before_utc <= utc(now) < certificate.not_valid_after_utc:
        raise IdentityError(
            f"valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} only, the clock says {utc(now):%Y-%m-%d %H:%M}"
        )
    return certificate


def _spki(key: PublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _make_root(key: ec.EllipticCurvePrivateKey, trust_domain: str, now: float) -> x509.Certificate:
    # The serial number in the name tells the roots of one trust domain apart while one replaces the other.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "netproxy"),
            x509.NameAttribute(NameOID.COMMON_NAME, "mesh root"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, secrets.token_hex(8)),
        ]
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(now) - _BACKDATE)
        .not_valid_after(utc(now) + _ROOT_LIFE)
        # One level below: a signing certificate per control-plane replica stays possible.
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(sign_data=False), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _key_usage(*, sign_data: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign_data,
        key_cert_sign=not sign_data,
        crl_sign=not sign_data,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _public_key(subject: x509.CertificateSigningRequest | PublicKey) -> PublicKey:
    if isinstance(subject, x509.CertificateSigningRequest):
        if not subject.is_signature_valid:
            raise IdentityError("the signing request is not signed by its own key")
        key = subject.public_key()
    else:
        key = subject
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, (ec.SECP256R1, ec.SECP384R1)):
            raise IdentityError(f"the curve {key.curve.name} is not accepted, only P-256 and P-384")
    elif not isinstance(key, rsa.RSAPublicKey):
        raise IdentityError("only ECDSA and RSA keys are accepted")
    elif key.key_size < 2048:
        raise IdentityError(f"an RSA key of {key.key_size} bits is too short")
    return key
