"""Whatever a device does, a load ends with right tensors or with a DeviceError: never with wrong ones, and never hanging."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from arrival import Arrival  # noqa: E402
from device_weights import MIB, expected, write, wrong  # noqa: E402

from fastload.errors import DeviceError, FastloadError  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402

Start = Callable[..., Arrival]
Open = Callable[..., TensorStream]


@pytest.fixture
def arrived(start: Start) -> Arrival:
    """The whole model."""
    arrival = start()
    arrival.finish()
    return arrival


@pytest.fixture
def wide(tmp_path: Path, start: Start) -> Arrival:
    """A model of 40 MiB, whose tensors each take device memory of their own."""
    folder = tmp_path / "wide"
    write({f"{i}": torch.full((MIB,), i, dtype=torch.float32) for i in range(10)}, folder / "m.safetensors")
    arrival = start(folder=folder)
    arrival.finish()
    return arrival


def outcome(stream: TensorStream, want: dict[str, Any], dtype: Any = None) -> str:
    """Load everything; return "right", or the error's name; wrong tensors fail the test."""
    try:
        got = stream.collect()
    except FastloadError as e:
        assert isinstance(e, DeviceError), repr(e)
        return "DeviceError"
    finally:
        stream.close()
    assert not wrong(got, want, dtype)
    return "right"


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [1, 719])
def test_copy_that_is_refused_is_an_error(arrived: Arrival, open_stream: Open, fake: ModuleType, code: int) -> None:
    for n in (1, 2, 50, 102):
        with fake.settings(fail_copy_at=n, fail_code=code, fail_kind="h2d"):
            assert outcome(open_stream(arrived), expected()) == "DeviceError"
    assert outcome(open_stream(arrived), expected()) == "right"


@pytest.mark.parametrize("n", [1, 2, 50, 102])
@pytest.mark.parametrize("schedule", ["late", "timed"])
def test_copy_that_fails_later_is_an_error(
    arrived: Arrival, open_stream: Open, fake: ModuleType, n: int, schedule: str
) -> None:
    stream = open_stream(arrived)
    try:
        with fake.settings(fail_copy_async_at=n, fail_code=700, fail_kind="h2d", schedule=schedule):
            with pytest.raises(DeviceError, match="cuda:0 failed while") as caught:
                stream.collect()
            assert "restart the program" in str(caught.value)
            with pytest.raises(DeviceError):  # the same for whoever comes later
                stream.get_tensor("large")
    finally:
        fake.reset()  # else nothing can be given back
        stream.close()


def test_copy_that_fails_after_everything_was_handed_out_is_an_error_at_the_end(
    arrived: Arrival, open_stream: Open, fake: ModuleType
) -> None:
    stream = open_stream(arrived, pinned_bytes=8 * MIB)
    try:
        with fake.settings(fail_copy_async_at=100, fail_kind="h2d"):
            with fake.hold():
                list(stream)
            with pytest.raises(DeviceError):
                stream.settle()
    finally:
        fake.reset()
        stream.close()


@pytest.mark.parametrize("n", [1, 7, 60, 102])
def test_byte_that_a_copy_changed_is_found_when_copies_are_proven(
    arrived: Arrival, open_stream: Open, fake: ModuleType, n: int
) -> None:
    stream = open_stream(arrived, verify_device=True)
    with (
        fake.settings(corrupt_copy_at=n, fail_kind="h2d"),
        pytest.raises(DeviceError, match="came back from cuda:0 with other bytes"),
    ):
        stream.collect()
    assert outcome(open_stream(arrived, verify_device=True), expected()) == "right"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 60])
def test_byte_that_changed_before_a_cast_is_found_or_made_no_difference(
    arrived: Arrival, open_stream: Open, fake: ModuleType, n: int
) -> None:
    with fake.settings(corrupt_copy_at=n, fail_kind="h2d"):
        outcome(open_stream(arrived, dtype=torch.bfloat16, verify_device=True), expected(), torch.bfloat16)


def test_proof_takes_no_more_memory(arrived: Arrival, open_stream: Open, fake: ModuleType) -> None:
    assert outcome(open_stream(arrived, pinned_bytes=128 << 10, verify_device=True), expected()) == "right"
    # Both halves are pinned at once, and together they are what the setting says.
    assert fake.stat("registers") == 2
    assert fake.stat("d2h_bytes") >= fake.stat("h2d_bytes")


# -- memory -----------------------------------------------------------------------------------------------------------


def test_load_that_cannot_fit_says_so_before_it_takes_anything(
    wide: Arrival, open_stream: Open, fake: ModuleType, cuda: Any
) -> None:
    gc.collect()
    cuda.empty_cache()
    used = fake.stat("device_used")
    with fake.settings(mem=used + 30 * MIB):
        with pytest.raises(DeviceError, match=rf"cuda:0 is out of memory: the tensors need {40 * MIB} bytes") as caught:
            open_stream(wide, pinned_bytes=8 * MIB).collect()
        assert f"{30 * MIB} bytes are free" in str(caught.value)
        assert "dtype=" in str(caught.value)
    assert fake.stat("device_used") == used


def test_memory_that_runs_out_on_the_way_leaves_nothing_behind(
    wide: Arrival, open_stream: Open, fake: ModuleType, cuda: Any
) -> None:
    gc.collect()
    cuda.empty_cache()
    allocated, used = cuda.memory_allocated(), fake.stat("device_used")
    with fake.settings(oom_bytes=used + 30 * MIB):  # which the device does not tell before
        with pytest.raises(
            DeviceError, match=r"out of memory while tensor '\d' \(4194304 bytes\).* bytes are free"
        ) as e:
            open_stream(wide, pinned_bytes=8 * MIB).collect()
        assert cuda.memory_allocated() == allocated, "the error keeps half a model"
        del e
    cuda.empty_cache()
    assert fake.stat("device_used") == used


def test_stream_of_more_than_fits_works_while_tensors_are_let_go(
    wide: Arrival, open_stream: Open, fake: ModuleType, cuda: Any
) -> None:
    cuda.empty_cache()
    with fake.settings(mem=fake.stat("device_used") + 30 * MIB):
        sums = []
        for _, tensor in open_stream(wide, pinned_bytes=8 * MIB):
            sums.append(int(tensor.cpu()[MIB - 1]))
            del tensor
    assert sums == list(range(10))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_allocation_that_fails_once_is_survived_or_an_error(
    wide: Arrival, open_stream: Open, fake: ModuleType, cuda: Any, dtype: Any
) -> None:
    want = {f"{i}": torch.full((MIB,), i, dtype=torch.float32) for i in range(10)}
    for n in range(1, 50):  # every one that there is
        gc.collect()
        cuda.empty_cache()
        allocated, mallocs = cuda.memory_allocated(), fake.stat("mallocs")
        with fake.settings(malloc_fail_at=n):
            assert outcome(open_stream(wide, dtype=dtype, pinned_bytes=8 * MIB), want, dtype) in (
                "right",
                "DeviceError",
            )
        assert cuda.memory_allocated() == allocated
        if fake.stat("mallocs") - mallocs < n:
            break
    assert n > 1
    assert outcome(open_stream(wide, pinned_bytes=8 * MIB), want) == "right"


@pytest.mark.parametrize("after_mib", [0, 5, 17, 39])
def test_device_that_fills_up_says_what_was_needed_and_free_and_keeps_nothing(
    wide: Arrival, open_stream: Open, fake: ModuleType, cuda: Any, after_mib: int
) -> None:
    gc.collect()
    cuda.empty_cache()
    allocated, used = cuda.memory_allocated(), fake.stat("device_used")
    for read in (TensorStream.collect, lambda stream: list(stream)):
        stream = open_stream(wide, pinned_bytes=8 * MIB)
        with fake.settings(oom_bytes=used + after_mib * MIB), pytest.raises(DeviceError) as caught:
            read(stream)
        stream.close()
        assert re.search(
            r"\(4194304 bytes\)( and \d+ more)? of m\.safetensors .*; \d+ bytes are free", str(caught.value)
        )
        gc.collect()
        assert cuda.memory_allocated() == allocated, "the error keeps half a model"
    cuda.empty_cache()
    assert fake.stat("device_used") == used


def test_host_memory_that_is_not_there_is_an_error_that_says_so(arrived: Arrival, open_stream: Open) -> None:
    with pytest.raises(DeviceError, match=rf"no {1 << 50} bytes for copies to cuda:0") as caught:
        open_stream(arrived, pinned_bytes=1 << 50).collect()
    assert "pinned_bytes" in str(caught.value)


@pytest.mark.parametrize("limit", [0, 100_000])
def test_host_memory_that_cannot_be_locked_is_no_error(
    arrived: Arrival, open_stream: Open, fake: ModuleType, limit: int
) -> None:
    with fake.settings(register_limit=limit, host_limit=0):  # torch's own page-locked memory is refused too
        for pinned_bytes in (64 << 10, 512 << 10):
            stream = open_stream(arrived, pinned_bytes=pinned_bytes, verify_device=True)
            assert outcome(stream, expected()) == "right"
