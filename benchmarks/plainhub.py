"""The weight files of a repository and their final addresses, asked for with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
from dataclasses import dataclass
from urllib.parse import quote, urlsplit


@dataclass(frozen=True, slots=True)
class File:
    """One file.

    Attributes:
        url: Where its bytes are, after redirects.
    """

    path: str
    size: int
    url: str


def files(repo: str) -> list[File]:
    """Return all files of *repo* on the hub that HF_ENDPOINT names; one request, and one for each large file."""
    base = os.environ["HF_ENDPOINT"]
    address = urlsplit(base)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.netloc)
    try:
        _, body = _get(connection, f"/api/models/{repo}/revision/main?blobs=True")
        info = json.loads(body)
        found = []
        for entry in info["siblings"]:
            path = f"/{repo}/resolve/{info['sha']}/{quote(entry['rfilename'])}"
            location = _get(connection, path)[0] if "lfs" in entry else None
            found.append(File(entry["rfilename"], entry["size"], location or base + path))
        return found
    finally:
        connection.close()


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[str | None, bytes]:
    connection.request("GET", path, headers={"Range": "bytes=0-0"} if "/resolve/" in path else {})
    answer = connection.getresponse()
    return answer.getheader("Location"), answer.read()
