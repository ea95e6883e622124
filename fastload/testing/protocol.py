"""The Hub's protocol: which request gets which answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

from aiohttp import web

from ..types import ByteRange
from .body import Bodies, hang_up
from .faults import BODY_KINDS, HEAD_KINDS, LABEL_KINDS, Facts, Fault, Origin, Script
from .files import Commit, Entry, Repository
from .log import Exchange, RequestLog
from .routes import Route, info_rows, parse_range, parse_route, tree_rows

Shape = Literal["hub", "mirror", "presigned"]
# Specified: the Hub lists 1000 entries a page.
PAGE_ENTRIES = 1000
_PORTAL = "<!DOCTYPE html><html><title>Welcome</title><body>Please log in to use this network.</body></html>"


@dataclass(slots=True)
class Rules:
    """How a hub treats its repositories; see :class:`fastload.testing.Hub` for what each means."""

    shape: Shape = "hub"
    redirect: bool = True
    token: str | None = None
    latency_s: float = 0.0
    signature_ttl_s: float = 3600.0
    gated: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()
    disabled: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)


class Protocol:
    """Answers the requests to one hub and its CDN; lives in the hub's event loop."""

    def __init__(
        self, repositories: Mapping[str, Repository], rules: Rules, script: Script, log: RequestLog, bodies: Bodies
    ) -> None:
        self.endpoint = ""
        self.cdn = ""
        self.epoch = 0
        self._repositories = repositories
        self._rules = rules
        self._script = script
        self._log = log
        self._bodies = bodies

    async def answer(self, origin: Origin, request: web.BaseRequest) -> web.StreamResponse:
        """Answer *request*, with the faults that match it, and log it."""
        raw = request.raw_path
        if not raw.startswith("/"):  # absolute form: the hub was asked as a proxy
            parts = urlsplit(raw)
            raw = parts.path + (f"?{parts.query}" if parts.query else "")
        raw_path, _, query = raw.partition("?")
        segments = [unquote(s) for s in raw_path.split("/")[1:]]
        route = (
            parse_route(segments) if origin == "hub" else Route("cdn", path=dict(parse_qsl(query)).get("filename", ""))
        )
        headers = {name.lower(): value for name, value in request.headers.items()}
        file = route.path if route.kind in ("resolve", "cdn") else None
        exchange = Exchange(
            origin, request.method, unquote(raw_path), query, file, headers, self._bodies.connection(request).number
        )
        self._log.begin(exchange)
        try:
            if self._rules.latency_s:
                await asyncio.sleep(self._rules.latency_s)
            call = _Call(self, request, exchange, route, raw_path)
            response = await call.faulty() or await call.route_answer()
            exchange.status = response.status
            if isinstance(response, web.Response) and request.method != "HEAD" and isinstance(response.body, bytes):
                exchange.bytes_sent = len(response.body)
            return response
        finally:
            self._log.end(exchange)

    def sign(self, path: str, query: str) -> str:
        """Return the signature of *query* (which holds the expiry) for *path* on the CDN."""
        key = f"fastload.testing {self.epoch}".encode()
        return hmac.new(key, f"{path}?{query}".encode(), hashlib.sha256).hexdigest()[:32]

    def denied(self, route: Route, authorization: str | None) -> web.Response | None:
        """Return the answer to who may not have what *route* asks for."""
        rules = self._rules
        admitted = rules.token is not None and authorization == f"Bearer {rules.token}"
        if route.repo in rules.disabled:
            return _refusal(403, "Access to this resource is disabled.")
        if route.repo not in self._repositories or (route.repo in rules.private and not admitted):
            if authorization is None:
                return _refusal(401, "Invalid username or password.", "RepoNotFound", "Repository not found")
            return _refusal(404, "Repository not found", "RepoNotFound")
        if route.repo in rules.gated and not admitted and route.kind in ("resolve", "paths-info"):
            name = f"Access to model {route.repo} is restricted"
            if authorization is None:
                text = f"{name}. You must have access to it and be authenticated to access it. Please log in."
                return _refusal(401, text, "GatedRepo")
            return _refusal(403, f"{name} and you are not in the authorized list.", "GatedRepo")
        return None


class _Call:
    """One request on its way to an answer."""

    def __init__(
        self, protocol: Protocol, request: web.BaseRequest, exchange: Exchange, route: Route, raw_path: str
    ) -> None:
        self._protocol = protocol
        self._rules = protocol._rules
        self._bodies = protocol._bodies
        self._request = request
        self._exchange = exchange
        self._route = route
        self._raw_path = raw_path
        is_api = route.kind not in ("resolve", "cdn", "unknown")
        self._facts = Facts(exchange.origin, request.method, exchange.path, exchange.file, is_api)

    def _take(self, kinds: frozenset[str], facts: Facts, limit: int | None = None) -> list[Fault]:
        faults = self._protocol._script.take(kinds, facts, limit=limit)
        self._exchange.faults += [f.kind for f in faults]
        return faults

    async def faulty(self) -> web.StreamResponse | None:
        """Return the answer that a fault gives instead of the right one, if one does."""
        faults = self._take(HEAD_KINDS, self._facts, limit=1)
        if not faults:
            return None
        fault = faults[0]
        if fault.kind == "hang":
            await self._bodies.stall(self._exchange)
        if fault.kind == "drop":
            await hang_up(self._request, reset=True)
            return web.Response(status=503)
        if fault.kind == "status":
            return web.Response(status=fault.status, headers=fault.headers, text="scripted fault")
        if fault.kind == "redirect_loop":
            return web.Response(status=302, headers={"Location": self._request.raw_path})
        if fault.kind == "captive":
            return web.Response(text=_PORTAL, content_type="text/html")
        if fault.kind == "expire":
            return _expired()
        return web.Response(text='{"sha": "0123', content_type="application/json")

    async def route_answer(self) -> web.StreamResponse:
        """Return the right answer."""
        route, method = self._route, self._request.method
        if route.kind == "cdn":
            return await self._cdn()
        if route.kind == "agent-harnesses":
            return web.json_response({"standardEnvVars": [], "harnesses": {}})
        if route.kind == "whoami-v2":
            return self._whoami()
        if route.kind == "unknown":
            return _refusal(404, "Sorry, we can't find the page you are looking for.")
        if method not in (("POST",) if route.kind == "paths-info" else ("GET", "HEAD")):
            return _refusal(405, f"Method {method} not allowed")
        new_name = self._rules.renamed.get(route.repo)
        if new_name is not None and self._rules.shape != "mirror":
            location = self._request.raw_path.replace(route.repo, new_name, 1)
            return web.Response(status=307, headers={"Location": location})
        denied = self._protocol.denied(route, self._exchange.headers.get("authorization"))
        if denied is not None:
            return denied
        repository = self._protocol._repositories[route.repo]
        commit = repository.find(route.revision)
        if commit is None:
            return _refusal(404, f"Invalid rev id: {route.revision}", "RevisionNotFound")
        if route.kind == "resolve":
            return await self._resolve(commit)
        if route.kind == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            return web.json_response({"branches": branches, "tags": [], "converts": []})
        if route.kind == "info":
            return web.json_response(self._info(commit))
        if route.kind == "tree":
            return self._tree(commit)
        return await self._paths_info(commit)

    def _whoami(self) -> web.Response:
        if self._rules.token is None or self._exchange.headers.get("authorization") != f"Bearer {self._rules.token}":
            return _refusal(401, "Invalid username or password.")
        return web.json_response({"type": "user", "name": "tester", "auth": {"type": "access_token"}})

    def _info(self, commit: Commit) -> dict[str, Any]:
        repo, rules = self._route.repo, self._rules
        blobs = parse_qs(self._exchange.query).get("blobs", ["False"])[0].lower() in ("true", "1")
        siblings = info_rows(commit, blobs=blobs)
        return {
            "_id": commit.id[:24], "id": repo, "modelId": repo, "author": repo.partition("/")[0], "sha": commit.id,
            "private": repo in rules.private, "gated": "manual" if repo in rules.gated else False, "disabled": False,
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
        }  # fmt: skip

    def _tree(self, commit: Commit) -> web.Response:
        query = parse_qs(self._exchange.query)
        recursive = query.get("recursive", ["False"])[0].lower() in ("true", "1")
        rows = tree_rows(commit, self._route.path, recursive=recursive)
        if self._route.path and not rows:
            return self._no_entry(commit)
        page = int(query.get("cursor", ["0"])[0])
        start = page * PAGE_ENTRIES
        response = web.json_response(rows[start : start + PAGE_ENTRIES])
        if start + PAGE_ENTRIES < len(rows):
            kept = [(n, v) for n, v in parse_qsl(self._exchange.query) if n != "cursor"]
            text = "&".join(f"{quote(n)}={quote(v)}" for n, v in [*kept, ("cursor", str(page + 1))])
            response.headers["Link"] = f'<{self._protocol.endpoint}{self._raw_path}?{text}>; rel="next"'
        return response

    async def _paths_info(self, commit: Commit) -> web.Response:
        body = await self._request.text()
        if self._request.content_type == "application/json":
            paths = json.loads(body).get("paths", [])
        else:
            paths = parse_qs(body).get("paths", [])
        rows = {row["path"]: row for row in tree_rows(commit, "", recursive=True)}
        return web.json_response([rows[p] for p in paths if p in rows])

    def _no_entry(self, commit: Commit) -> web.Response:
        response = _refusal(404, "Entry not found", "EntryNotFound")
        response.headers["X-Repo-Commit"] = commit.id
        return response

    async def _resolve(self, commit: Commit) -> web.StreamResponse:
        entry = commit.files.get(self._route.path)
        if entry is None:
            return self._no_entry(commit)
        rules, is_head = self._rules, self._request.method == "HEAD"
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        lies = {f.kind for f in self._take(LABEL_KINDS, self._facts)}
        etag = "0" * len(entry.etag) if "wrong_etag" in lies else entry.etag
        if "wrong_commit" in lies:
            headers["X-Repo-Commit"] = "f" * 40
        redirects = rules.shape == "hub" or (rules.shape == "presigned" and not is_head)
        if entry.sha256 and redirects and rules.redirect:
            headers.update({"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{etag}"'})
            headers["Location"] = self._signed_url(entry)
            return web.Response(status=302, headers=headers, text=f"Found. Redirecting to {headers['Location']}")
        headers["ETag"] = f'"{etag}"'
        return await self._file(entry, headers)

    def _signed_url(self, entry: Entry) -> str:
        path = f"/repos/{self._route.repo}/{entry.sha256}"
        expires = int(time.time() + self._rules.signature_ttl_s)
        query = f"filename={quote(entry.path)}&Expires={expires}"
        return f"{self._protocol.cdn}{path}?{query}&Signature={self._protocol.sign(path, query)}"

    async def _cdn(self) -> web.StreamResponse:
        if "authorization" in self._exchange.headers:
            return web.Response(status=400, text="<Error><Message>Only one auth mechanism allowed</Message></Error>")
        signed, _, signature = self._exchange.query.rpartition("&Signature=")
        expires = dict(parse_qsl(signed)).get("Expires", "")
        if not hmac.compare_digest(signature, self._protocol.sign(self._raw_path, signed)):
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        if int(expires) < time.time():
            return _expired()
        repo, _, sha256 = self._exchange.path.removeprefix("/repos/").rpartition("/")
        commits = self._protocol._repositories[repo].commits.values()
        found = (c.files[self._route.path] for c in commits if self._route.path in c.files)
        entry = next((e for e in found if e.sha256 == sha256), None)
        if entry is None:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>")
        # As on S3, the ETag of the object is not the sha256 of the file.
        return await self._file(entry, {"Accept-Ranges": "bytes", "ETag": f'"{sha256[:32]}-1"'})

    async def _file(self, entry: Entry, headers: dict[str, str]) -> web.StreamResponse:
        """Send *entry* or the range of it that was asked for."""
        headers["Content-Type"] = "application/octet-stream" if entry.sha256 else "text/plain; charset=utf-8"
        if self._request.method == "HEAD":
            headers["Content-Length"] = str(entry.size)
            return web.Response(headers=headers)
        whole = ByteRange(0, entry.size)
        if_range = self._exchange.headers.get("if-range", headers["ETag"])
        header = self._exchange.headers.get("range") if if_range == headers["ETag"] else None
        span = parse_range(header, entry.size)
        if span is not None and not span:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{entry.size}"})
        facts = replace(self._facts, is_ranged=span is not None, span=whole if span is None else span)
        if span is not None and self._take(frozenset({"no_range"}), facts):
            span = None
            facts = replace(facts, is_ranged=False, span=whole)
        faults = self._take(BODY_KINDS - {"no_range"}, facts)
        if span is not None:
            shift = sum(f.shift for f in faults if f.kind == "bad_range")
            headers["Content-Range"] = f"bytes {span.start + shift}-{span.stop - 1 + shift}/{entry.size}"
        response = web.StreamResponse(status=200 if span is None else 206, headers=headers)
        try:
            return await self._bodies.send(self._request, response, self._exchange, entry, span or whole, faults)
        except ConnectionError:  # the client has gone: that is for it to say, not for the log of a server
            return response


def _refusal(status: int, error: str, code: str | None = None, message: str | None = None) -> web.Response:
    headers = {"X-Error-Message": message or error}
    if code is not None:
        headers["X-Error-Code"] = code
    return web.json_response({"error": error}, status=status, headers=headers)


def _expired() -> web.Response:
    text = "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
    return web.Response(status=403, text=text, content_type="application/xml")
