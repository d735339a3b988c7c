"""The root of this package's errors. OSError, netlink and nft errors are translated into it at the edge, `from exc`."""

from __future__ import annotations


class RedirectError(Exception):
    """Steering could not be observed, changed or described.

    `namespace` says where (empty when nothing was touched), `step` what was being done. Both are part of the message.
    """

    def __init__(self, message: str, *, namespace: str = "", step: str = "") -> None:
        super().__init__(": ".join(part for part in (namespace, step, message) if part))
        self.namespace = namespace
        self.step = step
