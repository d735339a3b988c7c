"""``python -m bench NAME ...``"""

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
    if len(sys.argv) < 2 or sys.argv[1] not in names():
        print("usage: python -m bench NAME [options]\n", file=sys.stderr)
        for name in names():
            doc = importlib.import_module(f"bench.{name}").__doc__ or ""
            print(f"  {name:14} {doc.splitlines()[0]}", file=sys.stderr)
        return 2
    importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
