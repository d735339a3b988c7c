"""Compiles, loads, attaches and pins the hooks of a node, then ends. `python -m redirect.bpf.loader NODE BPFFS CGROUP`

Instructions on standard input are taken if they are of the present sources, else there is compiled; those that were
taken are on standard output (`programs.to_text`).

    maps, as pinned, else made -> programs -> links: swapped where pinned, else made and pinned -> the image, last

What is pinned is used again, so that a run that was cut short is finished by the next one, and an upgrade swaps each
program at one instant (BPF_LINK_UPDATE) with all that the maps hold. Where the maps themselves have changed, a new set
is made beside the earlier one.

A process of its own, because of the memory that the compiler takes. Ends with 0, or with 1 and a line on standard
error.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from redirect.bpf import bpffs, compiler, programs, syscall
from redirect.bpf.pins import attach, open_maps, place_of, swap_inbound
from redirect.bpf.programs import HOOKS, INBOUND
from redirect.errors import RedirectError


def main(arguments: list[str]) -> int:
    node, mount, cgroup = arguments
    try:
        print(load(node, Path(mount), Path(cgroup), sys.stdin.read()))
    except RedirectError as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def load(node: str, mount: Path, cgroup: Path, given: str = "") -> str:
    """The instructions. RedirectError: what was done until then stays, and is used by the next run or removed by
    `clean`."""
    version, codes = programs.from_text(given)
    if version != compiler.version() or codes.keys() != {hook.name for hook in HOOKS}:
        version, codes = compiler.version(), compiler.compiled()
    place = place_of(node, bpffs.mounted(mount))
    with ExitStack() as stack:
        stack.enter_context(bpffs.locked(bpffs.folder(node, mount)))
        place.mkdir(mode=0o700, exist_ok=True)
        maps = open_maps(place, stack, make=True)
        try:
            root = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise RedirectError(str(exc), namespace=str(cgroup), step="open cgroup") from exc
        stack.callback(os.close, root)
        for hook in HOOKS:
            if hook.per_namespace:
                continue
            program = programs.load(hook, codes[hook.name], maps)
            stack.callback(os.close, program)
            attach(place / f"link_{hook.name}", program, root, hook.attach)
        for name in bpffs.pinned(place):
            if name.startswith("inbound_"):
                swap_inbound(place / name, codes[INBOUND.name], maps)
        syscall.update(maps["image"], bytes(4), programs.packed(version, codes))
    return programs.to_text(version, codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
