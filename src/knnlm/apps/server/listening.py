"""Ports for servers; needs no package of the extra."""

import socket

from knnlm.errors import InvalidArgumentError


def listen(host: str, port: int) -> socket.socket:
    """Open a port, 0 for any that is free; raises InvalidArgumentError."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidArgumentError(
            f"cannot listen on host {host}, port {port}: {reason}; choose another --port or --host"
        ) from error
    return listener
