"""Ports that are free now."""

import random
import socket

LASTING = range(12_000, 20_000)
"""Below those that the kernel gives to connections, and that Ray's heads of batch jobs take."""


def free_ports(count: int) -> list[int]:
    """So many different ones of the loopback interface, for a moment."""
    return _bound([0] * count)


def lasting_ports(count: int) -> list[int]:
    """The same for a server that is to come back at its ports: connections of others do not take them meanwhile."""
    while True:
        try:
            return _bound(random.sample(LASTING, count))
        except OSError:
            continue  # one of them is taken


def _bound(ports: list[int]) -> list[int]:
    sockets = [socket.socket() for _ in ports]
    try:
        for one, port in zip(sockets, ports, strict=True):
            one.bind(("127.0.0.1", port))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
