"""SPIFFE IDs and what a certificate must look like to carry one.

The grammar is the SPIFFE-ID specification's (section 2), the certificate rules are X509-SVID's (sections 2 to 5).
Chain, signature and time are checked by OpenSSL during the handshake; here is what OpenSSL does not know.
"""

from __future__ import annotations

import functools
import re

from cryptography import x509

from ..addr import SpiffeId
from ..errors import IdentityError

# Lower case only, no percent-encoding, no empty segment: two spellings never mean one identity.
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}\Z")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+\Z")
_MAX_ID = 2048


def check_trust_domain(name: str) -> str:
    if not _TRUST_DOMAIN.match(name):
        raise IdentityError(f"not a trust domain: {name[:300]!r}")
    return name


def split_id(text: str) -> tuple[str, str]:
    """``spiffe://td/path`` as (trust domain, path with its slash or ""). Raises IdentityError."""
    domain, slash, path = text.removeprefix("spiffe://").partition("/")
    if (
        not text.startswith("spiffe://")
        or len(text) > _MAX_ID
        or not _TRUST_DOMAIN.match(domain)
        or (slash and not all(_SEGMENT.match(part) and part not in (".", "..") for part in path.split("/")))
    ):
        raise IdentityError(f"not a SPIFFE ID: {text[:300]!r}")
    return domain, slash + path


def parse_id(text: str) -> SpiffeId:
    """The ID of a workload: its path is not empty (X509-SVID section 2). Raises IdentityError."""
    if not split_id(text)[1]:
        raise IdentityError(f"the SPIFFE ID of a trust domain, not of a workload: {text!r}")
    return SpiffeId(text)


def trust_domain_of(identity: SpiffeId) -> str:
    return split_id(identity)[0]


def uri_san(certificate: x509.Certificate) -> str:
    """The one URI SAN. More than one is an attack on readers that take the first (X509-SVID section 2)."""
    try:
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as exc:
        raise IdentityError("the certificate has no subject alternative name") from exc
    uris = san.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise IdentityError(f"the certificate has {len(uris)} URI names instead of one")
    return uris[0]


def leaf_identity(certificate: x509.Certificate) -> SpiffeId:
    """The identity that a leaf certificate proves. Raises IdentityError."""
    try:
        identity = parse_id(uri_san(certificate))
        extensions = certificate.extensions
        try:
            if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise IdentityError(f"the certificate of {identity} is a CA's")
        except x509.ExtensionNotFound:
            pass
        try:
            usage = extensions.get_extension_for_class(x509.KeyUsage)
        except x509.ExtensionNotFound as exc:
            raise IdentityError(f"the certificate of {identity} has no key usage") from exc
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as exc:
        raise IdentityError(f"the certificate can't be read: {exc}") from exc
    if not usage.critical or not usage.value.digital_signature or usage.value.key_cert_sign or usage.value.crl_sign:
        raise IdentityError(f"the certificate of {identity} has the wrong key usage")
    return identity


@functools.lru_cache(maxsize=1024)
def identity_of_der(der: bytes) -> SpiffeId:
    """As `leaf_identity`. Cached: a peer shows the same certificate on each of its connections."""
    try:
        certificate = x509.load_der_x509_certificate(der)
    except ValueError as exc:
        raise IdentityError(f"the certificate can't be read: {exc}") from exc
    return leaf_identity(certificate)


class SpiffeVerifier:
    """Accepts the leaves of one trust domain."""

    def __init__(self, trust_domain: str) -> None:
        self.trust_domain = check_trust_domain(trust_domain)

    def identity(self, der: bytes | None) -> SpiffeId:
        """Raises IdentityError; `None` is a peer without certificate."""
        if der is None:
            raise IdentityError("the peer has no certificate")
        identity = identity_of_der(der)
        if trust_domain_of(identity) != self.trust_domain:
            raise IdentityError(f"{identity} is not in the trust domain {self.trust_domain}")
        return identity
