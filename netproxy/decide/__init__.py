"""Decisions about one request: which rule, which backend, which endpoint. PURE."""
