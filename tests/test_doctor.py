"""The doctor: what it concludes from rates, what it finds broken, and that it leaves everything as it was."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastload import cli, doctor, plugins
from fastload.doctor import Cost, Rates, Weights, checks, estimate, limits, rates
from fastload.doctor.rates import DeviceRates
from fastload.settings import Settings
from fastload.testing import Hub

#: Two cores of this project's machine, when it is quiet.
MACHINE = Rates(
    cores=2,
    sha256=Cost(1.4e9, 0.72),
    sha256_bytes_per_s=2.5e9,
    receive=Cost(4e9, 0.23),
    new_pages=Cost(2.6e9, 0.34),
    write=Cost(4e9, 0.25),
    disk_write_bytes_per_s=1e9,
    disk_read_bytes_per_s=1.5e9,
    child_start_s=0.3,
    device=None,
)
FIVE = Weights("org/model", 2 * 10**9, 5, 4 * 10**8)


@pytest.fixture(autouse=True)
def no_foreign_proxy_or_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))


def advice(weights: Weights, machine: Rates, **options: Any) -> str:
    return "\n".join(estimate(weights, machine, **options).advice)


# -- what it concludes ------------------------------------------------------------------------------------------------


def test_a_slow_link_is_what_a_load_waits_for():
    found = estimate(FIVE, MACHINE, link_bytes_per_s=250e6, round_trip_s=0.02)
    assert found.bound == "link"
    assert found.seconds == pytest.approx(8.0 + 0.3 + 0.06)


def test_on_a_fast_link_the_processor_is_and_the_break_even_says_how_fast():
    found = estimate(FIVE, MACHINE, link_bytes_per_s=10e9, tls=False)
    assert found.bound == "processor"
    processor_s = 2 * (0.23 * 1.35 + 0.72 + 0.25) / 2
    assert found.seconds == pytest.approx(processor_s + 0.3)
    assert found.break_even_bytes_per_s == pytest.approx(2e9 / processor_s)


def test_tls_takes_processor_time_of_its_own():
    plain, tls = (estimate(FIVE, MACHINE, tls=on).seconds for on in (False, True))
    assert tls - plain == pytest.approx(2 * 0.9 * 0.72 / 2)


def test_one_file_is_bound_by_the_core_that_hashes_it():
    many = replace(MACHINE, cores=16, sha256_bytes_per_s=20e9)
    found = estimate(Weights("org/model", 10**10, 1, 10**10), many, tls=False)
    assert found.bound == "sha256"
    assert found.seconds == pytest.approx(10 / 1.4 + 0.3)
    assert "several shards" in found.advice[0]


def test_the_largest_file_bounds_a_load_of_several():
    many = replace(MACHINE, cores=16, sha256_bytes_per_s=20e9)
    found = estimate(Weights("org/model", 10**10, 5, 8 * 10**9), many, tls=False, shards=5)
    assert (found.bound, found.seconds) == ("sha256", pytest.approx(8 / 1.4 + 0.3))


def test_more_cores_than_files_in_flight_is_told():
    many = replace(MACHINE, cores=16, sha256_bytes_per_s=20e9)
    assert "shards=5" in advice(FIVE, many, tls=False, shards=2)
    assert "shards=" not in advice(FIVE, many, tls=False, shards=5)


def test_a_load_waits_for_the_disk_only_above_what_the_kernel_keeps():
    slow = replace(MACHINE, disk_write_bytes_per_s=100e6)
    assert estimate(FIVE, slow, tls=False).bound == "processor"
    found = estimate(FIVE, slow, tls=False, dirty_bytes=10**9)
    assert (found.bound, found.seconds) == ("disk", pytest.approx(10.3))


def test_a_device_is_a_stage():
    found = estimate(FIVE, replace(MACHINE, device=DeviceRates("a device", Cost(1e10, 0.1), 0.5e9)), tls=False)
    assert (found.bound, found.seconds) == ("device", pytest.approx(4.3))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"write": Cost(4e8, 2.4)}, "gives free memory back to its host"),
        ({"new_pages": Cost(4e8, 2.4)}, "gives free memory back to its host"),
        ({"sha256": Cost(0.4e9, 2.5)}, "SHA instructions"),
        ({"sha256": Cost(0.3e9, 0.72)}, "when this machine is quiet"),
        ({"child_start_s": 4.0}, "slow or a network disk"),
    ],
)
def test_what_is_wrong_with_the_machine_is_told(change: dict[str, Any], word: str):
    assert word in advice(FIVE, replace(MACHINE, **change), gives_free_pages_back=True)
    assert word not in advice(FIVE, MACHINE, gives_free_pages_back=True)


def test_a_folder_that_cannot_be_measured_leaves_the_rest():
    found = estimate(
        FIVE, replace(MACHINE, write=None, disk_write_bytes_per_s=None, disk_read_bytes_per_s=None), tls=False
    )
    assert (found.bound, found.cached_s) == ("processor", None)


# -- what it measures -------------------------------------------------------------------------------------------------


def test_measuring_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HASH_BYTES", "MEMORY_BYTES", "FILE_BYTES", "WIRE_BYTES"):
        monkeypatch.setattr(rates, name, 16 << 20)
    open_before = os.listdir("/proc/self/fd")
    found = rates.measure(tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(os.listdir("/proc/self/fd")) == len(open_before)
    assert found.write is not None and found.disk_write_bytes_per_s and found.disk_read_bytes_per_s
    for cost in (found.sha256, found.receive, found.new_pages, found.write):
        assert cost.bytes_per_s > 0 and cost.cpu_s_per_gb >= 0
    assert found.child_start_s > 0


def test_where_nothing_can_be_written_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch):
    for name in ("HASH_BYTES", "MEMORY_BYTES", "WIRE_BYTES"):
        monkeypatch.setattr(rates, name, 8 << 20)
    found = rates.measure(Path("/proc"))
    assert (found.write, found.disk_write_bytes_per_s, found.disk_read_bytes_per_s) == (None, None, None)


def test_a_driver_without_a_device_torch_can_use_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(rates, "DEVICE_NODES", (tmp_path,))
    assert rates._device() is None


def test_a_quota_and_a_limit_of_the_cgroup_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    assert limits.cores() == len(os.sched_getaffinity(0))
    assert limits.memory_limit_bytes() is None
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    if not limits._text(Path("/proc/self/cgroup")):
        pytest.skip("this kernel has no cgroups")
    assert limits.cores() == 0.5
    assert limits.memory_limit_bytes() == 1 << 30


# -- what it finds broken ---------------------------------------------------------------------------------------------


def states(found: Any) -> dict[str, str]:
    return {check.name: check.state for check in found}


@pytest.mark.parametrize("place", ["/proc/cache", "file/cache"])
def test_a_cache_that_cannot_be_made_is_broken(place: str, tmp_path: Path):
    (tmp_path / "file").touch()
    settings = Settings.resolve({"cache_dir": tmp_path / place}, environ={})
    [found] = checks.cache(settings, 0)
    assert (found.name, found.state) == ("cache folder", "broken")
    assert "HF_HUB_CACHE" in found.hint


def test_a_sound_cache_is_told_so_and_left_alone(tmp_path: Path):
    settings = Settings.resolve({"cache_dir": tmp_path / "not/yet"}, environ={})
    found = states(checks.cache(settings, 1000))
    assert {name: found[name] for name in ("cache folder", "free space", "locks", "symbolic links")} == dict.fromkeys(
        ("cache folder", "free space", "locks", "symbolic links"), "ok"
    )
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_broken(tmp_path: Path):
    settings = Settings.resolve({"cache_dir": tmp_path}, environ={})
    assert states(checks.cache(settings, 1 << 60))["free space"] == "broken"


def test_a_filesystem_without_locks_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert states(checks.cache(Settings.resolve({"cache_dir": tmp_path}, environ={}), 0))["locks"] == "broken"


def test_locks_that_lock_nobody_out_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    assert states(checks.cache(Settings.resolve({"cache_dir": tmp_path}, environ={}), 0))["locks"] == "broken"


def test_the_filesystem_is_that_of_the_nearest_mount(tmp_path: Path):
    above, here = tmp_path.resolve().parent, tmp_path.resolve()
    mounts = f"a / ext4 rw 0 0\nb {here} nfs4 rw 0 0\nc {above} overlay rw 0 0\nd {here}x tmpfs rw 0 0\n"
    assert checks.filesystem(tmp_path, mounts) == "nfs4"
    assert checks.filesystem(above, mounts) == "overlay"


def test_a_proxy_that_cannot_be_used_is_broken_and_no_password_is_shown(monkeypatch: pytest.MonkeyPatch):
    settings = Settings.resolve(environ={})
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example:3128")
    [found] = checks.network_settings(settings)
    assert (found.state, found.text) == ("ok", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "huggingface.co")
    [found] = checks.network_settings(settings)
    assert (found.state, found.text) == ("ok", "none for huggingface.co (there are some for https)")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTPS_PROXY", "socks5://user:secret@proxy.example:1080")
    [found] = checks.network_settings(settings)
    assert found.state == "broken" and "secret" not in found.text


def test_certificates_that_cannot_be_read_are_broken(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("nothing")
    settings = Settings.resolve({"ca_file": tmp_path / "ca.pem"}, environ={})
    assert states(checks.network_settings(settings))["certificates"] == "broken"


def test_a_broken_plugin_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plugins, "_made", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    info = tmp_path / "fastload_test_ill-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-ill\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fastload]\nill = fastload_test_ill\n")
    [found] = [c for c in checks.plugin_states(Settings.resolve(environ={})) if c.state == "broken"]
    assert "ill (plugin-ill)" in found.text


def test_a_token_is_told_of_and_never_shown(tmp_path: Path):
    assert checks.token(Settings.resolve({"token_path": tmp_path / "none"}, environ={})).state == "note"
    found = checks.token(Settings.resolve(environ={"HF_TOKEN": "hf_secret"}))
    assert (found.state, found.text) == ("ok", "from HF_TOKEN")


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is measured: these tests ask what is said, not how fast this machine is."""
    for name in ("HASH_BYTES", "MEMORY_BYTES", "FILE_BYTES", "WIRE_BYTES"):
        monkeypatch.setattr(rates, name, 8 << 20)


@pytest.mark.usefixtures("small")
def test_the_command_names_what_bounds_a_load_with_one_request(hub: Hub, capsys: pytest.CaptureFixture[str]):
    before = len(hub.requests)
    assert cli.main(["doctor", "org/tiny", "--link", "1MB/s"]) == 0
    out = capsys.readouterr().out
    assert "bound by: link" in out
    assert "1 MB/s, as you said" in out
    assert hub.commit("org/tiny") in out
    assert len(hub.requests) - before == 1


@pytest.mark.usefixtures("small")
def test_the_command_prints_one_json_document(hub: Hub, capsys: pytest.CaptureFixture[str], tiny_model: Path):
    assert cli.main(["doctor", "org/tiny", "--json", "--link", "8Mbit/s"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["estimate"]["bound"] == "link"
    assert found["weights"]["total_bytes"] > sum(f.stat().st_size for f in tiny_model.glob("*.safetensors"))
    link = next(stage for stage in found["estimate"]["stages"] if stage["name"] == "link")
    assert link["seconds"] == pytest.approx(found["weights"]["total_bytes"] / 1e6)


@pytest.mark.usefixtures("small", "hub")
def test_what_is_in_the_cache_is_told(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["prefetch", "org/tiny", "--quiet"]) == 0
    assert cli.main(["doctor", "org/tiny", "--json"]) == 0
    _, _, text = capsys.readouterr().out.partition("{")
    weights = json.loads("{" + text)["weights"]
    assert weights["cached_bytes"] == weights["total_bytes"] > 0


@pytest.mark.usefixtures("small")
def test_a_folder_travels_nowhere(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["doctor", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    assert "nothing travels" in out and "all of it is on this machine already" in out


@pytest.mark.usefixtures("small")
def test_a_model_that_the_hub_lacks_is_broken_and_the_rest_is_still_told(hub: Hub, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "org/none"]) == 1
    out = capsys.readouterr().out
    assert "broken  hub: " in out and "org/none" in out
    assert "bound by: " in out


@pytest.mark.usefixtures("small")
def test_without_a_model_any_answer_of_the_hub_will_do(hub: Hub, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"ok      hub: {hub.endpoint} answers" in out
    assert "10 GB in five files, for example" in out


@pytest.mark.usefixtures("small")
def test_a_hub_that_is_out_of_reach_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["doctor"]) == 1
    assert "broken  hub: http://127.0.0.1:9" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["10", "fast", "-3MB/s", "0MB/s", "1.2.3MB/s"])
def test_a_link_that_is_no_rate_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", f"--link={text}"])
    assert ended.value.code == 2
    assert "250MB/s" in capsys.readouterr().err


@pytest.mark.usefixtures("hub")
def test_too_few_open_files_are_broken():
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\n"
        "from fastload import cli\n"
        "sys.exit(cli.main(['doctor', 'org/tiny', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    [broken] = [check for check in json.loads(done.stdout)["checks"] if check["state"] == "broken"]
    assert (broken["name"], broken["text"]) == ("open files", "100 allowed")


@pytest.mark.usefixtures("hub", "small")
def test_it_runs_under_a_running_event_loop():
    async def main() -> doctor.Examination:
        return doctor.examine("org/tiny")

    assert asyncio.run(main()).ok
