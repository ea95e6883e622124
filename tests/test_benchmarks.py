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


@pytest.mark.nginx
def test_a_case_that_starts_with_the_call_leaves_the_imports_out_and_knows_its_floor(tmp_path: Path):
    pytest.importorskip("torch")
    if reason := nginx_process.missing():
        pytest.skip(reason)
    words = ("--quick", "floor_single", "--repeats", "1", "--out", str(tmp_path / "out"))
    done = run("benchmarks", *words, FASTLOAD_TESTBED=str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, *records = map(json.loads, (tmp_path / "out/floor_single.jsonl").read_text().splitlines())
    assert header["memory"] == "as-is" and header["link"]["congestion"]
    by_rival = {record["rival"]: record for record in records}
    for name in ("floor_receive", "floor_hash", "floor_write"):
        assert by_rival[name]["stage_s"] > 0 and by_rival[name]["stage_cpu_s"] >= 0
    assert by_rival["fastload_tensors"]["sums"]
    assert by_rival["fastload_tensors"]["api_requests"] == 1
    alone = by_rival["imports_torch"]
    assert alone["ready_s"] < alone["wall_s"] and alone["started_cpu_s"] > 0, "torch was imported before the clock"
    page = (tmp_path / "out/floor_single.md").read_text()
    assert "The floor: " in page and "| *sha256 alone* |" in page
    assert "| B |" in (tmp_path / "out/README.md").read_text()


def results(metric: str = "ready_s", cores: int = 2, **seconds: list[float]) -> Any:
    """Return made records of a case of 1 GB, the first rival ours; names with floor in them are references."""
    from benchmarks.records import Results

    rivals = {
        name: {"title": name, "verifies": "", "reference": "floor" in name, "imports": False, "skipped": None}
        for name in seconds
    }
    header = {
        "case": "x", "rivals": rivals, "model": {"bytes": 10**9}, "metric": metric, "clock": "process",
        "facts": {"cores": cores},
    }  # fmt: skip
    runs = {name: [{"rival": name, metric: s} for s in values] for name, values in seconds.items()}
    return Results(header, runs)


def test_ratios_are_taken_round_by_round():
    ratio = results(fastload=[1.0, 2.0, 3.0], theirs=[2.0, 20.0, 3.0]).ratio("theirs")
    assert (ratio.median, ratio.least, ratio.most) == (0.5, 0.1, 1.0)


def test_the_page_names_whoever_is_faster():
    from benchmarks.results import _winners

    found = list(_winners(results(fastload_a=[2.0], slow=[3.0], fast=[1.0], a_floor=[0.1], fastload_b=[1.0])))
    assert found == ["**Faster than fastload here: fast.**"]


def test_a_goal_is_measured_against_the_fastest_other_way():
    from benchmarks.reach import of_the_fastest

    assert of_the_fastest(results(fastload=[2.0], slow=[4.0], fast=[1.0], a_floor=[0.1])) == 2.0
    assert of_the_fastest(results(fastload=[2.0], a_floor=[0.1])) is None


def test_a_cold_start_is_measured_against_the_slower_of_its_parts_round_by_round():
    from benchmarks.reach import first_weight_s, of_the_slower_part

    made = results(
        fastload_exec=[4.4, 9.0, 11.0], fastload_start=[5.0, 9.9, 12.0],
        fastload_hot=[5.0, 4.0, 4.0], from_pretrained_hot=[4.0, 5.0, 4.0], curl=[1.0, 3.0, 10.0],
    )  # fmt: skip
    for name, first_s in (("fastload_exec", 0.3), ("fastload_start", 0.2)):
        for record in made.runs[name]:
            record["first_weight_s"] = first_s
    assert of_the_slower_part(made) == pytest.approx(1.1)  # of 1.1, 2.25 and 1.1
    assert first_weight_s(made) == 0.3, "of the one whose time is told"
    assert of_the_slower_part(results(fastload_exec=[1.0], curl=[1.0])) is None
    assert first_weight_s(results(fastload_exec=[1.0], curl=[1.0])) is None


def test_the_floor_is_all_cores_busy_or_one_file_on_one_core():
    from benchmarks.reach import floor_cpu_s, floor_s

    def floor(hash_s: float) -> Any:
        made = results(fastload=[1.0], floor_receive=[1.0], floor_hash=[1.0], floor_write=[1.0])
        for name, seconds, cpu_s in (("receive", 0.1, 0.23), ("hash", hash_s, 0.72), ("write", 0.1, 0.25)):
            made.runs[f"floor_{name}"][0] |= {"stage_s": seconds, "stage_cpu_s": cpu_s, "server_cpu_s": 0.08}
        return made

    assert floor_cpu_s(floor(0.4)) == pytest.approx(1.2)
    assert floor_s(floor(0.4)) == pytest.approx(1.28 / 2)
    assert floor_s(floor(0.72)) == 0.72


def test_times_count_from_the_call_where_the_clock_starts_there():
    from benchmarks.runs import _record

    taken = {"spawned_s": 10.0, "wall_s": 9.0, "gone_s": 9.5}
    record, started_s = _record(dict(taken), {"started_s": 13.0, "ready_s": 15.0, "verified_s": 14.0})
    assert started_s == 13.0
    assert {name: record[name] for name in ("ready_s", "cached_s", "wall_s", "gone_s")} == {
        "ready_s": 2.0, "cached_s": 1.0, "wall_s": 6.0, "gone_s": 6.5,
    }  # fmt: skip
    record, _ = _record(dict(taken), {"ready_s": 15.0})
    assert (record["ready_s"], record["cached_s"]) == (5.0, 5.0)


def test_every_rival_of_every_case_has_a_recipe_and_every_case_stands_in_the_readme():
    from benchmarks.cases import CASES
    from benchmarks.rivals import find

    text = (ROOT / "benchmarks/README.md").read_text()
    used = {name for case in CASES for name in case.rivals}
    for case in CASES:
        assert f"`{case.name}`" in text
    for name in used:
        rival = find(name)
        assert rival.title and (hasattr(rival.module, "run") or hasattr(rival.module, "command")), name
        assert rival.reference or rival.verifies or name in ("fastload_import",), name
    there = {path.stem for path in (ROOT / "benchmarks/rivals").glob("*.py")} - {"__init__"}
    assert there == used


def test_a_network_of_its_own_is_left_again():
    from benchmarks import link

    before = os.stat("/proc/thread-self/ns/net").st_ino
    with link.opened(10**8) as opened:
        inside = os.stat("/proc/thread-self/ns/net").st_ino
        assert (inside != before) == opened.own
        assert opened.own or opened.lacking
    assert os.stat("/proc/thread-self/ns/net").st_ino == before


def test_files_are_dropped_from_the_page_cache_and_read_again(tmp_path: Path):
    from benchmarks import memory

    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    memory.drop([file])
    if memory.resident_share([file]) == 1:
        pytest.skip("a file system in memory drops nothing")
    assert memory.resident_share([file]) < 0.1
    memory.read([file])
    assert memory.resident_share([file]) == 1


def test_a_full_page_cache_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from benchmarks import memory

    monkeypatch.setattr(memory, "FREE_BYTES", 1 << 50)  # it is full enough
    with memory.state("resident", tmp_path / "runs", 0) as settle:
        settle()
        assert len(list((tmp_path / "runs").iterdir())) == 2
    assert not list((tmp_path / "runs").iterdir())


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


def test_rows_say_what_was_reached_and_what_was_not():
    from benchmarks.rows import render

    record = {
        "row": "llama", "repeat": 0, "memory": "resident", "load_average": 0.0,
        "plain": {"load_s": 0.5, "touch_s": 0.5, "result_bytes": 100, "zero_copy_bytes": 100},
        "fastload": {"tail_s": 0.04, "bytes": 200e6, "files": 3, "ranges": 10, "requests": 15, "warm_requests": 0,
                     "result_bytes": 100, "zero_copy_bytes": 100, "after_last": {"write.finished": 0.001}},
    }  # fmt: skip
    moe = {**record, "row": "qwen3-moe", "plain": {**record["plain"], "zero_copy_bytes": 10}}
    moe["fastload"] = {**record["fastload"], "zero_copy_bytes": 9, "tail_s": 0.06, "requests": 16, "warm_requests": 1}
    llama, experts = [line for line in render([record, moe], {}).splitlines() if line.startswith("| transformers")]
    assert "| 8% [4%] | reached | 100.0% (100.0%) | reached | 15 (15) | reached | 0 | reached |" in llama
    assert "| 12% [6%] | **not reached** | 9.0% (10.0%) | **not reached** | 16 (15) | **not reached** | 1 |" in experts


def test_a_quick_row_loads_the_same_model_both_ways(tmp_path: Path):
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    words = ("--quick", "gguf", "--repeats", "1", "--out", str(tmp_path / "out"))
    done = run("benchmarks.rows", *words, FASTLOAD_TESTBED=str(tmp_path))
    assert done.returncode == 0, done.stderr
    header, record = map(json.loads, (tmp_path / "out/rows.jsonl").read_text().splitlines())
    assert header["facts"]["cores"] and record["row"] == "gguf"
    ours = record["fastload"]
    assert 0 < ours["tail_s"] < ours["load_s"] and ours["zero_copy_bytes"] < ours["result_bytes"]
    assert ours["requests"] == ours["told_requests"] <= 2 + ours["files"] + ours["ranges"]
    assert ours["warm_requests"] == 0
    assert "| GGUF, Q8_0 dequantised |" in (tmp_path / "out/rows.md").read_text()
    assert not list((tmp_path / "runs").iterdir()), "caches are deleted"
