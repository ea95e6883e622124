"""What a request needs beside its URL: credentials, proxy, certificates; each for the right address only."""

from __future__ import annotations

import base64
import netrc
import ssl
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from .answers import origin
from .errors import SettingsError
from .settings import Settings


class Proxy(NamedTuple):
    """A proxy: its URL without credentials, and these as the value of a header."""

    url: str
    authorization: str | None


class Access:
    """Knows what to show to whom. Use from one thread, after :meth:`prepare`.

    Args:
        token: For *endpoint*'s origin (scheme, host and port) and nowhere else, whatever redirects say.
    """

    def __init__(self, settings: Settings, endpoint: str, token: str | None) -> None:
        self._settings = settings
        self._origin = origin(endpoint)
        self._token = token
        self._netrc: Mapping[str, tuple[str, str | None, str | None]] = {}
        self._ssl: ssl.SSLContext | None = None
        self._proxies: dict[str, Proxy | None] = {}

    def prepare(self) -> None:
        """Read what is on disk; blocks."""
        if not self._settings.trust_env:
            return
        try:
            self._netrc = netrc.netrc(str(self._settings.netrc_path.expanduser())).hosts
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):  # none, or not one for us to judge
            pass

    def authorization(self, url: str) -> str | None:
        """Return the value of the ``Authorization`` header for *url*: the token's, else that of .netrc for its host.

        An entry ``default`` of .netrc is not used: it would reach every server that a hub redirects to.
        """
        if self._token and origin(url) == self._origin:
            return f"Bearer {self._token}"
        entry = self._netrc.get(urlsplit(url).hostname or "")
        if entry is None:
            return None
        return _basic(entry[0], entry[2])

    def proxy(self, url: str) -> Proxy | None:
        """Return the proxy for *url*: HTTP_PROXY, HTTPS_PROXY, else ALL_PROXY, unless NO_PROXY names its host.

        Raises:
            SettingsError: It is of a kind that cannot be used (SOCKS).
        """
        if not self._settings.trust_env:
            return None
        parts = urlsplit(url)
        server = f"{parts.scheme}://{parts.netloc}"
        if server not in self._proxies:  # found out once: it takes as long as sending a request
            self._proxies[server] = self._find_proxy(parts)
        return self._proxies[server]

    def _find_proxy(self, parts: SplitResult) -> Proxy | None:
        proxies = getproxies()
        found = proxies.get(parts.scheme) or proxies.get("all")
        if not found or proxy_bypass(parts.netloc.rpartition("@")[2]):
            return None
        address = urlsplit(found if "://" in found else f"http://{found}")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise SettingsError(
                f"the proxy {address.scheme}://{address.hostname} for {parts.hostname} is not an HTTP proxy",
                hint="set HTTPS_PROXY to an http:// or https:// proxy, or trust_env=False to use none",
            )
        host = address.netloc.rpartition("@")[2]
        basic = None
        if address.username is not None:
            basic = _basic(unquote(address.username), unquote(address.password or ""))
        return Proxy(f"{address.scheme}://{host}", basic)

    def certificates(self, url: str) -> ssl.SSLContext | None:
        """Return the certificates to trust for *url*; ``None``: the system's.

        Raises:
            SettingsError: ``ca_file`` cannot be read.
        """
        if self._settings.ca_file is None or not url.startswith("https:"):
            return None
        if self._ssl is None:
            try:
                self._ssl = ssl.create_default_context(cafile=str(self._settings.ca_file))
            except (OSError, ssl.SSLError) as e:
                raise SettingsError(f"ca_file={self._settings.ca_file}: {e}") from e
        return self._ssl


def _basic(user: str, password: str | None) -> str:
    """Return what RFC 7617 makes of them."""
    return "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()
