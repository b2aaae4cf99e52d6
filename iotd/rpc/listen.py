"""Where the server listens, and with which credentials: each checked first, for gRPC itself tells no reason."""

import errno
import socket
from pathlib import Path
from typing import Any

import grpc

from iotd.address import split_address
from iotd.config import GrpcConfig, grpc_contradictions
from iotd.errors import ConfigError
from iotd.tls import check_authority, check_identity


def check(config: GrpcConfig) -> None:
    """Raises ConfigError where `serve` could not listen as configured. Leaves the address free."""
    credentials(config)
    check_free(config.listen)


def check_free(listen: str) -> None:
    """Raises ConfigError where the address, host:port, cannot be listened on, with the system's reason."""
    host, port = split_address(listen)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        failures = [failure for failure in map(_bind_failure, found) if failure]
        taken = [failure for failure in failures if failure.errno == errno.EADDRINUSE]
        # A name such as localhost may have an IPv6 address on a machine without IPv6: one good address is enough.
        if taken or len(failures) == len(found):
            raise (taken or failures)[0]
    except OSError as error:
        hint = ": is another iotd running?" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {listen}: {error.strerror}{hint}", field="grpc.listen") from error


def _bind_failure(found: tuple[int, int, int, str, tuple[Any, ...]]) -> OSError | None:
    family, kind, protocol, _, sockaddr = found
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(sockaddr)
    except OSError as error:
        return error
    return None


def credentials(config: GrpcConfig) -> grpc.ServerCredentials | None:
    """TLS credentials, None without TLS. Raises ConfigError for an exposed address and for files that do not fit."""
    for field, text in grpc_contradictions(config):
        raise ConfigError(text, field=field)
    if not config.tls_cert_file:
        return None
    certificate = _read(config, "tls_cert_file")
    key = _read(config, "tls_key_file")
    client_ca = _read(config, "tls_client_ca_file") if config.tls_client_ca_file else None
    try:
        check_identity(config.tls_cert_file, config.tls_key_file)
    except ValueError as error:
        raise ConfigError(str(error), field="grpc.tls_cert_file") from error
    try:
        if config.tls_client_ca_file:
            check_authority(config.tls_client_ca_file)
    except ValueError as error:
        raise ConfigError(str(error), field="grpc.tls_client_ca_file") from error
    return grpc.ssl_server_credentials([(key, certificate)], client_ca, require_client_auth=client_ca is not None)


def _read(config: GrpcConfig, key: str) -> bytes:
    path: str = getattr(config, key)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=f"grpc.{key}") from error
