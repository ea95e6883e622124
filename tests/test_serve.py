"""``fastload serve``: real supervisors, real apps that wait where the test says, real HTTP."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from programs import alive, children
from supervised import PATIENCE_S, Answer, Gate, Supervised, supervised

from fastload.testing import Fault, Hub, write_tiny_llama

Serve = Callable[..., "contextlib.AbstractContextManager[Supervised]"]

#: What an app can be told to do: wait at a gate, count its starts, answer, and die.
APP = """
import json, os, signal, sys, time
from pathlib import Path

HERE = Path(__file__).parent
note = lambda name, text: (HERE / name).open("a").write(text + chr(10))

def predict(request):
    if request == "pid":
        return os.getpid()
    if isinstance(request, dict) and "gate" in request:
        note("reached", request["gate"])
        (HERE / request["gate"]).read_text()
    if request == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if request == "fail":
        raise ValueError("no such thing")
    return {"echo": request}

def setup():
    note("starts", str(os.getpid()))
    return predict

def gated():
    note("starts", str(os.getpid()))
    (HERE / "gate").read_text()
    return predict

def fails_once():
    note("starts", str(os.getpid()))
    if len((HERE / "starts").read_text().split()) == 1:
        raise RuntimeError("not <b>yet</b>")
    return predict

def stubborn():
    import subprocess
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); print(flush=True); time.sleep(600)"], stdout=-1)
    child.stdout.readline()
    note("starts", str(os.getpid()))
    note("starts", str(child.pid))
    (HERE / "gate").read_text()

def parent():
    import subprocess
    note("starts", str(subprocess.Popen(["sleep", "600"]).pid))
    return predict

def prefetches():
    import fastload
    (HERE / "gate").read_text()
    snapshot = fastload.prefetch("org/model", files=["*.safetensors", "*.json"])
    return lambda request: sorted(p.name for p in snapshot.path.iterdir())

def counts(model):
    return lambda request: sum(p.numel() for p in model.parameters())
"""  # noqa: E501


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Supervise ``app:…`` of the module above, with ``tmp_path`` as its folder."""
    (tmp_path / "app.py").write_text(APP)

    def begin(*words: str, **options: Any) -> contextlib.AbstractContextManager[Supervised]:
        return supervised(*words, folder=tmp_path, **options)

    return begin


@pytest.fixture
def later() -> Iterator[Callable[..., Future[Any]]]:
    """Call something in a thread of its own."""
    with ThreadPoolExecutor(16) as pool:
        yield pool.submit


def starts(folder: Path) -> list[int]:
    path = folder / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def gone(pid: int) -> bool:
    """Wait until *pid* has ended; tell whether it has."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watch], [], [], PATIENCE_S)[0])
    finally:
        os.close(watch)


def held(count: int) -> Callable[[dict[str, Any]], bool]:
    return lambda record: record["requests"]["held"] == count


# -- waking -----------------------------------------------------------------------------------------------------------


def test_wake_answers_at_once_and_any_number_of_wakes_is_one_start(serve: Serve, gate: Gate, tmp_path: Path):
    with serve("--asleep", "app:gated") as server:
        asleep = server.call("GET", "/ready")
        assert (asleep.status, asleep.json["state"]) == (503, "asleep")
        answers = [server.call("POST", "/wake") for _ in range(3)]
        assert [a.status for a in answers] == [202] * 3
        assert {a.json["state"] for a in answers} <= {"waking", "starting"}
        assert answers[0].json["progress"] == {"landed_bytes": 0, "total_bytes": 0, "files": 0, "verified_files": 0}
        waiting = server.call("GET", "/ready")
        assert (waiting.status, int(waiting.headers["retry-after"]) > 0) == (503, True)
        gate.open()
        server.until_state("ready")
        assert (server.call("GET", "/ready").status, server.call("POST", "/wake").json["state"]) == (200, "ready")
        assert len(starts(tmp_path)) == 1


def test_it_is_ready_only_after_the_first_output(serve: Serve, gate: Gate):
    with serve("--warmup", '{"gate": "gate"}', "app:setup") as server:
        record = server.until(lambda record: record["start"] and record["start"]["doing"] == "warming up")
        assert record["life"]["state"] == "starting"
        assert server.call("GET", "/ready").status == 503
        gate.open()
        record = server.until_state("ready")
        assert server.call("GET", "/ready").json == {"ready": True}
        rows = [row["name"] for row in record["start"]["waterfall"]]
        assert rows == ["process", "imports", "hook", "warm-up"]
        assert server.predict("hello").json == {"echo": "hello"}


@pytest.mark.parametrize(
    ("app", "warmup", "complaint"),
    [
        ("lambda request: None", "1", "answered with nothing"),
        ("lambda request: float('nan')", "1", "NaN"),
        ("lambda request: request['inputs']", "1", "TypeError"),
    ],
)
def test_a_first_output_that_is_none_is_a_failed_start(
    serve: Serve, tmp_path: Path, app: str, warmup: str, complaint: str
):
    (tmp_path / "poor.py").write_text(f"def setup(): return {app}\n")
    with serve("--warmup", warmup, "poor:setup") as server:
        record = server.until_state("failed")
        assert complaint in record["life"]["error"]["message"]
        assert server.call("GET", "/ready").status == 503
        assert complaint in server.end()[1]


def test_health_is_good_whatever_the_app_does(serve: Serve):
    with serve("--asleep", "app:fails_once") as server:
        assert server.call("GET", "/healthz").json == {"ok": True, "state": "asleep"}
        server.call("POST", "/wake")
        server.until_state("failed")
        assert server.call("GET", "/healthz").json == {"ok": True, "state": "failed"}


# -- requests during a start ------------------------------------------------------------------------------------------


def test_requests_wake_it_and_wait_for_the_start_up_to_a_limit(serve: Serve, gate: Gate, later: Any, tmp_path: Path):
    with serve("--asleep", "--hold-requests", "2", "app:gated") as server:
        waiting = [later(server.predict, n) for n in range(2)]
        server.until(held(2))
        refused = server.predict(3)
        assert (refused.status, refused.json["reason"]) == (503, "full")
        assert int(refused.headers["retry-after"]) > 0
        gate.open()
        assert [f.result().json for f in waiting] == [{"echo": 0}, {"echo": 1}]
        assert len(starts(tmp_path)) == 1
        metrics = server.call("GET", "/metrics").body.decode()
        assert 'fastload_serve_wakes_total{cause="request"} 1.0' in metrics
        assert 'fastload_serve_refused_total{reason="full"} 1.0' in metrics


def test_a_request_waits_only_so_long(serve: Serve, gate: Gate):
    with serve("--hold-s", "0.05", "app:gated") as server:
        answer = server.predict(1)
        assert (answer.status, answer.json["reason"], answer.json["state"]) == (503, "timeout", "starting")
        gate.open()


def test_a_client_that_goes_away_waits_no_more(serve: Serve, gate: Gate):
    with serve("app:gated") as server:
        connection = server.connect()
        connection.request("POST", "/predict", b"1")
        server.until(held(1))
        connection.close()
        server.until(held(0))
        gate.open()
        assert server.until_state("ready")["requests"]["answered"] == 0


def test_a_body_that_is_too_large_is_refused_and_wakes_nobody(serve: Serve, tmp_path: Path):
    with serve("--asleep", "--body-bytes", "1kB", "app:setup") as server:
        assert server.call("POST", "/predict", b"x" * 1001).status == 413
        assert server.state()["life"]["state"] == "asleep"

        def chunks() -> Iterator[bytes]:
            yield b'"'
            for _ in range(100):
                yield b"x" * 100

        connection = server.connect()
        try:
            connection.request(
                "POST", "/predict", chunks(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
            )
            status = connection.getresponse().status
        except (BrokenPipeError, ConnectionResetError):  # it was refused before all was sent
            status = 413
        assert status == 413
        assert server.call("POST", "/predict", b'"' + b"x" * 998 + b'"').status == 200


# -- sleeping ---------------------------------------------------------------------------------------------------------


def test_an_idle_app_is_stopped_and_a_request_brings_it_back(serve: Serve, tmp_path: Path):
    with serve("--idle-s", "0.1", "app:setup") as server:
        server.until(lambda record: record["life"]["state"] == "asleep" and record["life"]["attempt"] == 1)
        [first] = starts(tmp_path)
        assert not alive(first)
        assert server.call("GET", "/ready").status == 503
        second = server.predict("pid").json
        assert (second != first, starts(tmp_path)) == (True, [first, second])
        record = server.until(lambda record: record["life"]["state"] == "asleep")
        assert [s["error"] for s in record["life"]["starts"]] == [None, None]
        assert not alive(second)


# -- failing ----------------------------------------------------------------------------------------------------------


def test_a_crash_is_seen_told_and_mended_by_the_next_request(serve: Serve, tmp_path: Path):
    with serve("app:setup") as server:
        server.until_state("ready")
        answer = server.predict("die")
        assert answer.status == 502
        record = server.until_state("failed")
        assert "SIGKILL" in record["life"]["error"]["message"]
        assert record["life"]["pause_s"] > 0
        assert server.predict("again").json == {"echo": "again"}
        assert len(starts(tmp_path)) == 2
        assert server.state()["life"]["error"] is None
        status, err = server.end()
    assert status == 0
    assert "fastload serve: app:setup was ended by SIGKILL" in err


def test_what_a_crashed_app_had_started_is_ended_with_it(serve: Serve, tmp_path: Path):
    with serve("app:parent") as server:
        server.predict("die")
        server.until_state("failed")
        assert all(map(gone, starts(tmp_path)))


def test_a_hook_that_fails_is_told_to_who_waits_and_tried_again(serve: Serve, tmp_path: Path):
    with serve("--asleep", "app:fails_once") as server:
        answer = server.predict(1)
        assert (answer.status, answer.json["reason"]) == (503, "failed")
        assert answer.json["error"] == "app:fails_once failed: RuntimeError: not <b>yet</b>"
        assert server.predict(2).json == {"echo": 2}
        assert [s["error"] is None for s in server.state()["life"]["starts"]] == [False, True]
        assert "Traceback" in server.end()[1]


def test_an_app_that_cannot_be_found_is_a_failed_start(serve: Serve):
    with serve("nosuchapp:setup") as server:
        assert "there is no module 'nosuchapp'" in server.until_state("failed")["life"]["error"]["message"]
    with serve("--", "/no/such/program") as server:
        assert "cannot be found" in server.until_state("failed")["life"]["error"]["message"]


def test_a_start_that_takes_too_long_has_failed(serve: Serve, gate: Gate, tmp_path: Path):
    with serve("--start-s", "0.5", "--stop-s", "5", "app:gated") as server:
        record = server.until_state("failed")
        assert "not ready within" in record["life"]["error"]["message"]
        assert all(map(gone, starts(tmp_path)))


def test_an_error_of_the_predictor_is_one_answer(serve: Serve):
    with serve("app:setup") as server:
        answer = server.predict("fail")
        assert (answer.status, answer.json) == (500, {"error": {"type": "ValueError", "message": "no such thing"}})
        assert server.call("POST", "/predict", b"{", {"Content-Type": "application/json"}).status == 400
        assert server.predict(1).status == 200
        assert server.call("POST", "/other").status == 404


# -- the end ----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_requests_under_way_end_and_takes_no_others(serve: Serve, gate: Gate, later: Any, tmp_path: Path):
    with serve("app:setup") as server:
        under_way = later(server.predict, {"gate": "gate"})
        server.until(lambda record: record["requests"]["in_flight"] == 1)
        server.process.terminate()
        server.until_state("draining")
        assert server.call("GET", "/ready").json["state"] == "draining"
        assert (server.call("POST", "/wake").status, server.call("GET", "/healthz").status) == (503, 200)
        refused = server.predict(2)
        assert (refused.status, refused.json["reason"], refused.headers["connection"]) == (503, "draining", "close")
        gate.open()
        assert under_way.result().json == {"echo": {"gate": "gate"}}
        assert server.process.wait(timeout=60) == 0
    assert all(map(gone, starts(tmp_path)))


def test_sigterm_during_a_start_answers_who_waits_and_ends(serve: Serve, gate: Gate, later: Any, tmp_path: Path):
    with serve("app:gated") as server:
        waiting = later(server.predict, 1)
        server.until(held(1))
        server.until(lambda record: "hook" in [row["name"] for row in record["start"]["waterfall"]])
        assert server.end()[0] == 0
        assert (waiting.result().status, waiting.result().json["reason"]) == (503, "draining")
    assert all(map(gone, starts(tmp_path)))


def test_a_second_sigterm_waits_for_nobody(serve: Serve, gate: Gate, later: Any, tmp_path: Path):
    with serve("app:setup") as server:
        under_way: Future[Answer] = later(server.predict, {"gate": "gate"})
        server.until(lambda record: record["requests"]["in_flight"] == 1)
        server.process.terminate()
        server.until_state("draining")
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
        assert under_way.exception() is not None or under_way.result().status == 502
    assert all(map(gone, starts(tmp_path)))


def test_requests_under_way_are_waited_for_only_so_long(serve: Serve, gate: Gate, later: Any, tmp_path: Path):
    with serve("--drain-s", "0.05", "--stop-s", "0.05", "app:setup") as server:
        under_way: Future[Answer] = later(server.predict, {"gate": "gate"})
        server.until(lambda record: record["requests"]["in_flight"] == 1)
        assert server.end()[0] == 0
        assert under_way.exception() is not None or under_way.result().status == 502


def test_an_app_that_ignores_sigterm_is_killed_with_all_that_it_started(serve: Serve, gate: Gate, tmp_path: Path):
    with serve("--stop-s", "0.05", "app:stubborn") as server:
        server.until(lambda record: len(starts(tmp_path)) == 2)
        assert server.end()[0] == 0
    assert all(map(gone, starts(tmp_path)))


def test_nothing_is_left_behind(serve: Serve, tmp_path: Path):
    (tmp_path / "tmp").mkdir()
    with serve("app:setup", environ={"TMPDIR": str(tmp_path / "tmp")}) as server:
        server.until_state("ready")
        left = children(server.process.pid)
        assert len(left) == 1
        name = f"@fastload-serve-{server.process.pid}-"
        assert name in Path("/proc/net/unix").read_text()
        assert server.end()[0] == 0
        assert name not in Path("/proc/net/unix").read_text()
        assert all(map(gone, left))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_app_ends_with_a_supervisor_that_is_killed(serve: Serve, tmp_path: Path):
    with serve("app:setup") as server:
        server.until_state("ready")
        [pid] = starts(tmp_path)
        server.process.kill()
        assert gone(pid)


# -- model bytes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_hub(tmp_path: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    model = write_tiny_llama(tmp_path / "model", shards=1, hidden=256, vocabulary=4096)
    hub = make_hub({"org/model": model, "org/other": model})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub


def test_bytes_start_at_wake_and_the_app_joins_them(serve: Serve, gate: Gate, model_hub: Hub, tmp_path: Path):
    model_hub.script(Fault("hold", path="*.safetensors", times=None))
    with serve("--asleep", "--model", "org/model", "--cache-dir", str(tmp_path / "cache"), "app:prefetches") as server:
        assert not model_hub.requests
        server.call("POST", "/wake")
        model_hub.wait(lambda requests: any(r.held for r in requests))  # the hook still waits at the gate
        gate.open()
        record = server.until(lambda record: file_of(record, "state") == "elsewhere")  # told by the app's own load
        assert record["start"]["doing"] == "downloading"
        assert server.call("GET", "/ready").json["progress"]["total_bytes"] > 1_000_000
        model_hub.script()
        model_hub.release()
        record = server.until_state("ready")
        assert file_of(record, "state") == "verified"
        assert {"resolve", "download", "verify"} <= {row["name"] for row in record["start"]["waterfall"]}
        assert "model.safetensors" in server.predict(1).json
        size = (tmp_path / "model" / "model.safetensors").stat().st_size
        assert model_hub.bytes_sent("model.safetensors") == size
        metrics = server.call("GET", "/metrics").body.decode()
        [line] = [line for line in metrics.splitlines() if line.startswith("fastload_serve_bytes_total ")]
        assert float(line.split()[1]) > size


def test_loads_that_the_app_begins_itself_are_shown_too(serve: Serve, gate: Gate, model_hub: Hub):
    with serve("app:prefetches") as server:
        gate.open()
        record = server.until(lambda record: file_of(record, "state") == "verified")
        assert record["start"]["models"][0]["travelled_bytes"] > 1_000_000
        server.until_state("ready")


def file_of(record: dict[str, Any], key: str, path: str = "model.safetensors") -> Any:
    models = record["start"]["models"] if record["start"] else []
    return next((f[key] for m in models for f in m["files"] if f["path"] == path), None)


def test_several_models_are_fetched_in_their_order(serve: Serve, model_hub: Hub):
    model_hub.script(Fault("hold", path="*.safetensors", times=None))
    with serve("--model", "org/model", "--model", "org/other", "app:setup") as server:
        model_hub.wait(lambda requests: any(r.held for r in requests))
        assert not [r for r in model_hub.requests if "org/other" in r.path]
        assert [m["source"] for m in server.state()["start"]["models"]] == ["org/model", "org/other"]
        model_hub.script()
        model_hub.release()
        model_hub.wait(lambda requests: any("org/other" in r.path for r in requests))
        server.until_state("ready")


def test_a_download_that_fails_does_not_stop_the_app(serve: Serve, model_hub: Hub):
    with serve("--model", "org/nothing", "app:setup") as server:
        record = server.until(lambda record: record["start"] and record["start"]["models"][0]["error"])
        assert "org/nothing" in record["start"]["models"][0]["error"]
        server.until_state("ready")
        assert "org/nothing" in server.end()[1]


def test_the_transfer_ends_with_the_supervisor_and_keeps_what_landed(serve: Serve, model_hub: Hub):
    model_hub.script(Fault("hold", path="*.safetensors", after_bytes=1, times=None))
    with serve("--model", "org/model", "app:setup") as server:
        model_hub.wait(lambda requests: any(r.held for r in requests))
        left = children(server.process.pid)
        assert len(left) == 2
        assert server.end()[0] == 0
        assert all(map(gone, left))


@pytest.mark.transformers
def test_a_hook_gets_the_model_that_the_bytes_were_fetched_for(serve: Serve, hub: Hub):
    with serve("--model", "org/tiny", "--dtype", "float32", "--warmup", "0", "app:counts") as server:
        answer = server.predict(0)
        assert (answer.status, answer.json > 10_000) == (200, True)
        record = server.state()["start"]
        assert "build" in [row["name"] for row in record["waterfall"]]


# -- programs ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import http.server, json, os, sys, threading
HERE = os.path.dirname(os.path.abspath(__file__))
answers = [503]
asked = []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *rest):
        pass

    def do_GET(self):
        if self.path == "/health":
            status = answers[0]
            asked.append(status)
            if status == 503:
                open(HERE + "/gate").read()
                answers[0] = 200
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for word in (b"one", b"two"):
                self.wfile.write(b"3" + b"\\r\\n" + word + b"\\r\\n")
                self.wfile.flush()
                if word == b"one":
                    open(HERE + "/gate").read()
            self.wfile.write(b"0\\r\\n\\r\\n")
        elif self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        else:
            self.answer(b"")

    def do_POST(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while count := int(self.rfile.readline(), 16):
                body += self.rfile.read(count)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(body)

    do_HEAD = do_DELETE = do_GET

    def answer(self, body):
        record = {"method": self.command, "path": self.path, "headers": self.headers.items(), "body": body.decode(),
                  "argv": sys.argv[1:], "port": os.environ["PORT"], "health": asked}
        data = json.dumps(record).encode()
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-One", "1")
        self.send_header("X-One", "2")
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "server.py").write_text(PROGRAM)
    return ["--", sys.executable, "server.py", "{port}"]


def test_requests_reach_a_program_as_they_came(serve: Serve, program: list[str]):
    with serve(*program) as server:
        path = "/a%2Fb/../c?q=%20x&q=2"
        headers = {
            "X-Mine": "1",
            "Connection": "X-Hop",
            "X-Hop": "1",
            "Content-Encoding": "gzip",
            "X-Forwarded-For": "9.9.9.9",
        }
        answer = server.call("POST", path, b"not really gzip", headers)
        seen = answer.json
        names = {k.lower(): v for k, v in seen["headers"]}
        assert (answer.status, seen["path"], seen["body"]) == (201, path, "not really gzip")
        assert (names["x-mine"], names["content-encoding"], names["content-length"]) == ("1", "gzip", "15")
        assert "x-hop" not in names
        assert names["x-forwarded-for"] == "9.9.9.9, 127.0.0.1"
        assert names["host"] == f"127.0.0.1:{server.port}"
        assert (seen["argv"], seen["port"]) == ([seen["port"]], seen["port"])
        connection = server.connect()
        connection.request("GET", "/x")
        assert connection.getresponse().headers.get_all("X-One") == ["1", "2"]
        connection.close()
        head = server.call("HEAD", "/x")
        assert (head.status, head.body, int(head.headers["content-length"]) > 10) == (201, b"", True)
        assert server.call("DELETE", "/x").json["method"] == "DELETE"
        chunked = server.call("POST", "/x", (part for part in (b"ab", b"cd")))
        assert chunked.json["body"] == "abcd"


def test_answers_are_passed_on_as_they_come(serve: Serve, program: list[str], gate: Gate):
    with serve(*program) as server:
        connection = server.connect()
        connection.request("GET", "/stream")
        answer = connection.getresponse()
        assert answer.read1(3) == b"one"  # the program waits at the gate
        gate.open()
        assert answer.read() == b"two"
        connection.close()


def test_an_answer_that_is_cut_is_cut_for_the_client_too(serve: Serve, program: list[str]):
    import http.client

    with serve(*program) as server:
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            server.call("GET", "/cut")
        assert server.call("GET", "/x").status == 201


def test_a_program_is_ready_when_it_says_so(serve: Serve, program: list[str], gate: Gate):
    with serve("--ready-url", "/health", *program) as server:
        server.until_state("starting")
        assert server.call("GET", "/ready").status == 503
        gate.open()
        server.until_state("ready")
        assert server.call("GET", "/x").json["health"] == [503, 200]


def test_a_program_may_have_our_paths_for_itself(serve: Serve, program: list[str]):
    with serve("--prefix", "/-", *program) as server:
        assert server.url.endswith("/-/")
        server.call("POST", "/-/wake")
        assert server.call("GET", "/metrics").json["path"] == "/metrics"
        assert server.call("GET", "/").json["path"] == "/"
        assert server.call("GET", "/-/ready").status == 200
        assert b"<!DOCTYPE html>" in server.call("GET", "/-/").body


# -- our endpoints ----------------------------------------------------------------------------------------------------


def test_our_endpoints_keep_to_their_methods_and_to_themselves(serve: Serve):
    with serve("app:setup") as server:
        server.until_state("ready")
        wrong = server.call("GET", "/wake")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert server.call("POST", "/").status == 405
        for path in ("/healthz", "/", "/events"):
            assert (server.call("HEAD", path).status, server.call("HEAD", path).body) == (200, b"")
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 202), ("none", 202)):
            assert server.call("POST", "/wake", headers={"Sec-Fetch-Site": site}).status == status
        for path in ("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.html"):
            assert server.call("GET", path).status in (404, 405)
        page = server.call("GET", "/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        assert b"http://" not in page.body.replace(
            b"http://www.w3.org/2000/svg", b""
        )  # nothing is fetched from elsewhere
        assert b"https://" not in page.body


def test_metrics_are_prometheus_text(serve: Serve):
    parser = pytest.importorskip("prometheus_client.parser")

    with serve("app:setup") as server:
        server.predict(1)
        text = server.call("GET", "/metrics")
        assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = {family.name: family for family in parser.text_string_to_metric_families(text.body.decode())}
    states = {s.labels["state"]: s.value for s in families["fastload_serve_state"].samples}
    assert states == {"asleep": 0, "starting": 0, "ready": 1, "stopping": 0, "failed": 0}
    started = {(s.name, s.labels["outcome"]): s.value for s in families["fastload_serve_start_seconds"].samples}
    assert started["fastload_serve_start_seconds_count", "ok"] == 1
    assert started["fastload_serve_start_seconds_sum", "ok"] > 0
    assert [(s.labels["code"], s.value) for s in families["fastload_serve_requests"].samples] == [("200", 1)]


def test_many_live_views_are_refused(serve: Serve):
    with serve("--asleep", "app:setup") as server, contextlib.ExitStack() as stack:
        for _ in range(32):
            connection = stack.enter_context(contextlib.closing(server.connect()))
            connection.request("GET", "/events")
            assert connection.getresponse().status == 200
        assert server.call("GET", "/events").status == 503


# -- the command line -------------------------------------------------------------------------------------------------


def command(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fastload", "serve", *words], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ([], 2, "MODULE:NAME"),
        (["app:setup", "--", "true"], 2, "MODULE:NAME"),
        (["app:setup", "--port", "x"], 2, "'x' is not a port"),
        (["app:setup", "--hold-s", "-1"], 2, "'-1'"),
        (["app:setup", "--body-bytes", "5q"], 2, "64MiB"),
        (["app"], 1, "module:name"),
        (["app:setup", "--warmup", "{"], 1, "JSON"),
        (["app:setup", "--warmup", "@/no/such/file"], 1, "/no/such/file"),
        (["app:setup", "--prefix", "x"], 1, "--prefix"),
        (["app:setup", "--port-of-app", "1"], 1, "--port-of-app means nothing for a hook"),
        (["--device", "cpu", "--", "true"], 1, "--device means nothing for a program"),
        (["app:setup", "--model", "org/tiny", "--set", "conections=1"], 1, "'conections'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(words: list[str], code: int, named: str):
    got, err = command(*words)
    assert (got, named in err) == (code, True), err


def test_a_port_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, err = command("app:setup", "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "cannot be listened on" in err


def test_the_warm_up_may_stand_in_a_file(serve: Serve, tmp_path: Path):
    (tmp_path / "warm.json").write_text('"fail"')
    with serve("--warmup", "@warm.json", "app:setup") as server:
        assert "no such thing" in server.until_state("failed")["life"]["error"]["message"]


def test_ctrl_c_ends_it_like_sigterm(serve: Serve, tmp_path: Path):
    with serve("app:setup") as server:
        server.until_state("ready")
        server.process.send_signal(signal.SIGINT)
        _, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, err) == (0, "")
    assert all(map(gone, starts(tmp_path)))


def test_the_supervisor_is_light_and_the_hooks_process_imports_what_the_hook_does():
    code = "import fastload.serving.serve, fastload.serving.host, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {"torch", "numpy", "transformers", "rich"}
