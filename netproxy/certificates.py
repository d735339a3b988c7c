"""Certificates of the local identities: from the store while they are good, else issued; renewed in time. Brain's part.

Each identity is handled by itself. While the CA can't be opened, what is in the store is used as it is, and looked at
again when it can.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .addr import SpiffeId
from .config.shard import SvidShard
from .errors import IdentityError
from .identity.ca import CertificateAuthority
from .identity.svid import SvidStore, issue_svid, renew_at
from .log import WARNING, log
from .settings import NodeSettings
from .state import AGAIN_S, StateFolder, in_short

_CA_TIMEOUT_S = 3.0
"""A CA on a file system that does not answer must not stop the brain; it is opened in a thread of its own."""
_CA = SpiffeId("")
"""Key of the CA's own error among those of the identities."""


class Certificates:
    """`reader` runs what blocks on files."""

    def __init__(self, settings: NodeSettings, state: StateFolder, reader: ThreadPoolExecutor) -> None:
        self.svids: dict[SpiffeId, SvidShard] = {}
        self._settings = settings
        self._state = state
        self._reader = reader
        self._loop = asyncio.get_running_loop()
        self._errors: dict[SpiffeId, str] = {}
        self._renew: dict[SpiffeId, float] = {}
        self._retry_at = 0.0
        self._unchecked: set[SpiffeId] = set()
        """Taken from the store while there was no CA to check them against."""
        self._unsaved: set[SpiffeId] = set()
        self._ca: CertificateAuthority | None = None
        self._opening: asyncio.Future[CertificateAuthority] | None = None
        self._opener = ThreadPoolExecutor(1, "ca")
        self._store = SvidStore(os.path.join(settings.state_dir, "svid"))
        self._rng = random.Random()

    @property
    def error(self) -> str:
        return in_short(self._errors.values())

    async def want(self, identities: set[SpiffeId], trust_domain: str) -> None:
        """An SVID for each of these, and for no other."""
        for gone in {*self.svids, *self._errors} - identities - {_CA}:
            self.svids.pop(gone, None)
            self._renew.pop(gone, None)
            self._errors.pop(gone, None)
        self._unchecked &= identities
        self._unsaved &= identities
        await self._provide(identities - set(self.svids), trust_domain)

    async def renew(self, identities: set[SpiffeId], trust_domain: str) -> bool:
        """Look after `identities`: what is due is renewed, what is lacking tried again. Is there a new one?"""
        now = time.time()
        due = {identity for identity, at in self._renew.items() if at <= now}
        lacking = identities - set(self.svids) | self._unchecked
        if now < self._retry_at:
            lacking = set()
        new = await self._provide(lacking - due, trust_domain)
        new |= await self._provide(due, trust_domain, renew=True)
        for identity in due:
            if self._renew[identity] <= now:  # not renewed
                self._renew[identity] = now + 60 * (1 + self._rng.random())
        return new

    async def save_again(self) -> None:
        """What could not be written while the disk was full or read-only."""
        for svid in [self.svids[identity] for identity in self._unsaved if identity in self.svids]:
            await self._loop.run_in_executor(self._reader, self._save, svid)

    def _note(self, identity: SpiffeId, failed: Exception | None = None) -> None:
        """`identity` (or the CA) is well, or failed. Logged when that changes."""
        if failed is None:
            self._errors.pop(identity, None)
        elif self._errors.get(identity) != str(failed):
            self._errors[identity] = str(failed)
            log(f"identity: {failed}", WARNING)

    async def _authority(self, trust_domain: str) -> CertificateAuthority | None:
        """None when it can't be opened; `error` says why."""
        try:
            if self._ca is None or self._ca.trust_domain != trust_domain:
                self._ca = None
                self._ca = await self._open_authority(trust_domain)
            self._note(_CA)
        except (IdentityError, OSError) as exc:
            self._note(_CA, exc)
        return self._ca

    async def _open_authority(self, trust_domain: str) -> CertificateAuthority:
        patience = 0.0  # one that is under way since the last look had its time
        if self._opening is None:
            patience = _CA_TIMEOUT_S
            self._opening = self._loop.run_in_executor(
                self._opener, lambda: CertificateAuthority.open(self._settings.ca_dir, trust_domain, now=time.time())
            )
        done, _ = await asyncio.wait({self._opening}, timeout=patience)
        if not done:
            raise IdentityError(f"{self._settings.ca_dir}: does not answer")
        opened, self._opening = self._opening, None
        authority = opened.result()
        return authority if authority.trust_domain == trust_domain else await self._open_authority(trust_domain)

    async def _provide(self, identities: Iterable[SpiffeId], trust_domain: str, *, renew: bool = False) -> bool:
        """SVIDs for `identities`, each by itself; is there a new one?

        While the CA can't be opened: from the store as they are, and looked at again when it can (`_unchecked`).
        """
        pending = sorted(identities)
        if not pending:
            return False
        authority = await self._authority(trust_domain)
        if authority is None:
            self._retry_at = time.time() + AGAIN_S
            pending = [identity for identity in pending if identity not in self.svids]
        installed = False
        for identity in pending:
            try:
                svid = await self._loop.run_in_executor(
                    self._reader, lambda who: self._obtain(who, authority, renew=renew), identity
                )
            except (IdentityError, OSError) as exc:
                self._note(identity, exc)
                self._retry_at = time.time() + AGAIN_S
                continue
            self._note(identity)
            if svid is None:
                continue
            installed = True
            self.svids[identity] = svid
            self._renew[identity] = renew_at(svid, self._rng)
            if authority is None:
                self._unchecked.add(identity)
            else:
                self._unchecked.discard(identity)
            if renew:
                log(f"renewed the certificate of {identity}")
        return installed

    def _obtain(self, identity: SpiffeId, authority: CertificateAuthority | None, *, renew: bool) -> SvidShard | None:
        """None: there is none, and nobody to issue it. Raises IdentityError. Blocks on files."""
        now = time.time()
        if not renew:
            try:
                kept = self._store.load(
                    identity, now=now, bundle_pem=authority.bundle_pem if authority else None, due=authority is None
                )
                if kept is not None:
                    return kept
            except IdentityError as exc:
                if authority is None:
                    raise
                log(f"identity: {exc}; a new certificate takes its place", WARNING)
        if authority is None:
            return None
        svid = issue_svid(authority, identity, now=now)
        self._save(svid)
        return svid

    def _save(self, svid: SvidShard) -> None:
        try:
            self._store.save(svid)
        except OSError as exc:
            self._unsaved.add(svid.identity)
            self._state.note("svid", exc)
        else:
            self._unsaved.discard(svid.identity)
            if not self._unsaved:
                self._state.note("svid")
