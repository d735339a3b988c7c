"""From a listening socket to a connection whose destination and protocol are known."""
