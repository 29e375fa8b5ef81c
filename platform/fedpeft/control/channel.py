"""Channels to a control plane: limits, keepalive, retries of what changes nothing, and what a failed handshake means."""

from __future__ import annotations

import json
import socket
import ssl
from typing import TYPE_CHECKING, Any

from fedpeft.control.address import Address, Identity, loopback
from fedpeft.control.bounds import MESSAGE
from fedpeft.control.faults import AGAIN
from fedpeft.errors import LinkError, PolicyError

if TYPE_CHECKING:
    import grpc

IDEMPOTENT = {
    "fedpeft.v1.Registry": ("List", "Get", "History", "Aliases", "Staged", "SetAlias"),
    "fedpeft.v1.Router": ("Route",),
    "fedpeft.v1.Federation": ("Status",),
}
"""Unary calls that may be made again: they change nothing, or a second time nothing more. Streams go on by themselves (`client.py`)."""
LIMITS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE),
    ("grpc.max_send_message_length", MESSAGE),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]
OPTIONS: list[tuple[str, Any]] = [
    *LIMITS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


def service_config() -> str:
    """Retries with backoff, as gRPC reads them."""
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 2.0,
        "retryableStatusCodes": sorted(AGAIN - {"ABORTED"}),
    }
    names = [{"service": service, "method": method} for service, methods in IDEMPOTENT.items() for method in methods]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})


def connect(address: Address, identity: Identity | None) -> grpc.Channel:
    """A channel, which connects at its first call.

    Raises:
        PolicyError: the own certificate does not hold, or none is given for an address beyond this machine.
        ConfigError: a file of the identity is missing.
    """
    import grpc

    options = [*OPTIONS, ("grpc.service_config", service_config())]
    if identity is None:
        if not (address.insecure or loopback(address.host)):
            raise PolicyError(
                f"{address}: is another machine; give --identity NAME.pem or NAME.token, or accept the risk with grpc-insecure://"
            )
        return grpc.insecure_channel(address.target, options)
    identity.check()
    return grpc.secure_channel(address.target, _credentials(identity), options)


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    """TLS with the own certificate, or with a token in every call, which gRPC lets travel under TLS only."""
    import grpc

    files = [None if path is None else path.read_bytes() for path in (identity.ca, identity.key, identity.cert)]
    secure, token = grpc.ssl_channel_credentials(*files), identity.secret
    return secure if token is None else grpc.composite_channel_credentials(secure, grpc.access_token_call_credentials(token))


def why_not(address: Address, identity: Identity | None) -> LinkError | PolicyError | None:
    """What keeps a connection from being made, by trying: nobody listens, or a certificate does not hold on either side."""
    try:
        with socket.create_connection((address.host, address.port), timeout=5.0) as plain:
            return _speaks_tls(plain, address) if identity is None else _handshake(plain, address, identity)
    except OSError as fault:
        return LinkError(f"{address}: cannot be reached: {fault.strerror or fault}; is `fedpeft coordinator serve` running there?")


def _speaks_tls(plain: socket.socket, address: Address) -> LinkError | None:
    """What is said to a caller without TLS when the server has some; nothing is sent to it but a greeting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with context.wrap_socket(plain):
            return LinkError(f"{address}: uses TLS and was called without; give --identity NAME.pem or NAME.token")
    except OSError:
        return None


def _handshake(plain: socket.socket, address: Address, identity: Identity) -> LinkError | PolicyError | None:
    """A server that takes the certificate speaks first; one that does not hangs up, mostly without saying why."""
    try:
        context = ssl.create_default_context(cafile=str(identity.ca))
        context.set_alpn_protocols(["h2"])
        if identity.cert is not None:
            context.load_cert_chain(identity.cert, identity.key)
        with context.wrap_socket(plain, server_hostname=address.host) as secure:
            if secure.recv(1):
                return None
    except ssl.SSLCertVerificationError as fault:
        return LinkError(f"{address}: its certificate does not hold: {fault.verify_message}; is {identity.ca} the CA that signed it?")
    except ssl.SSLError as fault:
        if "ALERT" not in (fault.reason or ""):
            return LinkError(f"{address}: no TLS comes about: {fault.reason or fault}; does it use TLS?")
    except ConnectionResetError:
        pass
    except OSError as fault:
        return LinkError(f"{address}: ended the handshake: {fault.strerror or fault}; does it use TLS?")
    return PolicyError(f"{address}: does not take the certificate {identity.cert or identity.token}, which {identity.doubt}")
