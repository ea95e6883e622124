"""Who serves a case: the hub, and the store for rivals that know no hub; both nginx, at the same rates."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.testbed.models import cache_folder
from tests.testbed.nginx_hub import NginxHub
from tests.testbed.nginx_process import Nginx, Request

from .cases import Case
from .rivals import Rival
from .supervise import descendants, used_cpu_s

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Served:
    """The servers of one case, running.

    Attributes:
        hub_url: What HF_ENDPOINT names.
        store_url: Serves ``/models/{model}/{file}``, which is also a bucket of S3, and ``/made/{rival}/{model}``.
        ca_file: Certificate to trust; ``None``: no TLS.
    """

    hub: NginxHub
    store: Nginx
    hub_url: str
    store_url: str
    ca_file: Path | None

    def mark(self) -> tuple[int, int]:
        """Return the places in both logs that :meth:`requests` may start at."""
        return self.hub.mark(), self.store.mark()

    def requests(self, since: tuple[int, int]) -> list[Request]:
        """Return every request since then."""
        return [*self.hub.requests(since[0]), *self.store.requests(since[1])]

    def cpu_s(self) -> float:
        """Return the CPU seconds that the servers have used so far, to a hundredth."""
        masters = [int((nginx.folder / "nginx.pid").read_text()) for nginx in (self.hub.nginx, self.store)]
        return sum(used_cpu_s(pid) for master in masters for pid in descendants(master))


@contextmanager
def serving(case: Case, folders: dict[str, Path], present: list[Rival]) -> Iterator[Served]:
    """Serve the models in *folders* (name to folder) until the block ends.

    Raises:
        RuntimeError: nginx is missing or did not start, or what a rival needs could not be made.
    """
    rate = case.rate_bytes_per_s
    limit = f"limit_rate {rate}; sendfile_max_chunk 256k;" if rate else ""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastload-store-")))
        www = folder / "www"
        (www / "models").mkdir(parents=True)
        for name, model in folders.items():
            (www / "models" / name).symlink_to(model.resolve())
            for rival in present:
                if hasattr(rival.module, "store"):
                    _made(rival, model, www / "made" / rival.name / name)
        store = Nginx(
            folder,
            ["store"],
            lambda ports: f"server {{ listen 127.0.0.1:{ports['store']}; location / {{ root {www}; {limit} }} }}",
        )
        stack.callback(store.stop)
        store.start()
        hub = stack.enter_context(NginxHub(list(folders.values()), rate_bytes_per_s=rate))
        hub_url = hub.endpoint("tls") if case.tls else hub.url
        ca_file = hub.ca_file if case.tls else None
        yield Served(hub, store, hub_url, f"http://127.0.0.1:{store.ports['store']}", ca_file)


def _made(rival: Rival, model: Path, target: Path) -> None:
    """Link what *rival* needs of *model* to *target*; it is made once, in a process of its own, and kept."""
    kept = cache_folder() / "made" / rival.name / model.name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        code = (
            f"from pathlib import Path; from benchmarks.rivals.{rival.name} import store; "
            f"store(Path({str(model)!r}), Path({str(kept)!r}))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{rival.title}: its form of {model.name} could not be made:\n{done.stderr[-2000:]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(kept)
