"""A Hub on loopback: the real protocol, in a thread of its own, with scripted faults."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from aiohttp import web

from ..errors import FastloadError
from ..types import Digest, Manifest, RemoteFile
from .body import Bodies
from .faults import Fault, Origin, Script
from .files import Commit, Content, LfsRule, Models, Repository, is_large, read_commit, read_models
from .log import Request, RequestLog
from .protocol import Protocol, Rules, Shape


class _Server(web.Server):
    connected: Callable[[asyncio.Transport], None]

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self.connected(transport)
        super().connection_made(handler, transport)


async def _rounds() -> None:
    # Reasoned: accepting takes asyncio four rounds of its loop, cancelling a handler fewer.
    for _ in range(10):
        await asyncio.sleep(0)


class Hub:
    """A Hugging Face Hub and its CDN on two free ports of 127.0.0.1, for tests, demos and benchmarks.

    Everything is public API of one object: what was asked is in :attr:`requests`, what goes wrong is set by
    :meth:`script`. All methods may be called from any thread. Use it as a context manager::

        with Hub({"org/name": folder}, faults=[Fault("reset", times=1, after_bytes=100_000)]) as hub:
            snapshot = fastload.prefetch("org/name", settings={"endpoint": hub.endpoint})

    Args:
        models: Folders or paths with bytes by repository id, or a folder of ``org/name`` folders. Files are hashed on
            start and must not change afterwards.
        redirect: Large files answer 302 to the CDN; ``False``: the hub sends them itself.
        shape: ``"hub"``; ``"mirror"``: a plain mirror that sends every file itself and never redirects;
            ``"presigned"``: HEAD answers 200 and only GET redirects.
        token: The one token that opens gated and private repositories.
        rate_bytes_per_s: Of each connection; ``None``: as fast as loopback is.
        latency_s: Before every answer.
        signature_ttl_s: How long the signed URLs of the CDN hold.
        tls: Speak HTTPS with a certificate made for this hub (:attr:`ca_file`; needs the ``openssl`` command).
        faults: As :meth:`script`.
        gated: Repositories whose files (not their pages) need the token.
        private: Repositories that only the token can see.
        disabled: Repositories that nobody gets.
        renamed: Old to new id; the old one answers 307.
        revisions: Further names (or earlier states) of a repository: ``{"org/name": {"v1": folder}}``.
        lfs: Whether a file (path, size) is a large one; by default by suffix or above 5 MB.
        port: Of the hub; 0: any free one.

    Attributes:
        ca_file: PEM file that clients must trust, with ``tls``.

    Raises:
        SettingsError: A folder is missing, or holds no ``org/name`` folders.
        FastloadError: The hub cannot be started.
    """

    def __init__(
        self,
        models: Models,
        *,
        redirect: bool = True,
        shape: Shape = "hub",
        token: str | None = None,
        rate_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        signature_ttl_s: float = 3600.0,
        tls: bool = False,
        faults: Iterable[Fault] = (),
        gated: Collection[str] = (),
        private: Collection[str] = (),
        disabled: Collection[str] = (),
        renamed: Mapping[str, str] | None = None,
        revisions: Mapping[str, Mapping[str, Content]] | None = None,
        lfs: LfsRule = is_large,
        port: int = 0,
    ) -> None:
        self.ca_file: Path | None = None
        self._lfs = lfs
        self._tls = tls
        self._port = port
        self._repositories = {repo: Repository(repo) for repo in read_models(models)}
        for repo, content in read_models(models).items():
            self.update(repo, content)
            for revision, earlier in (revisions or {}).get(repo, {}).items():
                self.update(repo, earlier, revision=revision)
        rules = Rules(
            shape, redirect, token, latency_s, signature_ttl_s, frozenset(gated), frozenset(private),
            frozenset(disabled), dict(renamed or {}),
        )  # fmt: skip
        self._script = Script(faults)
        self._log = RequestLog()
        self._bodies = Bodies(self._log, rate_bytes_per_s)
        self._protocol = Protocol(self._repositories, rules, self._script, self._log, self._bodies)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Hub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> Hub:
        """Serve; return when both ports are open."""
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="fastload.testing.Hub", daemon=True)
        self._thread.start()
        try:
            started.result()
        except (OSError, subprocess.CalledProcessError) as error:
            self._thread.join()
            raise FastloadError(f"the hub cannot be started: {error}") from error
        return self

    def close(self) -> None:
        """Cut all connections, close both ports, join the thread. May be called again."""
        thread, self._thread = self._thread, None
        if thread is not None and self._loop is not None and self._closing is not None:
            self._loop.call_soon_threadsafe(self._closing.set)
            thread.join()

    def _run(self, started: Future[None]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, started: Future[None]) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        folder = tempfile.mkdtemp(prefix="fastload-hub-")
        try:
            context = self._certificate(Path(folder)) if self._tls else None
            hub, hub_sockets = await self._listen("hub", self._port, context)
            cdn, cdn_sockets = await self._listen("cdn", 0, context)
            scheme = "https" if self._tls else "http"
            self._protocol.endpoint = f"{scheme}://127.0.0.1:{hub_sockets.sockets[0].getsockname()[1]}"
            self._protocol.cdn = f"{scheme}://localhost:{cdn_sockets.sockets[0].getsockname()[1]}"
            started.set_result(None)
            await self._closing.wait()
            listeners = (hub_sockets, cdn_sockets)
            for sock in (s for listener in listeners for s in listener.sockets):
                self._loop.remove_reader(sock.fileno())
            await _rounds()  # what was accepted just now needs a listener that is still open
            for listener in listeners:
                listener.close()
            self._bodies.abort()
            await _rounds()
            await asyncio.gather(hub.shutdown(0.05), cdn.shutdown(0.05))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _listen(
        self, origin: Origin, port: int, context: ssl.SSLContext | None
    ) -> tuple[web.Server, asyncio.Server]:
        server = _Server(
            partial(self._protocol.answer, origin), handler_cancellation=True, access_log=None, tcp_keepalive=False
        )
        server.connected = self._bodies.connected
        loop = asyncio.get_running_loop()
        return server, await loop.create_server(server, "127.0.0.1", port, ssl=context, backlog=512)

    def _certificate(self, folder: Path) -> ssl.SSLContext:
        key, self.ca_file = folder / "key.pem", folder / "ca.pem"
        command = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
            " -subj /CN=fastload.testing -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
        )
        subprocess.run([*command.split(), "-keyout", key, "-out", self.ca_file], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca_file, key)
        return context

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """Base URL, without a slash at the end."""
        return self._protocol.endpoint

    @property
    def cdn(self) -> str:
        """Base URL of the CDN: another origin, and another host too (huggingface_hub 1.x compares hosts alone)."""
        return self._protocol.cdn

    def commit(self, repo: str, revision: str = "main") -> str:
        """Return the commit that *revision* stands for; the same content gives the same commit."""
        return self._find(repo, revision).id

    def manifest(self, repo: str, revision: str = "main") -> Manifest:
        """Return what a source should make of *repo*: every file, with size and digest."""
        commit = self._find(repo, revision)
        files = tuple(
            RemoteFile(
                entry.path,
                entry.size,
                Digest("sha256", entry.sha256) if entry.sha256 else Digest("git-sha1", entry.blob_id),
                f"/{repo}/resolve/{commit.id}/{quote(entry.path)}",
                blob_id=entry.blob_id,
            )
            for entry in commit.files.values()
        )
        return Manifest(repo, revision, commit.id, self.endpoint, files)

    def update(self, repo: str, content: Content, *, revision: str = "main") -> str:
        """Let *revision* of *repo* be *content* from now on; return the commit. Earlier commits stay."""
        repository = self._repositories.setdefault(repo, Repository(repo))
        commit = read_commit(repo, content, self._lfs)
        repository.point(revision, commit)
        return commit.id

    def _find(self, repo: str, revision: str) -> Commit:
        repository = self._repositories.get(repo)
        commit = None if repository is None else repository.find(revision)
        if commit is None:
            raise FastloadError(f"this hub has no {repo}@{revision}")
        return commit

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    @property
    def rate_bytes_per_s(self) -> float | None:
        """Of each connection; may be changed while bytes flow."""
        return self._bodies.rate_bytes_per_s

    @rate_bytes_per_s.setter
    def rate_bytes_per_s(self, rate: float | None) -> None:
        self._bodies.rate_bytes_per_s = rate

    def script(self, *faults: Fault) -> None:
        """Replace all faults by *faults* (none: everything works again); bodies already on their way keep theirs."""
        self._script.set(faults)

    def release(self) -> None:
        """Let every body go on that a ``hold`` has stopped."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._bodies.release)

    def expire_signatures(self) -> None:
        """Make every URL that was signed so far answer 403; new ones hold."""
        self._protocol.epoch += 1

    # -- what was asked -----------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in order of arrival."""
        return self._log.requests()

    def counts(self) -> Counter[str]:
        """Return how many requests there were of each ``"METHOD origin status"``, as ``"GET cdn 206"``."""
        return Counter(f"{r.method} {r.origin} {r.status}" for r in self.requests)

    def bytes_sent(self, path: str | None = None) -> int:
        """Return how many bytes of files went out (of the file *path*)."""
        sent = (r for r in self.requests if r.status in (200, 206) and r.file is not None)
        return sum(r.bytes_sent for r in sent if path in (None, r.file))

    def clear(self) -> None:
        """Forget the requests so far."""
        self._log.clear()

    def wait(self, predicate: Callable[[list[Request]], object], timeout_s: float = 30.0) -> None:
        """Wait until *predicate* holds for the requests; it is asked whenever one arrives, is held or ends.

        Raises:
            FastloadError: It did not within *timeout_s*.
        """
        if not self._log.wait(predicate, timeout_s):
            raise FastloadError(f"the hub waited {timeout_s} s in vain; requests so far: {dict(self.counts())}")
