"""X509-SVIDs of the workloads on this node: made, renewed at half life, kept over restarts."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from ..addr import SpiffeId
from ..config.shard import SvidShard, decode_shard, encode_shard
from ..errors import IdentityError
from .ca import LEAF_TTL_S, CertificateAuthority, write_private
from .spiffe import leaf_identity
from .trust import parse_certificates, verify_chain

_JITTER = 0.1
"""Of the half life: the identities of a node that was started at once do not all renew at once."""
_MIN_LIFE_LEFT = 1 / 3
"""An SVID that missed its renewal at half life for long is better replaced than reused."""


def new_key_pem() -> str:
    """A new P-256 key, PKCS 8."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def issue_svid(ca: CertificateAuthority, identity: SpiffeId, *, now: float, ttl_s: float = LEAF_TTL_S) -> SvidShard:
    """With a key of its own: keys are never reused over a renewal. Raises IdentityError."""
    key_pem = new_key_pem()
    key = load_pem_private_key(key_pem.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    chain_pem = ca.issue(identity, key.public_key(), now=now, ttl_s=ttl_s)
    return SvidShard(identity, chain_pem, key_pem, ca.bundle_pem, validity(chain_pem)[1])


def validity(chain_pem: str) -> tuple[float, float]:
    """(not before, not after) of the leaf, Unix time. Raises IdentityError."""
    leaf = parse_certificates(chain_pem)[0]
    return leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()


def renew_at(svid: SvidShard, rng: random.Random) -> float:
    """When to renew (Unix time): half life, 10 % of it earlier or later."""
    not_before, not_after = validity(svid.chain_pem)
    return not_before + (not_after - not_before) / 2 * rng.uniform(1 - _JITTER, 1 + _JITTER)


class SvidStore:
    """SVIDs in a folder (0700), one file (0600) per identity, so that a restart needs no CA. Blocks on files."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, identity: SpiffeId) -> Path:
        """Readable at the front, unambiguous at the end, and never longer than a file name may be."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", identity.removeprefix("spiffe://"))[-80:]
        return self.folder / f"{readable}.{hashlib.sha256(identity.encode()).hexdigest()[:32]}.svid"

    def save(self, svid: SvidShard) -> None:
        """Replaces what was there. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self.path(svid.identity), encode_shard(svid))

    def load(
        self, identity: SpiffeId, *, now: float, bundle_pem: str | None = None, due: bool = False
    ) -> SvidShard | None:
        """What was saved, with `bundle_pem` in place of its own bundle if given.

        None when there is none or it is due for replacement (a third of its life left; `due`: take that too, for when
        nobody could replace it). Raises IdentityError, which names the file, when it can't be used: not readable, of
        another identity, key and certificate do not match, not signed by a root of the bundle, expired.
        """
        path = self.path(identity)
        try:
            svid = decode_shard(f"svid/{identity}", path.read_bytes())
            assert isinstance(svid, SvidShard)
            if bundle_pem is not None:
                svid = dataclasses.replace(svid, bundle_pem=bundle_pem)
            not_before, not_after = validity(svid.chain_pem)
            if not due and not_after - now <= (not_after - not_before) * _MIN_LIFE_LEFT:
                return None
            _check(svid, identity, not_after, now)
        except FileNotFoundError:
            return None
        except (IdentityError, OSError, ValueError) as exc:
            raise IdentityError(f"{path}: {exc}") from exc
        return svid


def _check(svid: SvidShard, identity: SpiffeId, not_after: float, now: float) -> None:
    leaf = verify_chain(svid.chain_pem, svid.bundle_pem, now=now)
    if svid.identity != identity or leaf_identity(leaf) != identity:
        raise IdentityError(f"is of {leaf_identity(leaf)}, not of {identity}")
    if svid.not_after != not_after:
        raise IdentityError("its end is not the certificate's")
    try:
        key = load_pem_private_key(svid.key_pem.encode(), None)
    except (ValueError, TypeError) as exc:
        raise IdentityError("the key is not a private key in PEM") from exc
    if key.public_key() != leaf.public_key():
        raise IdentityError("the key is not that of the certificate")
