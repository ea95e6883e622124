"""Who gets to see the token; proxies; certificates."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from transfers import LARGE, MODEL, SMALL, fetch

from fastload.errors import AccessError, NotFoundError, OfflineError, SettingsError
from fastload.settings import Settings
from fastload.testing import Fault, Hub
from fastload.testing.log import Request

MakeHub = Callable[..., Hub]
TOKEN = "hf_very_secret"
PRIVATE = {"private": ["org/m"], "token": TOKEN}


def shown(hub: Hub) -> set[tuple[str, str | None]]:
    """Return which servers of *hub* were shown which credentials."""
    return {(r.origin, r.headers.get("authorization")) for r in hub.requests}


# -- the token -------------------------------------------------------------------------------------------------------


async def test_the_token_goes_to_the_hub_and_not_to_its_cdn(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, **PRIVATE)
    outcome = await fetch(tmp_path, hub.endpoint, token=TOKEN)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL
    assert shown(hub) == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


async def test_the_token_goes_to_no_mirror(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, **PRIVATE)
    mirror = make_hub({"org/m": MODEL}, shape="mirror")
    hub.script(Fault("drop", path=LARGE))
    outcome = await fetch(tmp_path, hub.endpoint, token=TOKEN, mirrors=[mirror.endpoint])
    assert outcome.error is None, outcome.error
    assert mirror.bytes_sent(LARGE) == len(MODEL[LARGE])
    assert shown(mirror) == {("hub", None)}


async def test_the_token_follows_a_renamed_repository_and_no_further(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/new": MODEL}, private=["org/new"], token=TOKEN, renamed={"org/old": "org/new"})
    outcome = await fetch(tmp_path, hub.endpoint, "org/old", token=TOKEN)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL
    assert shown(hub) == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


async def test_the_token_is_not_sent_to_another_scheme_of_the_same_host(make_hub: MakeHub, tmp_path: Path):
    from fastload.access import Access

    access = Access(Settings(), "https://hub.example", TOKEN)
    table = {
        "https://hub.example/api": f"Bearer {TOKEN}",
        "https://hub.example:443/api": f"Bearer {TOKEN}",
        "https://HUB.example/api": f"Bearer {TOKEN}",
        "http://hub.example/api": None,
        "https://hub.example:8443/api": None,
        "https://hub.example.evil/api": None,
        "https://hub.example@evil/api": None,
        "https://cdn.hub.example/api": None,
    }
    assert {url: access.authorization(url) for url in table} == table


async def test_the_token_file_is_read(make_hub: MakeHub, tmp_path: Path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    hub = make_hub({"org/m": MODEL}, **PRIVATE)
    outcome = await fetch(tmp_path / "cache", hub.endpoint, token_path=tmp_path / "token")
    assert outcome.error is None, outcome.error


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", None])
async def test_a_token_file_that_holds_none_is_none(content: bytes | None, make_hub: MakeHub, tmp_path: Path):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    hub = make_hub({"org/m": MODEL})
    outcome = await fetch(tmp_path / "cache", hub.endpoint, token_path=tmp_path / "token")
    assert outcome.error is None, outcome.error
    assert shown(hub) == {("hub", None), ("cdn", None)}


async def test_without_the_token_the_error_says_how_to_log_in(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, **PRIVATE)
    outcome = await fetch(tmp_path, hub.endpoint)
    assert isinstance(outcome.error, NotFoundError)
    assert "hf auth login" in str(outcome.error) and "private" in str(outcome.error)


@pytest.mark.parametrize("token", [None, "hf_other"])
async def test_a_gated_repository_says_where_to_ask(token: str | None, make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, gated=["org/m"], token=TOKEN)
    outcome = await fetch(tmp_path, hub.endpoint, token=token)
    assert isinstance(outcome.error, AccessError)
    assert "gated" in str(outcome.error) and "ask for access" in str(outcome.error)
    assert ("hf auth login" in str(outcome.error)) == (token is None)
    assert hub.bytes_sent() == 0


async def test_a_disabled_repository_says_so(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, disabled=["org/m"])
    outcome = await fetch(tmp_path, hub.endpoint)
    assert isinstance(outcome.error, AccessError)
    assert "disabled" in str(outcome.error)


@pytest.mark.parametrize(
    ("source", "request_", "text"),
    [
        ("org/other", {}, "does not exist"),
        ("org/m@v9", {}, "no revision 'v9'"),
        ("org/m", {"patterns": ("*.gguf",)}, "none of its 2 files matches *.gguf"),
    ],
)
async def test_what_is_not_there_is_named(
    source: str, request_: dict[str, object], text: str, make_hub: MakeHub, tmp_path: Path
):
    hub = make_hub({"org/m": MODEL})
    outcome = await fetch(tmp_path / "cache", hub.endpoint, source, request=request_)
    assert isinstance(outcome.error, NotFoundError)
    assert text in str(outcome.error)
    assert not (tmp_path / "cache").exists()


# -- .netrc ----------------------------------------------------------------------------------------------------------


def write(netrc: Path, text: str) -> None:
    netrc.write_text(text)
    netrc.chmod(0o600)


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "netrc"
    write(path, "machine 127.0.0.1 login me password pass\n")
    monkeypatch.setenv("NETRC", str(path))
    return path


async def test_a_token_and_a_netrc_entry_for_the_hub_get_along(netrc: Path, make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": {SMALL: MODEL[SMALL]}}, **PRIVATE)
    outcome = await fetch(tmp_path / "cache", hub.endpoint, token=TOKEN)
    assert outcome.error is None, outcome.error
    assert shown(hub) == {("hub", f"Bearer {TOKEN}")}


async def test_netrc_is_used_where_there_is_no_token_and_not_with_trust_env_off(
    netrc: Path, make_hub: MakeHub, tmp_path: Path
):
    basic = "Basic " + base64.b64encode(b"me:pass").decode()
    for trust_env, expected in ((True, basic), (False, None)):
        hub = make_hub({"org/m": {SMALL: MODEL[SMALL]}})
        await fetch(tmp_path / str(trust_env), hub.endpoint, trust_env=trust_env)
        assert shown(hub) == {("hub", expected)}


async def test_a_default_entry_of_netrc_goes_to_nobody(netrc: Path, make_hub: MakeHub, tmp_path: Path):
    write(netrc, "default login me password pass\n")
    hub = make_hub({"org/m": MODEL})
    outcome = await fetch(tmp_path / "cache", hub.endpoint)
    assert outcome.error is None, outcome.error
    assert shown(hub) == {("hub", None), ("cdn", None)}


# -- proxies ---------------------------------------------------------------------------------------------------------


def hosts(requests: list[Request]) -> set[str]:
    return {r.headers["host"] for r in requests}


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
async def test_a_proxy_is_used(name: str, make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The hub stands in as the proxy: it answers for whatever host it is asked.
    proxy = make_hub({"org/m": {SMALL: MODEL[SMALL]}})
    monkeypatch.setenv(name, proxy.endpoint)
    outcome = await fetch(tmp_path, "http://hub.example")
    assert outcome.error is None, outcome.error
    assert outcome.contents() == {SMALL: MODEL[SMALL]}
    assert hosts(proxy.requests) == {"hub.example"}


async def test_a_proxys_password_goes_to_the_proxy_alone(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    proxy = make_hub({"org/m": {SMALL: MODEL[SMALL]}})
    monkeypatch.setenv("HTTP_PROXY", proxy.endpoint.replace("://", "://me:p%40ss@"))
    outcome = await fetch(tmp_path, "http://hub.example")
    assert outcome.error is None, outcome.error
    assert {r.headers.get("proxy-authorization") for r in proxy.requests} == {
        "Basic " + base64.b64encode(b"me:p@ss").decode()
    }
    assert shown(proxy) == {("hub", None)}


@pytest.mark.parametrize("bypass", ["127.0.0.1", "*", "127.0.0.1:{port}", "other.example,127.0.0.1"])
async def test_no_proxy_for_hosts_that_no_proxy_names(
    bypass: str, make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub = make_hub({"org/m": {SMALL: MODEL[SMALL]}})
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", bypass.format(port=hub.endpoint.rpartition(":")[2]))
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None, outcome.error


async def test_trust_env_off_means_no_proxy(make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = make_hub({"org/m": {SMALL: MODEL[SMALL]}})
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    outcome = await fetch(tmp_path, hub.endpoint, trust_env=False)
    assert outcome.error is None, outcome.error


async def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@127.0.0.1:9")
    outcome = await fetch(tmp_path, "http://hub.example")
    assert isinstance(outcome.error, SettingsError)
    assert "socks5://127.0.0.1" in str(outcome.error) and "secret" not in str(outcome.error)


# -- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ca_file", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
async def test_a_private_authority_is_trusted_when_it_is_named(
    how: str, make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub = make_hub({"org/m": MODEL}, tls=True)
    if how != "ca_file":
        monkeypatch.setenv(how, str(hub.ca_file))
    outcome = await fetch(tmp_path, hub.endpoint, ca_file=hub.ca_file if how == "ca_file" else None)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


async def test_a_certificate_that_nobody_vouches_for_is_refused_at_once(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, tls=True)
    outcome = await fetch(tmp_path, hub.endpoint, token=TOKEN)
    assert isinstance(outcome.error, OfflineError)
    assert "certificate is not trusted" in str(outcome.error) and "ca_file" in str(outcome.error)
    assert not hub.requests and not outcome.waits


async def test_an_authority_that_cannot_be_read_is_a_wrong_setting(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, tls=True)
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        outcome = await fetch(tmp_path / "cache", hub.endpoint, ca_file=path)
        assert isinstance(outcome.error, SettingsError)
        assert str(path) in str(outcome.error)
