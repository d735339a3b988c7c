"""Services that are balanced inside connect(): by weight, over what is there now. PURE but for addresses as structures.

The endpoints of a service are an alias table (M. D. Vose, "A linear algorithm for generating random numbers with a
given distribution", 1991): two random numbers and at most two look-ups, however many endpoints there are.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import NamedTuple

from redirect.bpf import layout
from redirect.errors import RedirectError

_FULL = 1 << 32
MAX_WEIGHT = 1 << 20


class Target(NamedTuple):
    """An endpoint. Weight 0 gets nothing."""

    address: str
    port: int
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Balanced:
    """A service at a VIP and port: TCP, without a proxy. No endpoint: connections are refused.

    `affinity`: the same workload gets the same endpoint as long as the endpoints stay the same. Endpoints are of the
    VIP's IP family. RedirectError otherwise.
    """

    address: str
    port: int
    targets: tuple[Target, ...]
    affinity: bool = False

    def __post_init__(self) -> None:
        where = f"{self.address} port {self.port}"
        try:
            versions = {
                ipaddress.ip_address(text).version for text in (self.address, *(t.address for t in self.targets))
            }
        except ValueError as exc:
            raise RedirectError(str(exc), step=f"balance {where}") from exc
        if len(versions) != 1:
            raise RedirectError("endpoints are of another IP family than the service", step=f"balance {where}")
        if len(self.targets) > layout.MAX_ENDPOINTS // 2:
            raise RedirectError(f"{len(self.targets)} endpoints are too many", step=f"balance {where}")
        for port in (self.port, *(target.port for target in self.targets)):
            if not 0 < port < 1 << 16:
                raise RedirectError(f"port {port} is not in 1..65535", step=f"balance {where}")
        for target in self.targets:
            if not 0 <= target.weight <= MAX_WEIGHT:
                raise RedirectError(f"weight {target.weight} is not in 0..{MAX_WEIGHT}", step=f"balance {where}")


def alias_table(weights: list[int]) -> list[tuple[int, int]]:
    """A row (threshold, alias) for each of `weights`, which are positive: a 32 bit number below the threshold is for
    the row itself, else for `alias`. Shares are exact to one in 2**32."""
    size, total = len(weights), sum(weights)
    rows = [(_FULL - 1, index) for index in range(size)]
    # In units of 1 / total, so that nothing is rounded until a threshold is written.
    scaled = [weight * size for weight in weights]
    small = [index for index, share in enumerate(scaled) if share < total]
    large = [index for index, share in enumerate(scaled) if share >= total]
    while small and large:
        less, more = small.pop(), large[-1]
        rows[less] = (scaled[less] * _FULL // total, more)
        scaled[more] -= total - scaled[less]
        if scaled[more] < total:
            small.append(large.pop())
    return rows


def endpoint_rows(service: Balanced, number: int) -> list[tuple[bytes, bytes]]:
    """Entries of the map `endpoints`, for the set of this number."""
    targets = [target for target in service.targets if target.weight]
    table = alias_table([target.weight for target in targets])
    key, value = layout.EndpointKey(number), layout.Endpoint()
    rows = []
    # One structure is filled again and again: a service may have ten thousand endpoints.
    for index, (target, (threshold, alias)) in enumerate(zip(targets, table, strict=True)):
        key.index, value.threshold, value.alias = index, threshold, alias
        value.address = layout.address(target.address)
        value.port = layout.net16(target.port)
        rows.append((bytes(key), bytes(value)))
    return rows


def service_key(address: str, port: int) -> bytes:
    return bytes(layout.ServiceKey(layout.address(address), layout.net16(port)))


def service_row(service: Balanced, number: int) -> bytes:
    count = sum(1 for target in service.targets if target.weight)
    return bytes(layout.Service(number, count, layout.ServiceFlag.AFFINITY if service.affinity else 0))
