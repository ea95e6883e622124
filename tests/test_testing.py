"""The embedded hub by itself: commits, records, life, CDN, ranges, its process, and the weights it can serve."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from huggingface_hub import HfApi, errors

from fastload.errors import FastloadError, SettingsError
from fastload.testing import Fault, Hub, random_tensor, spawn, write_safetensors, write_tiny_llama
from fastload.testing.routes import parse_range
from fastload.types import ByteRange

MakeHub = Callable[..., Hub]
SHARD = "model-00001-of-00002.safetensors"
FILES = {"config.json": b"{}", "folder/a b%#&ü.txt": b"awful name", "empty.txt": b"", "w.safetensors": bytes(1000)}


async def fetch(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, headers=names, allow_redirects=False) as response,
    ):
        return response.status, {n.lower(): v for n, v in response.headers.items()}, await response.read()


async def signed(hub: Hub, path: str = SHARD, repo: str = "org/tiny") -> str:
    _, headers, _ = await fetch(f"{hub.endpoint}/{repo}/resolve/main/{path}")
    return headers["location"]


# -- commits, records, life --------------------------------------------------------------------------------------------


def test_commits_depend_on_the_content_only(make_hub: MakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "org" / "names"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    one, two = make_hub({"org/names": FILES}), make_hub(tmp_path)
    assert one.manifest("org/names").files == two.manifest("org/names").files
    assert one.commit("org/names") == two.commit("org/names")
    assert one.commit("org/names") != make_hub({"org/names": {**FILES, "empty.txt": b"."}}).commit("org/names")


def test_git_sha1_and_pointer_are_those_of_git(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": {"small.txt": b"hello\n", "large.bin": b"hello\n"}})
    small, large = (hub.manifest("org/m").get(name) for name in ("small.txt", "large.bin"))
    assert small is not None and large is not None
    # printf 'hello\n' | git hash-object --stdin; … | sha256sum; the pointer of git lfs, hashed by git
    assert str(small.digest) == "git-sha1:ce013625030ba8dba906f756967f9e9ca394464a"
    assert str(large.digest) == "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid {large.digest}\nsize 6\n".encode()
    expected = subprocess.run(["git", "hash-object", "--stdin"], input=pointer, capture_output=True, check=True)
    assert large.blob_id == expected.stdout.decode().strip()


def test_files_are_large_by_suffix_by_size_or_as_told(make_hub: MakeHub) -> None:
    files = {"a.safetensors": b"", "b.json": bytes(5_000_001), "c.json": bytes(5_000_000)}
    digests = {f.path: str(f.digest).partition(":")[0] for f in make_hub({"o/m": files}).manifest("o/m").files}
    assert digests == {"a.safetensors": "sha256", "b.json": "sha256", "c.json": "git-sha1"}
    told = make_hub({"o/m": files}, lfs=lambda path, size: path == "c.json").manifest("o/m")
    assert {f.path for f in told.files if f.digest and f.digest.algorithm == "sha256"} == {"c.json"}


async def test_requests_are_recorded_with_range_bytes_connection_and_token(hub: Hub) -> None:
    url = f"{hub.endpoint}/org/tiny/resolve/main/config.json?x=1"
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer hf_x"}) as session:
        for _ in range(2):
            async with session.get(url, headers={"Range": "bytes=10-19"}) as response:
                assert response.status == 206
                await response.read()
    first, second = hub.requests
    assert (first.origin, first.method, first.path, first.query) == (
        "hub",
        "GET",
        "/org/tiny/resolve/main/config.json",
        "x=1",
    )
    assert (first.file, first.range, first.status, first.bytes_sent) == ("config.json", "bytes=10-19", 206, 10)
    assert first.headers["authorization"] == "Bearer hf_x"
    assert first.connection == second.connection and first.started_s <= second.started_s
    assert hub.bytes_sent() == hub.bytes_sent("config.json") == 20 and hub.bytes_sent("other") == 0
    hub.wait(lambda requests: all(r.ended_s is not None for r in requests))
    hub.clear()
    assert hub.requests == []


def test_connections_are_told_apart(hub: Hub) -> None:
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as connection:
            connection.sendall(b"GET /api/agent-harnesses HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            while connection.recv(1000):
                pass
    assert len({r.connection for r in hub.requests}) == 2


async def test_a_request_in_absolute_form_is_answered_as_by_a_proxy(hub: Hub) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get("http://hub.invalid/api/models/org/tiny", proxy=hub.endpoint) as response,
    ):
        assert (await response.json())["sha"] == hub.commit("org/tiny")
    assert hub.requests[0].headers["host"] == "hub.invalid"


def test_waiting_in_vain_says_what_was_asked(hub: Hub) -> None:
    HfApi(endpoint=hub.endpoint).model_info("org/tiny")
    with pytest.raises(FastloadError, match="GET hub 200"):
        hub.wait(lambda requests: len(requests) > 1, timeout_s=0.01)


def test_ports_are_closed_and_the_thread_is_joined_on_exit(tiny_model: Path) -> None:
    before = threading.active_count()
    with Hub({"org/tiny": tiny_model}) as hub:
        port = int(hub.endpoint.rpartition(":")[2])
        idle = socket.create_connection(("127.0.0.1", port))
    assert threading.active_count() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    idle.close()
    hub.close()


def test_wrong_arguments_are_named(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="no folder"):
        Hub({"org/m": tmp_path / "nope"})
    with pytest.raises(SettingsError, match="no org/name folders"):
        Hub(tmp_path)
    with pytest.raises(SettingsError, match="explode"):
        Fault("explode")  # type: ignore[arg-type]
    with pytest.raises(FastloadError, match="org/nope@main"):
        hub.commit("org/nope")
    with pytest.raises(FastloadError, match="cannot be started"):
        Hub({}, port=int(hub.endpoint.rpartition(":")[2])).start()


# -- the CDN and ranges ------------------------------------------------------------------------------------------------


async def test_cdn_serves_only_what_was_signed_and_refuses_a_token(hub: Hub) -> None:
    url = await signed(hub)
    assert (await fetch(url))[0] == 200
    assert (await fetch(url, Authorization="Bearer hf_x"))[0] == 400
    assert (await fetch(url[:-1] + ("0" if url[-1] != "0" else "1")))[0] == 403
    assert (await fetch(url.replace("Expires=", "Expires=9")))[0] == 403
    assert (await fetch(f"{hub.cdn}/repos/org/tiny/x"))[0] == 403
    hub.expire_signatures()
    assert (await fetch(url))[0] == 403
    assert (await fetch(await signed(hub)))[0] == 200


async def test_signed_url_expires(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": FILES}, signature_ttl_s=-1)
    status, _, body = await fetch(await signed(hub, "w.safetensors", "org/m"))
    assert status == 403 and b"Request has expired" in body


async def test_redirect_can_be_switched_off(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": FILES}, redirect=False)
    status, headers, body = await fetch(f"{hub.endpoint}/org/m/resolve/main/w.safetensors")
    assert (status, body) == (200, FILES["w.safetensors"])
    assert headers["etag"].strip('"') == hub.manifest("org/m").files[-1].digest.value  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-9", ByteRange(0, 10)), ("bytes=90-", ByteRange(90, 100)), ("bytes=-5", ByteRange(95, 100)),
        ("bytes=50-500", ByteRange(50, 100)), ("bytes=-500", ByteRange(0, 100)), ("bytes=100-", ByteRange(100, 100)),
        ("bytes=9-5", None), ("bytes=1-2,4-5", None), ("bytes=x-", None), ("bytes=-", None), ("lines=1-2", None),
        (None, None),
    ],
)  # fmt: skip
def test_range_headers_are_read_as_rfc_9110_says(header: str | None, span: ByteRange | None) -> None:
    assert parse_range(header, 100) == span


@pytest.mark.parametrize("content", [{"w.safetensors": bytes(range(256)) * 4}, "folder"])
async def test_ranges_are_served_from_memory_and_from_files(
    make_hub: MakeHub, tmp_path: Path, content: dict[str, bytes] | str
) -> None:
    data = bytes(range(256)) * 4
    if content == "folder":
        (tmp_path / "w.safetensors").write_bytes(data)
    hub = make_hub({"org/m": tmp_path if isinstance(content, str) else content}, shape="mirror")
    url = f"{hub.endpoint}/org/m/resolve/main/w.safetensors"
    status, headers, body = await fetch(url, Range="bytes=100-299")
    assert (status, headers["content-range"], body) == (206, "bytes 100-299/1024", data[100:300])
    status, headers, body = await fetch(url, Range="bytes=1024-")
    assert (status, headers["content-range"]) == (416, "bytes */1024")
    assert (await fetch(url, Range="bytes=5-9", If_Range=f'"{"0" * 64}"'))[0] == 200
    status, headers, body = await fetch(url, "HEAD")
    assert (status, headers["content-length"], body) == (200, "1024", b"")


async def test_rate_holds_for_each_connection(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": {"a.bin": bytes(30_000)}}, shape="mirror", rate_bytes_per_s=100_000)
    await fetch(f"{hub.endpoint}/org/m/resolve/main/a.bin")
    (request,) = hub.requests
    hub.wait(lambda requests: requests[0].ended_s is not None)
    ended_s = hub.requests[0].ended_s
    assert ended_s is not None and ended_s - request.started_s >= 0.27
    hub.rate_bytes_per_s = None
    assert hub.rate_bytes_per_s is None


async def test_latency_comes_before_every_answer(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": FILES}, latency_s=0.05)
    await fetch(f"{hub.endpoint}/api/models/org/m")
    hub.wait(lambda requests: requests[0].ended_s is not None)
    (request,) = hub.requests
    assert request.ended_s is not None and request.ended_s - request.started_s >= 0.05


async def test_tls_is_trusted_by_its_own_authority_only(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": FILES}, tls=True)
    assert hub.endpoint.startswith("https://") and hub.cdn.startswith("https://")
    context = ssl.create_default_context(cafile=str(hub.ca_file))
    url = f"{hub.endpoint}/org/m/resolve/main/w.safetensors"
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.get(url) as response,
    ):
        assert await response.read() == FILES["w.safetensors"]
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await fetch(url)


# -- in a process of its own -------------------------------------------------------------------------------------------


def test_spawned_hub_serves_is_scripted_and_ends_with_the_block(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny_model)
    with spawn(tmp_path, token="hf_right", gated=["org/tiny"]) as served:
        api = HfApi(endpoint=served.endpoint)
        assert api.model_info("org/tiny").sha == served.commits["org/tiny"]
        served.script(Fault("status", status=418, times=1))
        with pytest.raises(errors.HfHubHTTPError, match="418"):
            api.model_info("org/tiny")
        assert [r.status for r in served.requests] == [200, 418]
        served.release()
        served.clear()
        assert served.requests == []
        os.kill(served.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(served.pid, 0)


def test_spawn_says_why_it_did_not_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FastloadError, match="ended with status 1"), spawn(tmp_path):
        pass
    assert "no org/name folders" in capfd.readouterr().err


def test_command_line_prints_the_endpoint_and_ends_on_sigterm(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(tiny_model)
    command = [sys.executable, "-m", "fastload.testing", "serve", str(tmp_path), "--shape", "mirror", "--port", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        hello = json.loads(process.stdout.readline())
        assert HfApi(endpoint=hello["endpoint"]).model_info("org/tiny").sha == hello["commits"]["org/tiny"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


# -- weights -----------------------------------------------------------------------------------------------------------


def test_safetensors_files_are_read_by_the_reference(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    kinds = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
    tensors = {kind: random_tensor(kind, (3, 5), kind) for kind in kinds}
    path = write_safetensors(tmp_path / "m.safetensors", {**tensors, "scalar": ("I8", (), b"\7")}, {"format": "pt"})
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert f.get_tensor("scalar").item() == 7
        for kind, (_, shape, data) in tensors.items():
            tensor = f.get_tensor(kind)
            assert tensor.shape == shape
            assert tensor.abs().max() < 2 if tensor.is_floating_point() else kind != "BOOL" or set(data) == {0, 1}
            assert bytes(tensor.flatten().view(torch.uint8).tolist()) == data


@pytest.mark.transformers
@pytest.mark.parametrize("shards", [1, 3])
def test_tiny_llama_is_loaded_by_transformers_and_is_the_same_every_time(tmp_path: Path, shards: int) -> None:
    transformers = pytest.importorskip("transformers")
    folders = [write_tiny_llama(tmp_path / name, shards=shards) for name in "ab"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folders[0], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(model.state_dict()) == 21
    one, two = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders)
    assert one == two and len(one) == 2 + (1 if shards == 1 else shards + 1)
