"""The test bed keeps its own promises: models are the same bytes everywhere, each fault breaks what it names."""

from __future__ import annotations

import hashlib
import http.client
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from testbed.models import MODELS, ONE_B, TINY, make
from testbed.nginx_faults import FAULTS, NginxFaults
from testbed.nginx_hub import NginxHub
from testbed.nginx_process import Nginx, missing

URL = "/tb/llama-tiny-bf16/resolve/main/model-00001-of-00005.safetensors"
FIRST_SHARD_SHA256 = "e89a328e0ec6bc39058ac1219ef38e80733fd13e1337293728b5c1375c502392"


def test_made_models_are_the_same_bytes_on_every_machine(tiny_llama: Path) -> None:
    shards = sorted(tiny_llama.glob("*.safetensors"))
    assert len(shards) == 5
    assert hashlib.sha256(shards[0].read_bytes()).hexdigest() == FIRST_SHARD_SHA256


def test_an_interrupted_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "config.json").touch()
        raise OSError("disk full")

    monkeypatch.setitem(MODELS, "broken", interrupted)
    with pytest.raises(OSError, match="disk full"):
        make("broken", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_bin"])
def test_made_llama_is_what_transformers_expects(request: pytest.FixtureRequest, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = request.getfixturevalue(name)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype is torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("weights of 2 GB, ü 你", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "weights of 2 GB, ü 你"
    assert torch.isfinite(model(ids).logits).all()


def test_the_large_llama_has_its_two_gigabytes() -> None:
    def parameters(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(rows * (columns[0] if columns else 1) for rows, *columns in shapes.values())

    assert (parameters(TINY.tensors()), parameters(ONE_B.tensors())) == (3_950_848, 1_038_682_112)


@pytest.mark.nginx
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_nginx_that_cannot_start_says_why(tmp_path: Path) -> None:
    nginx = Nginx(tmp_path, ["one"], lambda ports: "nonsense;")
    with pytest.raises(RuntimeError, match='unknown directive "nonsense"'):
        nginx.start()


def test_rate_is_given_to_each_answer(tmp_path: Path, nginx_hub: NginxHub, tiny_llama: Path) -> None:
    with NginxHub([tiny_llama], rate_bytes_per_s=123_456, folder=tmp_path) as hub:
        assert list(hub.repos) == ["tb/llama-tiny-bf16"]
    limited = (tmp_path / "nginx.conf").read_text().count("limit_rate 123456;")
    assert limited == 4  # mirror, stale, tls, cdn
    assert "limit_rate" not in (nginx_hub.nginx.folder / "nginx.conf").read_text()


class Answer:
    """What came of one GET of 200,000 bytes from offset 100,000."""

    def __init__(self, endpoint: str) -> None:
        self.error: Exception | None = None
        self.body = b""
        connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=30)
        try:
            connection.request("GET", URL, headers={"Range": "bytes=100000-299999"})
            response = connection.getresponse()
            self.status, self.headers = response.status, response.headers
            self.body = response.read()
        except http.client.IncompleteRead as error:
            self.error, self.body = error, error.partial
        except ConnectionError as error:
            self.error = error
        finally:
            connection.close()


@pytest.fixture(scope="module")
def content(tiny_llama: Path) -> bytes:
    return (tiny_llama / "model-00001-of-00005.safetensors").read_bytes()


# name: (status, what is wrong with the answer)
ANSWERS: dict[str, tuple[int, Any]] = {
    "norange": (200, lambda a, whole: a.body == whole),
    "loop": (302, lambda a, whole: a.headers["Location"].endswith(URL)),
    "nodns": (302, lambda a, whole: a.headers["Location"] == f"http://cdn.invalid{URL}"),
    "wrongetag": (206, lambda a, whole: a.headers["ETag"] == f'"{"0" * 64}"'),
    "wrongrange": (206, lambda a, whole: a.headers["Content-Range"] == f"bytes 100001-300000/{len(whole)}"),
    "truncate": (206, lambda a, whole: a.error is not None and a.body == whole[100_000:165_536]),
    "captive": (200, lambda a, whole: a.body == b"<html>Please sign in</html>"),
    "chunked": (200, lambda a, whole: "Content-Length" not in a.headers and a.body == whole),
    "noclose": (206, lambda a, whole: a.headers["Connection"] == "close"),
    "error500": (500, lambda a, whole: b"Internal" in a.body),
    "oneconn": (206, lambda a, whole: a.body == whole[100_000:300_000]),
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_fault_breaks_what_it_names(nginx_faults: NginxFaults, content: bytes, fault: str) -> None:
    status, wrong = ANSWERS[fault]
    answer = Answer(nginx_faults.endpoint(fault))
    assert answer.status == status
    assert wrong(answer, content), (fault, FAULTS[fault].help)


def test_flip_changes_one_bit(nginx_faults: NginxFaults, content: bytes) -> None:
    body = Answer(nginx_faults.endpoint("flip")).body
    expected = content[100_000:300_000]
    assert len(body) == len(expected)
    changed = [i for i, (a, b) in enumerate(zip(body, expected, strict=True)) if a != b]
    assert changed == [65536] and body[65536] ^ expected[65536] == 1


def test_reset_answers_nothing(nginx_faults: NginxFaults) -> None:
    mark = nginx_faults.mark()
    assert isinstance(Answer(nginx_faults.endpoint("reset")).error, ConnectionError)
    assert [r.server for r in nginx_faults.requests(mark)] == ["reset"]


def test_ratelimit_says_when_to_come_back(nginx_faults: NginxFaults) -> None:
    answers = [Answer(nginx_faults.endpoint("ratelimit")) for _ in range(20)]
    refused = [a for a in answers if a.status == 429]
    assert refused and refused[0].headers["Retry-After"] == "1"
