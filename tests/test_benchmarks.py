"""The benchmarks and the demo: what they claim to measure, they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from testbed import nginx_process

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def checkout_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)


@pytest.mark.nginx
def test_a_quick_case_measures_everybody_and_writes_a_table(tmp_path: Path):
    if reason := nginx_process.missing():
        pytest.skip(reason)
    done = run("benchmarks", "--quick", "fetch_llama", "--out", str(tmp_path / "out"), FASTLOAD_TESTBED=str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, *records = map(json.loads, (tmp_path / "out/fetch_llama.jsonl").read_text().splitlines())
    present = {name for name, about in header["rivals"].items() if not about["skipped"]}
    assert {"fastload_prefetch", "snapshot_download"} <= present
    assert sorted((r["rival"], r["repeat"]) for r in records) == sorted((n, i) for n in present for i in range(2))
    for record in records:
        assert record["received_bytes"] >= header["model"]["bytes"]
        assert 0 < record["ready_s"] <= record["wall_s"] <= record["gone_s"]
    table = (tmp_path / "out/fetch_llama.md").read_text()
    assert "| fastload.prefetch | sha256 |" in table and "| snapshot_download | size |" in table
    assert not list((tmp_path / "runs").iterdir()), "caches are deleted"


def test_results_name_neither_the_machine_nor_its_folders(tmp_path: Path):
    done = run("benchmarks", "import", "--repeats", "1", "--out", str(tmp_path / "out"), FASTLOAD_TESTBED=str(tmp_path))
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    for name in (os.uname().nodename, str(ROOT), str(tmp_path), sys.prefix):
        assert name not in written


def test_processes_that_outlive_the_command_are_waited_for_and_counted(tmp_path: Path):
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    leave = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    record = tmp_path / "record.json"
    done = run("benchmarks.supervise", str(record), sys.executable, "-c", leave)
    assert done.returncode == 0, done.stderr
    taken = json.loads(record.read_text())
    assert taken["user_s"] + taken["system_s"] >= 0.5
    assert taken["gone_s"] > taken["wall_s"]


def test_ratios_are_taken_round_by_round():
    from benchmarks.results import Results

    rivals = {name: {"title": name, "verifies": "", "reference": False, "skipped": None} for name in ("ours", "theirs")}
    seconds = {"ours": [1.0, 2.0, 3.0], "theirs": [2.0, 20.0, 3.0]}
    runs = {name: [{"ready_s": s} for s in values] for name, values in seconds.items()}
    ratio = Results({"case": "x", "rivals": rivals, "model": None}, runs).ratio("theirs")
    assert (ratio.median, ratio.least, ratio.most) == (0.5, 0.1, 1.0)


SIDE: dict[str, Any] = {
    "class": "BertModel", "total_s": 2.0, "tensors": {"w": ["named_parameters", "torch.float32", "[2]", "aa"]},
    "embedding": [[0.5]],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"class": "BertForMaskedLM"},
        {"tensors": {"w": ["named_parameters", "torch.float32", "[2]", "ab"]}},
        {"tensors": {"w": ["named_parameters", "torch.float16", "[2]", "aa"]}},
        {"tensors": {**SIDE["tensors"], "v": SIDE["tensors"]["w"]}},
        {"embedding": [[0.5000001]]},
    ],
)
def test_the_demo_fails_when_anything_differs(change: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    from benchmarks.demo import judge

    assert judge(SIDE, {**SIDE, "total_s": 1.0}) == 0
    assert "2.00 times as fast" in capsys.readouterr().out
    assert judge(SIDE, {**SIDE, **change}) == 1
    assert "FAILED" in capsys.readouterr().out
