"""gRPC's standard services, health and reflection, next to the batcher's own. Each comes from a gRPC package."""

from __future__ import annotations

import grpc

from .._contract import SERVICE_NAME

# gRPC's health checking protocol: this name stands for the whole server.
_WHOLE_SERVER = ""


class StandardServices:
    """The services that create_batcher's `health` and `reflection` ask for.

    Raises ImportError saying what to install.
    """

    def __init__(self, *, health: bool, reflection: bool) -> None:
        self._health = None
        self._is_serving: bool | None = None
        self._reflection = None
        if health:
            try:
                import grpc_health.v1.health as health_module
            except ImportError as error:
                raise _missing("health", "grpcio-health-checking") from error
            # A Watch parks a thread. Otherwise `set` would wait for watchers that do not read.
            self._health = health_module.HealthServicer(experimental_non_blocking=False)
            self.say_serving(False)
        if reflection:
            try:
                import grpc_reflection.v1alpha.reflection as reflection_module
            except ImportError as error:
                raise _missing("reflection", "grpcio-reflection") from error
            self._reflection = reflection_module

    def add_to(self, server: grpc.Server) -> None:
        names = [SERVICE_NAME]
        if self._health is not None:
            from grpc_health.v1 import health, health_pb2_grpc

            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            names.append(health.SERVICE_NAME)
        if self._reflection is not None:
            # It finds their descriptors in protobuf's default pool, where `_proto` has put the contract.
            self._reflection.enable_server_reflection((*names, self._reflection.SERVICE_NAME), server)

    def say_serving(self, is_serving: bool) -> None:
        """Set what Check answers, and notify watchers if it changes."""
        if self._health is not None and is_serving is not self._is_serving:
            self._is_serving = is_serving
            from grpc_health.v1.health_pb2 import HealthCheckResponse

            status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
            for name in (_WHOLE_SERVER, SERVICE_NAME):
                self._health.set(name, status)


def _missing(argument: str, package: str) -> ImportError:
    return ImportError(
        f'{argument}=True needs {package}, which cannot be imported here: pip install "grpc-batcher[{argument}]"'
    )
