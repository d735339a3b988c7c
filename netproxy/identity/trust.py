"""Trust bundles: the roots of a trust domain, as PEM.

A bundle holds several roots while a CA is rotated: old and new leaves verify at the same time. Only CA certificates
that signed themselves are roots; anything else in a bundle makes it invalid as a whole, since a leaf among the roots
would be an authority for nobody knows what.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from ..errors import IdentityError
from .spiffe import leaf_identity, split_id, trust_domain_of, uri_san


def utc(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC)


def parse_certificates(pem: str) -> list[x509.Certificate]:
    """Raises IdentityError when there is none or one can't be read."""
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as exc:
        raise IdentityError(f"not PEM certificates: {exc}") from exc


def check_root(certificate: x509.Certificate, trust_domain: str | None = None) -> None:
    """A self-signed CA of `trust_domain` (any if None). Says nothing about time. Raises IdentityError."""
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise IdentityError("the root has not signed itself") from exc
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        if not constraints.ca or not usage.key_cert_sign:
            raise IdentityError("the root may not sign certificates")
        domain, path = split_id(uri_san(certificate))
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as exc:
        raise IdentityError(f"the root is not a CA certificate: {exc}") from exc
    if path:
        raise IdentityError(f"the root has the identity of a workload: {path}")
    if trust_domain is not None and domain != trust_domain:
        raise IdentityError(f"the root is of the trust domain {domain}, not {trust_domain}")


def parse_bundle(pem: str, *, trust_domain: str | None = None) -> tuple[x509.Certificate, ...]:
    """The roots of a bundle, each once, in its order. Raises IdentityError."""
    roots = tuple(dict.fromkeys(parse_certificates(pem)))
    for root in roots:
        check_root(root, trust_domain)
    return roots


def bundle_pem(roots: Iterable[x509.Certificate]) -> str:
    """Canonical: the same roots give the same text in whatever order, so that no context is rebuilt for nothing."""
    unique = {root.public_bytes(Encoding.DER): root for root in roots}
    return "".join(unique[der].public_bytes(Encoding.PEM).decode() for der in sorted(unique))


def verify_chain(chain_pem: str, bundle: str, *, now: float) -> x509.Certificate:
    """The leaf of a chain that leads to a root of `bundle` and is valid now. Raises IdentityError.

    An SVID of another trust domain than its root's is refused.
    """
    leaf, *rest = parse_certificates(chain_pem)
    identity = leaf_identity(leaf)
    verifier = PolicyBuilder().store(Store(list(parse_bundle(bundle)))).time(utc(now)).build_client_verifier()
    try:
        chain = verifier.verify(leaf, rest).chain
    except (VerificationError, ValueError) as exc:
        raise IdentityError(f"the certificate of {identity} is not valid: {exc}") from exc
    check_root(chain[-1], trust_domain_of(identity))
    return leaf
