"""The gRPC server: the port, health, reflection, and the order of stopping. Knows nothing of what it serves."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from iotd.config import AskConfig, GrpcConfig
from iotd.errors import ConfigError
from iotd.events import RGB, ServerStatus, ServingState
from iotd.rpc.listen import check_free, credentials
from iotd.rpc.service import AskEngine, Service
from iotd.v1 import iotd_pb2, iotd_pb2_grpc

SERVICE = iotd_pb2.DESCRIPTOR.services_by_name["Iotd"].full_name
_CLOSE_S = 1.0
"""For the last messages to leave, once every answer has ended."""
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    """Serves iotd.v1 on one asyncio event loop; every method is called there.

    Asks are refused with UNAVAILABLE, and health says NOT_SERVING, until `set_serving(True)`.
    """

    def __init__(
        self,
        engine: AskEngine | None,
        status: Callable[[], ServerStatus],
        config: GrpcConfig,
        *,
        ask: AskConfig | None = None,
        decode_image: Callable[[bytes], RGB],
    ) -> None:
        """engine: may come later, by `attach`. decode_image: JPEG or PNG to RGB, raises InvalidInput; any thread."""
        self._config = config
        self._credentials = credentials(config)
        self._service = Service(status, ask or AskConfig(), decode_image)
        self._service.engine = engine
        self._health = health_aio.HealthServicer()
        self._announcements: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None

    @property
    def service(self) -> Service:
        """What answers, for questions that come another way than by gRPC."""
        return self._service

    @property
    def state(self) -> ServingState:
        """Whether questions are taken."""
        return self._service.state

    def attach(self, engine: AskEngine) -> None:
        """The engine that answers from now on."""
        self._service.engine = engine

    def reconfigure(self, ask: AskConfig) -> None:
        """New limits, for the asks that come from now on."""
        self._service.limits = ask

    async def start(self) -> int:
        """Listen; not yet serving. Returns the port. Raises ConfigError where the address cannot be had."""
        self.set_health(False)
        server = grpc.aio.server(options=_options(self._config))
        port = _bind(server, self._config.listen, self._credentials)
        iotd_pb2_grpc.add_IotdServicer_to_server(self._service, server)  # type: ignore[no-untyped-call] # generated
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.reflection:
            reflection.enable_server_reflection([SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME], server)
        await server.start()
        self._server = server
        return port

    def set_serving(self, serving: bool) -> None:
        """Take questions, or refuse them: before the first True as loading, after it as draining."""
        if serving:
            self._service.state = ServingState.SERVING
        elif self._service.state is ServingState.SERVING:
            self._service.state = ServingState.DRAINING
        self.set_health(serving)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new asks, wait for the open ones at most `grace_s` seconds, end the rest, and close the port."""
        self.set_serving(False)
        self._service.state = ServingState.DRAINING
        await self._service.drain(grace_s)
        if self._server is not None:
            await self._server.stop(_CLOSE_S)
        for task in self._announcements:
            task.cancel()

    def set_health(self, healthy: bool) -> None:
        """Health alone, for an engine that stalls and may move again: questions are taken all the same."""
        # A task of its own: a health watcher that reads slowly holds up the setting of the status.
        task = asyncio.get_running_loop().create_task(self._set_health(_SERVING if healthy else _NOT_SERVING))
        self._announcements.add(task)
        task.add_done_callback(self._announcements.discard)

    async def _set_health(self, status: int) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, status)


def _options(config: GrpcConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # Otherwise a second daemon on the same port would silently take half of the calls.
        ("grpc.so_reuseport", 0),
        # A client that vanished without a word is noticed within half a minute.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # And so may a client look for a vanished server: gRPC's default allows that every five minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _bind(server: grpc.aio.Server, listen: str, tls: grpc.ServerCredentials | None) -> int:
    check_free(listen)
    try:
        if tls is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, tls)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {listen}: {error}", field="grpc.listen") from error
