"""Bytes <-> events. PURE: no socket, loop, clock, file or log in here."""
