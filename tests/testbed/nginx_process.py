"""One nginx of our own: free ports, all state in one folder, ready when it answers, ended by its process."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S = 30.0  # guessed: a configuration with 10,000 rows takes 0.1 s on a quiet machine
STOP_S = 10.0  # guessed
CONTROL = "control"

_MODULE_FOLDERS = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")

_LOG_FORMAT = """log_format testbed escape=json '{"at_s":$msec,"port":$server_port,"method":"$request_method",'
    '"uri":"$request_uri","status":$status,"body_bytes":$body_bytes_sent,"range":"$http_range",'
    '"authorization":"$http_authorization","user_agent":"$http_user_agent","connection":$connection,'
    '"connection_requests":$connection_requests,"seconds":$request_time}';"""


@dataclass(frozen=True, slots=True)
class Request:
    """One answered (or cut) request, as nginx logged it.

    Attributes:
        at_s: When the answer ended, in seconds since 1970.
        server: Name of the endpoint.
        path: As sent, percent-encoded, without the query.
        body_bytes: Bytes of body that were sent.
        connection: Number of the TCP connection.
        connection_requests: How many requests that connection has carried, this one included.
    """

    at_s: float
    server: str
    method: str
    path: str
    query: str
    status: int
    body_bytes: int
    range: str
    authorization: str
    user_agent: str
    connection: int
    connection_requests: int
    seconds: float


def njs_module() -> Path | None:
    """Return nginx's JavaScript module, looked for in ``$FASTLOAD_NGINX_MODULES`` and where distributions put it."""
    given = os.environ.get("FASTLOAD_NGINX_MODULES")
    candidates = [Path(f) / "ngx_http_js_module.so" for f in ((given,) if given else _MODULE_FOLDERS)]
    return next((p for p in candidates if p.exists()), None)


def missing() -> str | None:
    """Return what this machine lacks for the nginx test bed, in words; ``None`` where it can run."""
    if _nginx() is None:
        return "nginx is not installed (Debian: apt-get install nginx libnginx-mod-http-js)"
    if njs_module() is None:
        return "nginx's njs module is not installed (Debian: apt-get install libnginx-mod-http-js)"
    if shutil.which("openssl") is None:
        return "openssl is not installed (it makes the certificate of the TLS mirror)"
    return None


def _nginx() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


class Nginx:
    """Runs nginx in the foreground as a child of this process, as root or as any other user.

    The sockets are bound here and inherited (nginx's own way of a binary upgrade): no port is ever guessed, and a
    request that comes before nginx is up waits in the queue of the socket.

    Args:
        folder: Holds configuration, logs and temporary files; made when it is missing.
        servers: Names of the endpoints; each gets a port of its own.
        configure: Gets the ports by name and returns the text inside ``http {…}``.
        workers: Worker processes. With more than one the order of the log is not exact.
    """

    def __init__(
        self,
        folder: Path,
        servers: Sequence[str],
        configure: Callable[[Mapping[str, int]], str],
        *,
        workers: int = 1,
    ) -> None:
        self.folder = folder.resolve()
        self.ports: dict[str, int] = {}
        self._servers = (*servers, CONTROL)
        self._configure = configure
        self._workers = workers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start nginx and return when it answers.

        Raises:
            RuntimeError: It is not installed, or ended at once; the message holds what it said.
        """
        if reason := missing():
            raise RuntimeError(reason)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self._access_log.touch()
        sockets = [socket.create_server(("127.0.0.1", 0), backlog=511) for _ in self._servers]
        try:
            self.ports = {n: s.getsockname()[1] for n, s in zip(self._servers, sockets, strict=True)}
            (self.folder / "nginx.conf").write_text(self._text(), encoding="utf-8")
            self._process = self._spawn([s.fileno() for s in sockets])
        finally:
            for opened in sockets:
                opened.close()
        try:
            self._wait_until_written()
        except OSError:
            self.stop()
            raise RuntimeError(f"nginx did not start: {self._said()}") from None

    def stop(self) -> None:
        """End nginx, connections and all, and wait for it; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def mark(self) -> int:
        """Return the place in the access log that :meth:`requests` may start at."""
        self._wait_until_written()
        return self._access_log.stat().st_size

    def requests(self, since: int = 0) -> list[Request]:
        """Return every request since the *since* of :meth:`mark` whose answer has ended, in that order."""
        self._wait_until_written()
        names = {port: name for name, port in self.ports.items()}
        with open(self._access_log, "rb") as log:
            log.seek(since)
            rows = [json.loads(line) for line in log]
        return [_request(names, row) for row in rows]

    @property
    def _access_log(self) -> Path:
        return self.folder / "logs/access.log"

    def _spawn(self, sockets: Sequence[int]) -> subprocess.Popen[bytes]:
        environ = {**os.environ, "NGINX": "".join(f"{fd};" for fd in sockets)}
        with open(self.folder / "logs/output.log", "wb") as output:
            return subprocess.Popen(
                [str(_nginx()), "-p", f"{self.folder}/", "-c", str(self.folder / "nginx.conf")],
                env=environ,
                pass_fds=sockets,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _wait_until_written(self) -> None:
        """One request to nginx: when it is answered, a single worker has logged all answers that ended before it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[CONTROL], timeout=START_S)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def _said(self) -> str:
        logs = [self.folder / "logs" / name for name in ("output.log", "error.log")]
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs if log.exists()).strip()

    def _text(self) -> str:
        # As root the workers must stay root: the models may lie in a folder that only root can enter.
        user = "user root;" if os.geteuid() == 0 else ""
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {self.folder}/logs/{kind};" for kind in kinds)
        return f"""load_module {njs_module()};
{user} worker_processes {self._workers}; daemon off;
pid {self.folder}/nginx.pid; error_log {self.folder}/logs/error.log warn;
events {{ worker_connections 512; }}
http {{
  types {{ application/json json; }} default_type application/octet-stream;
  sendfile on; tcp_nopush on; keepalive_timeout 30; keepalive_requests 10000; server_tokens off;
  {temporary}
  {_LOG_FORMAT}
  access_log {self.folder}/logs/access.log testbed;
  server {{ listen 127.0.0.1:{self.ports[CONTROL]}; access_log off; location / {{ return 204; }} }}
{self._configure(self.ports)}
}}
"""


def _request(names: Mapping[int, str], row: dict[str, object]) -> Request:
    port, uri = row.pop("port"), str(row.pop("uri"))
    path, _, query = uri.partition("?")
    return Request(server=names[int(str(port))], path=path, query=query, **row)  # type: ignore[arg-type]
