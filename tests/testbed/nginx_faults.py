"""Faults in front of a mirror: one nginx port a fault, each passes everything on and breaks one thing.

Byte-exact and counted faults are scripted in ``fastload.testing.Hub``; here are those of a real server, in its own
words (its chunking, its limits, its resets).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from .nginx_process import Nginx, Request

_PROXY = "proxy_pass http://$upstream; proxy_http_version 1.1; proxy_set_header Connection ''; "
_PASS = f"{_PROXY} proxy_buffering off; proxy_set_header Host $http_host;"
_BUFFERED = f"{_PROXY} proxy_max_temp_file_size 0; proxy_set_header Host $http_host;"  # limit_rate needs a buffer
_WHOLE = f"{_PASS} proxy_set_header Range ''; proxy_hide_header Accept-Ranges;"
_RATE_LIMITED = """limit_req zone=two_a_second burst=2 nodelay; limit_req_status 429; error_page 429 = @slow_down;
    location @slow_down { add_header Retry-After 1 always; add_header RateLimit '"resolvers";r=0;t=1' always;
      add_header RateLimit-Policy '"fixed window";"resolvers";q=2;w=1' always; return 429 'slow down'; }"""


@dataclass(frozen=True, slots=True)
class Fault:
    """nginx directives that make one fault.

    Attributes:
        resolve: What files (``/…/resolve/``) get.
        server: What every request gets.
        shared: Directives outside the server.
    """

    help: str
    resolve: str = _PASS
    server: str = ""
    shared: str = ""


FAULTS = {
    "slow": Fault("256 KiB a second and answer", f"limit_rate 256k; {_BUFFERED}"),
    "stall": Fault("512 KiB, then 10 bytes a second", f"limit_rate_after 512k; limit_rate 10; {_BUFFERED}"),
    "norange": Fault("200 and the whole file, whatever range was asked for", f"max_ranges 0; {_WHOLE}"),
    "ratelimit": Fault(
        "429 with Retry-After and RateLimit above two requests a second, the API too",
        server=_RATE_LIMITED,
        shared="limit_req_zone $server_port zone=two_a_second:64k rate=2r/s;",
    ),
    "flaky": Fault(
        "503 to 30 % of all requests, the API too",
        server="if ($flaky) { return 503; }",
        shared="split_clients $request_id $flaky { 30% 1; * 0; }",
    ),
    "loop": Fault("a redirect to itself", "return 302 http://$http_host$request_uri;"),
    "nodns": Fault("a redirect to a host that has no address", "return 302 http://cdn.invalid$request_uri;"),
    "wrongetag": Fault("another ETag", f"proxy_hide_header ETag; add_header ETag '\"{'0' * 64}\"'; {_PASS}"),
    "wrongrange": Fault("Content-Range off by one", f"js_header_filter faults.wrongRange; {_PASS}"),
    "flip": Fault("one bit of byte 65536 of each answer", f"js_body_filter faults.flip buffer_type=buffer; {_PASS}"),
    "truncate": Fault(
        "the connection ends after 64 KiB of each answer",
        f"js_body_filter faults.truncate buffer_type=buffer; {_PASS}",
        server="keepalive_timeout 0;",
    ),
    "reset": Fault("TCP reset before any answer", "return 444;", server="reset_timedout_connection on;"),
    "captive": Fault(
        "the page of a captive portal, 200, for everything",
        "return 200;",
        server="default_type text/html; return 200 '<html>Please sign in</html>';",
    ),
    "chunked": Fault("no Content-Length, no ETag, no ranges", f"js_header_filter faults.noLength; {_WHOLE}"),
    "gzip": Fault(
        "gzip for whoever accepts it, with a weak ETag (nginx compresses no 206)",
        "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any; gzip_comp_level 1; "
        f"{_WHOLE} proxy_set_header Accept-Encoding '';",
    ),
    "oneconn": Fault(
        "503 to a second request at the same time",
        f"limit_conn one 1; limit_conn_status 503; {_PASS}",
        shared="limit_conn_zone $server_port zone=one:64k;",
    ),
    "noclose": Fault("a new connection for each request", server="keepalive_timeout 0;"),
    "error500": Fault("500 for every file", 'return 500 \'{"error":"Internal Server Error"}\';'),
}

_JAVASCRIPT = """
var LIMIT = 65536;  // shorter answers stay whole: configuration files arrive, weights do not
function flip(r, data, flags) {
  var seen = Number(r.variables.seen), end = seen + data.length;
  if (seen <= LIMIT && LIMIT < end) { var copy = Buffer.from(data); copy[LIMIT - seen] ^= 1; data = copy; }
  r.variables.seen = String(end);
  r.sendBuffer(data, flags);
}
function truncate(r, data, flags) {
  var seen = Number(r.variables.seen), keep = Math.max(0, Math.min(data.length, LIMIT - seen));
  r.variables.seen = String(seen + data.length);
  if (keep > 0 || flags.last) r.sendBuffer(data.slice(0, keep), flags);
}
function wrongRange(r) {
  var range = r.headersOut['Content-Range'];
  if (range) r.headersOut['Content-Range'] = range.replace(/bytes (\\d+)-(\\d+)/, function (all, first, last) {
    return 'bytes ' + (Number(first) + 1) + '-' + (Number(last) + 1); });
}
function noLength(r) { delete r.headersOut['Content-Length']; delete r.headersOut['ETag']; }
export default { flip, truncate, wrongRange, noLength };
"""


class NginxFaults:
    """Serves every fault of :data:`FAULTS` in front of one mirror, from entering to leaving ``with``.

    Args:
        upstream: Base URL of the mirror (http), for example ``hub.endpoint("mirror")``.
        folder: Where all files go; a temporary folder, removed at the end, when left out.
    """

    def __init__(self, upstream: str, *, folder: Path | None = None) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._temporary = folder is None
        self._folder = Path(tempfile.mkdtemp(prefix="fastload-faults-")) if folder is None else folder.resolve()
        self._nginx = Nginx(self._folder, list(FAULTS), self._configuration)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "faults.js").write_text(_JAVASCRIPT, encoding="utf-8")
        try:
            self._nginx.start()
        except RuntimeError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._nginx.stop()
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)

    def endpoint(self, fault: str) -> str:
        """Return the base URL of the server with *fault*."""
        return f"http://127.0.0.1:{self._nginx.ports[fault]}"

    def mark(self) -> int:
        """Return the place in the log that :meth:`requests` may start at."""
        return self._nginx.mark()

    def requests(self, since: int = 0) -> list[Request]:
        """Return every request since the *since* of :meth:`mark` whose answer has ended, in that order."""
        return self._nginx.requests(since)

    def _configuration(self, ports: Mapping[str, int]) -> str:
        text = [f"js_path {self._folder}; js_import faults from faults.js;\n"]
        for name, fault in FAULTS.items():
            text.append(f"""{fault.shared}
  server {{ listen 127.0.0.1:{ports[name]}; set $upstream {self._upstream}; set $seen 0; {fault.server}
    location / {{ {_PASS} }} location ~ ^/[^/]+/[^/]+/resolve/ {{ {fault.resolve} }} }}
""")
        return "".join(text)
