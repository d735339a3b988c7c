"""``python -m bench NAME ...``, or ``all`` for every question in turn."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import bench


def names() -> list[str]:
    """Modules of this package that measure something."""
    found = (module.name for module in pkgutil.iter_modules(bench.__path__) if not module.name.startswith("_"))
    return sorted(name for name in found if hasattr(importlib.import_module(f"bench.{name}"), "main"))


def main() -> int:
    known = names()
    if sys.argv[1:2] == ["all"]:
        importlib.import_module("bench._all").main(sys.argv[2:])
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
            print(f"bench: no question is called {sys.argv[1]}\n", file=sys.stderr)
        print("usage: python -m bench NAME [options]\n", file=sys.stderr)
        for name in known:
            doc = importlib.import_module(f"bench.{name}").__doc__ or ""
            print(f"  {name:14} {doc.splitlines()[0]}", file=sys.stderr)
        print(f"  {'all':14} Every question in turn.", file=sys.stderr)
        return 2
    importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
