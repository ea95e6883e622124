"""Stands in for Beam's gateway, which its runners call over gRPC: says yes, hands out tasks, keeps what comes back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Any

import grpc

#: Messages of protocol buffers, written out: field 1 (ok) and field 3 (neither cancelled nor timed out) are true.
_OK = b"\x08\x01"
_RUNNING = b"\x08\x01\x18\x01"


def _field(number: int, data: bytes) -> bytes:
    assert len(data) < 128, "longer lengths take more than one byte"
    return bytes([number << 3 | 2, len(data)]) + data


class Gateway(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A gateway on a free port of 127.0.0.1.

    Attributes:
        tasks: Handed out by the task queue, one a poll.
        completed: Messages of tasks that are done, as they came.
    """

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []
        self.completed: list[bytes] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers((self,))
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Gateway:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    def service(self, details: Any) -> Any:
        """Return what answers the method; called by gRPC."""
        name = details.method.rpartition("/")[2]
        if name == "TaskQueueMonitor":
            return grpc.unary_stream_rpc_method_handler(self._monitored)
        return grpc.unary_unary_rpc_method_handler(self._answers(name))

    def _monitored(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield _RUNNING

    def _answers(self, name: str) -> Callable[[bytes, Any], bytes]:
        def answer(request: bytes, context: Any) -> bytes:
            with self._lock:
                if name == "TaskQueuePop":
                    return _OK + _field(2, json.dumps(self.tasks.pop(0)).encode()) if self.tasks else b""
                if name == "TaskQueueComplete":
                    self.completed.append(request)
            return _OK

        return answer
