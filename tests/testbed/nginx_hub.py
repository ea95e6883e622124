"""A hub that speaks the Hub's protocol, served by nginx from static files.

    python -m tests.testbed.nginx_hub ~/.cache/fastload-testbed/models/llama-1b-bf16    prints its addresses

nginx serves bytes at the speed of the kernel, so this is the hub for benchmarks and for a second opinion on HTTP;
``fastload.testing.Hub`` is the one for scripted faults.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .nginx_conf import CDN_HOST, JAVASCRIPT, SERVERS, hub_configuration
from .nginx_process import Nginx, Request
from .repos import TOKEN, Repo, standard_repos
from .site import write_site


class NginxHub:
    """The hub and its mirrors: starts on entering, answers when ``with`` begins, ends on leaving.

    Every server has a name (:data:`tests.testbed.nginx_conf.SERVERS`) and a free port of 127.0.0.1. Repositories are
    called ``tb/{name of the folder}``. Not safe to share between processes that both stop it.

    Args:
        models: Folders; their files are hard-linked where that works, never changed.
        odd: Add what only tests want: a second commit of llama-tiny-bf16, private-llama, gated-llama, disabled-llama,
            many-files (two pages) and awful-names. Needs llama-tiny-bf16 among *models*.
        rate_bytes_per_s: The most that one answer of the CDN or of a mirror gets; ``None``: no limit.
        folder: Where all files go; a temporary folder, removed at the end, when left out.
        workers: nginx worker processes; with more than one the log is not exactly in order.
    """

    token = TOKEN

    def __init__(
        self,
        models: Sequence[Path],
        *,
        odd: bool = False,
        rate_bytes_per_s: int | None = None,
        folder: Path | None = None,
        workers: int = 1,
    ) -> None:
        self._models = models
        self._odd = odd
        self._rate_bytes_per_s = rate_bytes_per_s
        self._temporary = folder is None
        self._folder = folder
        self._workers = workers
        self._nginx: Nginx | None = None
        self.repos: dict[str, Repo] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Hash the models, write the site and start nginx; return when it answers.

        Raises:
            RuntimeError: nginx or its njs module is missing, or it did not start.
        """
        folder = Path(tempfile.mkdtemp(prefix="fastload-hub-")) if self._folder is None else self._folder.resolve()
        self._folder = folder
        self.repos = {repo.id: repo for repo in standard_repos(self._models, odd=self._odd)}
        maps = write_site(folder / "www", self.repos.values())
        (folder / "hub.js").write_text(JAVASCRIPT, encoding="utf-8")
        self._nginx = Nginx(
            folder,
            list(SERVERS),
            lambda ports: hub_configuration(folder, maps, ports, self._rate_bytes_per_s),
            workers=self._workers,
        )
        try:
            make_certificate(folder)
            self._nginx.start()
        except (OSError, RuntimeError):
            self.stop()
            raise

    def stop(self) -> None:
        """End nginx and remove the folder if it was a temporary one; a second call does nothing."""
        if self._nginx is not None:
            self._nginx.stop()
        if self._temporary and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def url(self) -> str:
        """Base URL of the hub: what HF_ENDPOINT wants."""
        return self.endpoint("hub")

    def endpoint(self, name: str) -> str:
        """Return the base URL of the server *name*, without a slash at the end."""
        scheme = "https" if name == "tls" else "http"
        host = CDN_HOST if name == "cdn" else "127.0.0.1"
        return f"{scheme}://{host}:{self.nginx.ports[name]}"

    @property
    def endpoints(self) -> dict[str, str]:
        """Base URL of every server by name."""
        return {name: self.endpoint(name) for name in SERVERS}

    @property
    def ca_file(self) -> Path:
        """The certificate of the server ``tls``, for SSL_CERT_FILE and the setting ``ca_file``."""
        return self.nginx.folder / "tls.crt"

    @property
    def nginx(self) -> Nginx:
        """The running server.

        Raises:
            RuntimeError: Not started.
        """
        if self._nginx is None:
            raise RuntimeError("the hub is not started")
        return self._nginx

    def mark(self) -> int:
        """Return the place in the log that :meth:`requests` may start at."""
        return self.nginx.mark()

    def requests(self, since: int = 0) -> list[Request]:
        """Return every request since the *since* of :meth:`mark` whose answer has ended, in that order."""
        return self.nginx.requests(since)


def make_certificate(folder: Path) -> None:
    """Write ``tls.crt`` and ``tls.key`` for 127.0.0.1 and localhost, self-signed, unless they are there.

    Raises:
        RuntimeError: openssl refused.
    """
    if (folder / "tls.crt").exists():
        return
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=127.0.0.1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    usage = ["-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    done = subprocess.run([*command.split(), *names, *usage, *files], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl made no certificate: {done.stderr.strip()}")


def main() -> None:
    """Serve the folders of the command line until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rate", type=int, help="bytes per second and connection")
    options = parser.parse_args()
    ends = {signal.SIGINT, signal.SIGTERM}
    with NginxHub(options.models, rate_bytes_per_s=options.rate) as hub:
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # sigwait takes blocked signals only
        for name, url in hub.endpoints.items():
            print(f"{name:8}{url}  {SERVERS[name]}")
        for repo in hub.repos:
            print(f"        {repo}", flush=True)
        signal.sigwait(ends)


if __name__ == "__main__":
    main()
