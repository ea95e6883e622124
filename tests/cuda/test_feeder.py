"""Tensors come to the device as their bytes land: right ones, each in memory of its own, ready on the reader's stream."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from arrival import Arrival, demanded  # noqa: E402
from device_weights import KIB, MIB, PINNED_BYTES, bits, expected, model, write, wrong  # noqa: E402

from fastload import pinned  # noqa: E402
from fastload.copies import SLOTS  # noqa: E402
from fastload.errors import DeviceError, DownloadError, FastloadError, FormatError, IntegrityError  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402

Start = Callable[..., Arrival]
Open = Callable[..., TensorStream]


def complete(start: Start, **options: Any) -> Arrival:
    arrival = start(**options)
    arrival.finish()
    return arrival


# -- right tensors ----------------------------------------------------------------------------------------------------


def test_all_types_and_sizes_come_out_bit_for_bit(start: Start, open_stream: Open) -> None:
    got = open_stream(complete(start)).collect()
    assert list(got) == list(expected())
    assert not wrong(got, expected())
    assert {str(tensor.device) for tensor in got.values()} == {"cuda:0"}


def test_no_kernel_is_needed(start: Start, open_stream: Open, fake: ModuleType) -> None:
    with fake.settings(kernels="error"):
        got = open_stream(complete(start)).collect()
        assert fake.stat("launches") == 0
    assert not wrong(got, expected())


@pytest.mark.parametrize("seed", range(5))
def test_right_whatever_the_order_in_time(start: Start, open_stream: Open, fake: ModuleType, seed: int) -> None:
    with fake.settings(schedule="timed", jitter_us=2000, latency_us=100, seed=seed):
        got = open_stream(complete(start), torch.device("cuda")).collect()
    assert not wrong(got, expected())


def test_each_tensor_has_memory_of_its_own(start: Start, open_stream: Open) -> None:
    got = open_stream(complete(start)).collect()
    assert all(t.untyped_storage().nbytes() == t.nbytes and not t.storage_offset() for t in got.values())
    assert len({t.data_ptr() for t in got.values() if t.numel()}) == sum(t.numel() > 0 for t in got.values())


def test_order_of_a_stream_is_that_of_the_files_and_tensors_may_be_kept(start: Start, open_stream: Open) -> None:
    kept = list(open_stream(complete(start)))
    assert [name for name, _ in kept] == list(expected())
    assert not wrong(dict(kept), expected())


def test_one_tensor_at_a_time_twice_the_same_gives_two(start: Start, open_stream: Open) -> None:
    stream = open_stream(complete(start))
    first, second = stream.get_tensor("large"), stream.get_tensor("large")
    assert first.data_ptr() != second.data_ptr()
    assert bits(first) == bits(second) == bits(model()["large"])


def test_slices_come_whole_or_in_rows(start: Start, open_stream: Open) -> None:
    part = open_stream(complete(start)).get_slice("large")
    assert part.get_shape() == [60, 500]
    assert bits(part[...]) == bits(model()["large"])
    assert bits(part[3:5]) == bits(model()["large"][3:5])
    assert part[3:5].is_cuda


def test_two_devices_are_fed_by_one_load(start: Start, open_stream: Open, cuda: Any) -> None:
    if cuda.device_count() < 2:
        pytest.skip("needs two devices")
    arrival = complete(start)
    got = [open_stream(arrival, f"cuda:{i}").collect() for i in (1, 0)]
    assert not wrong(got[0], expected())
    assert not wrong(got[1], expected())
    assert [str(g["large"].device) for g in got] == ["cuda:1", "cuda:0"]


def test_current_device_is_what_cuda_means(start: Start, open_stream: Open, cuda: Any) -> None:
    if cuda.device_count() < 2:
        pytest.skip("needs two devices")
    with cuda.device(1):
        assert str(open_stream(complete(start)).get_tensor("large").device) == "cuda:1"


def test_missing_device_is_an_error_of_ours(start: Start, open_stream: Open) -> None:
    with pytest.raises(DeviceError, match="cuda:77"):
        open_stream(complete(start), "cuda:77").get_tensor("large")


# -- casts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", ["emulate", "error"])
def test_floating_tensors_are_cast_by_the_device_or_by_the_host(
    start: Start, open_stream: Open, fake: ModuleType, dtype: Any, kernels: str
) -> None:
    with fake.settings(kernels=kernels):
        got = open_stream(complete(start), dtype=dtype, verify_device=True).collect()
    assert not wrong(got, expected(), dtype)


def test_cast_without_a_kernel_on_the_device_is_done_by_the_host(
    start: Start, open_stream: Open, fake: ModuleType
) -> None:
    got = open_stream(complete(start), dtype="float8_e5m2").collect()  # one that the emulation does not have
    assert not wrong(got, expected(), torch.float8_e5m2)


def test_launch_after_a_refused_cast_works(start: Start, open_stream: Open, fake: ModuleType) -> None:
    open_stream(complete(start), dtype="float8_e5m2").collect()
    assert torch.zeros(3, device="cuda").cpu().tolist() == [0, 0, 0]


# -- while bytes arrive -----------------------------------------------------------------------------------------------


def test_tensor_comes_when_its_own_bytes_are_there(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    arrival.land_head("a.safetensors")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.get_tensor, "float16")
        span = stream.info("float16").span
        assert span.start <= demanded(arrival, "a.safetensors") < span.stop
        arrival.land("a.safetensors", span.start, span.stop)
        assert bits(waiting.result()) == bits(model()["float16"])


def test_stream_gives_what_has_landed_while_the_rest_has_not(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    arrival.land_head("a.safetensors")
    large = stream.info("large").span
    arrival.land("a.safetensors", 0, large.stop)
    weights = iter(stream)
    got = dict([next(weights), next(weights)])
    assert not wrong(got, {name: model()[name] for name in ("odd", "large")})
    arrival.finish()
    got.update(weights)
    assert not wrong(got, expected())


def test_later_file_may_land_first(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    for name in arrival.weights:
        arrival.land_head(name)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.collect)
        arrival.land("b.safetensors")
        demanded(arrival, "a.safetensors")
        arrival.finish()
        assert not wrong(waiting.result(), expected())


def test_copies_begin_with_the_first_head_and_not_with_the_last(
    start: Start, open_stream: Open, fake: ModuleType
) -> None:
    arrival = start()
    stream = open_stream(arrival)
    copied: list[Any] = []
    arrival.transfer.events.add(lambda event: copied.append(event) if event.name == "copy.finished" else None)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.collect)
        arrival.land("a.safetensors")
        while sum(event.data["bytes"] for event in copied) < sum(t.nbytes for t in model().values()):
            assert not waiting.done()
        assert demanded(arrival, "b.safetensors") == 0  # nobody has seen its head
        arrival.finish()
        assert not wrong(waiting.result(), expected())


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
def test_bytes_of_whole_ranges_go_to_the_device_without_those_of_the_next(
    start: Start, open_stream: Open, tmp_path: Path, dtype: Any
) -> None:
    folder, block = tmp_path / "ranges", 64 * KIB
    tensors = {f"{i}": torch.full((50_000 + i,), i, dtype=torch.float32) for i in range(6)}
    tensors["0"] = torch.full((25_000,), 0.5, dtype=torch.float64)
    write(tensors, folder / "m.safetensors")
    arrival = start(folder=folder)
    stream = open_stream(arrival, dtype=dtype, pinned_bytes=SLOTS * block)
    copied: list[int] = []
    arrival.transfer.events.add(lambda e: copied.append(e.data["bytes"]) if e.name == "copy.finished" else None)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.collect)
        arrival.land_head("m.safetensors")
        first = stream.info("0").span.start
        for stop in range(block, 9 * block, block):
            arrival.land("m.safetensors", stop - block, stop)
            while sum(copied) < stop - first - 128:  # what is cast at once may stand across the end
                assert not waiting.done()
        arrival.finish()
        assert not wrong(waiting.result(), tensors, dtype)


def test_file_whose_head_comes_first_goes_first(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    copied: list[str] = []
    arrival.transfer.events.add(lambda e: copied.append(e.file or "") if e.name == "copy.finished" else None)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.collect)
        arrival.land("b.safetensors")
        while "b.safetensors" not in copied:
            assert not waiting.done()
        arrival.finish()
        assert list(waiting.result()) == list(expected())
    assert "a.safetensors" in copied


def test_transfer_that_fails_before_a_head_has_landed_ends_the_thread(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.collect)
        arrival.land("a.safetensors")
        demanded(arrival, "b.safetensors")
        arrival.fail(DownloadError("the line is cut"))
        with pytest.raises(DownloadError, match="the line is cut"):
            waiting.result()
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]


def test_closing_does_not_wait_for_heads(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    feeder = stream._supply.feeder
    feeder.bring(stream._files.values(), torch.device("cuda", 0), None)
    assert [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]
    stream.settle()  # what nobody has asked for is not waited for either
    assert not [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]
    feeder.bring(stream._files.values(), torch.device("cuda", 0), None)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]


def test_file_that_nobody_wants_any_more_when_its_head_is_read_is_let_go(
    start: Start, open_stream: Open, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrival = start()
    arrival.land_head("a.safetensors")  # its other bytes will not come
    stream = open_stream(arrival)
    feeder, before = stream._supply.feeder, cuda.memory_allocated()
    allocate, allocated = feeder._copies.allocate, threading.Event()

    def allocate_late(*arguments: Any) -> None:
        allocate(*arguments)
        with feeder._changed:
            feeder._coming.clear()  # as the end of the load does
        allocated.set()

    monkeypatch.setattr(feeder._copies, "allocate", allocate_late)
    feeder.bring(stream._files.values(), torch.device("cuda", 0), None)
    assert allocated.wait(30)
    while feeder._thread is not None:
        pass
    assert cuda.memory_allocated() == before


def test_damaged_head_is_an_error_for_whoever_waits(start: Start, open_stream: Open, folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(FormatError, match=r"b\.safetensors"):
        open_stream(complete(start)).collect()


def test_other_process_of_a_partial_file_is_waited_for_in_many_threads(start: Start, open_stream: Open) -> None:
    arrival = start()
    stream = open_stream(arrival)
    with ThreadPoolExecutor(8) as pool:
        waiting = {name: pool.submit(stream.get_tensor, name) for name in expected()}
        arrival.finish()
        assert not wrong({name: future.result() for name, future in waiting.items()}, expected())


def test_failed_transfer_ends_all_waits_with_its_error(start: Start, open_stream: Open) -> None:
    arrival = start()
    for name in arrival.weights:
        arrival.land_head(name)
    stream = open_stream(arrival)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(stream.get_tensor, "large"), pool.submit(stream.collect)]
        demanded(arrival, "a.safetensors")
        arrival.fail(DownloadError("the line is cut"))
        for future in waiting:
            with pytest.raises(DownloadError, match="the line is cut"):
                future.result()


def test_refetched_file_is_known_to_have_been_handed_out(start: Start, open_stream: Open) -> None:
    arrival = start()
    arrival.land("a.safetensors")
    arrival.land("b.safetensors")
    stream = open_stream(arrival)
    stream.collect()
    arrival.journals["a.safetensors"].start_over()
    arrival.finish()
    with pytest.raises(IntegrityError, match=r"a\.safetensors"):
        arrival.transfer.wait_verified(p for p, view in arrival.transfer.files.items() if view.delivered)


def test_closed_stream_ends_its_thread_and_refuses(start: Start, open_stream: Open) -> None:
    arrival = start()
    for name in arrival.weights:
        arrival.land_head(name)
    stream = open_stream(arrival)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(stream.get_tensor, "large")
        demanded(arrival, "a.safetensors")
        stream.close()
        with pytest.raises(FastloadError, match="closed"):
            waiting.result()
    assert not [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]
    with pytest.raises(FastloadError, match="closed"):
        stream.get_tensor("large")


# -- streams and memory -----------------------------------------------------------------------------------------------


def test_tensor_is_ready_on_the_stream_that_is_current(start: Start, open_stream: Open, cuda: Any) -> None:
    side = cuda.Stream()
    stream = open_stream(complete(start))
    with cuda.stream(side):
        copied = stream.get_tensor("large").clone()  # the race checker sees a copy that nothing ordered after the bytes
        freed = stream.get_tensor("float16")
        of_freed = freed.clone()
        del freed
    other = torch.zeros(50, 50, dtype=torch.float16, device="cuda")  # may get its memory, after the side stream's work
    side.synchronize()
    assert bits(copied) == bits(model()["large"])
    assert bits(of_freed) == bits(model()["float16"])
    assert not other.cpu().any()


def test_memory_that_the_program_still_works_on_is_not_overwritten(start: Start, open_stream: Open) -> None:
    kept = []
    for _, tensor in open_stream(complete(start)):
        kept.append((tensor.clone(), tensor.numel()))  # the clone may run long after `tensor` is gone
        del tensor
    assert not wrong(dict(zip(expected(), (copy for copy, _ in kept), strict=True)), expected())


def test_memory_that_the_program_has_just_given_back_is_not_written_too_early(
    start: Start, open_stream: Open, cuda: Any
) -> None:
    arrival = complete(start)
    open_stream(arrival).collect()  # torch has memory of just these sizes now
    for tensor in [torch.empty_like(tensor, device="cuda") for tensor in expected().values()]:
        tensor.view(-1).view(torch.uint8).fill_(7)  # may run long after the memory has gone to the next load
    del tensor
    got = open_stream(arrival).collect()
    assert not wrong(got, expected())


def test_tensors_are_handed_out_before_the_device_has_done_anything(
    start: Start, open_stream: Open, fake: ModuleType
) -> None:
    stream = open_stream(complete(start), pinned_bytes=8 << 20)
    with fake.settings(hold_timeout_ms=20_000), fake.hold():
        got = dict(iter(stream))
        assert set(fake.peek(got["large"])) == {0xDB}  # fresh memory as it was
    assert not wrong(got, expected())


def test_device_is_never_waited_for_as_a_whole(start: Start, open_stream: Open, fake: ModuleType) -> None:
    stream = open_stream(complete(start))
    before = fake.stat("device_syncs")
    got = stream.collect()
    stream.close()
    assert fake.stat("device_syncs") == before
    torch.cuda.synchronize()
    assert fake.stat("device_syncs") == before + 1
    assert not wrong(got, expected())


def test_never_more_slots_are_on_their_way_than_there_are(start: Start, open_stream: Open, fake: ModuleType) -> None:
    stream = open_stream(complete(start))
    with ThreadPoolExecutor() as pool:
        with fake.settings(hold_timeout_ms=20_000), fake.hold():
            waiting = pool.submit(stream.collect)
            while fake.stat("pending") < SLOTS:
                pass
            registered = fake.stat("registered")
        assert not wrong(waiting.result(), expected())
    assert registered == PINNED_BYTES


def test_nothing_touches_the_device_before_the_first_tensor_is_asked_for(
    start: Start, open_stream: Open, fake: ModuleType
) -> None:
    stream = open_stream(complete(start))
    before = fake.stat("mallocs"), fake.stat("registers")
    stream.keys()
    assert (fake.stat("mallocs"), fake.stat("registers")) == before


def test_stream_that_nobody_reads_on_runs_ahead_by_the_slots_only(
    start: Start, open_stream: Open, tmp_path: Path, cuda: Any
) -> None:
    folder = tmp_path / "long"
    write({f"{i:03}": torch.full((2048,), i, dtype=torch.float32) for i in range(100)}, folder / "m.safetensors")
    stream = open_stream(complete(start, folder=folder))
    before = cuda.memory_allocated()
    weights = iter(stream)
    kept = [next(weights) for _ in range(10)]
    feeder = stream._supply.feeder
    while feeder._thread is not None:  # it ends when it may not go on
        pass
    assert cuda.memory_allocated() - before <= (10 * 8 * KIB) + PINNED_BYTES
    kept.extend(weights)
    assert [int(t.cpu()[7]) for _, t in kept] == list(range(100))


def test_load_takes_one_piece_of_memory_for_all_large_tensors(
    start: Start, open_stream: Open, tmp_path: Path, fake: ModuleType, cuda: Any
) -> None:
    folder = tmp_path / "wide"
    write({f"{i:02}": torch.full((700_000 + i,), i, dtype=torch.float32) for i in range(20)}, folder / "m.safetensors")
    arrival = complete(start, folder=folder)
    cuda.reset_peak_memory_stats()
    reserved, mallocs = cuda.memory_reserved(), fake.stat("mallocs")
    got = open_stream(arrival, pinned_bytes=8 << 20).collect()
    size = sum(tensor.nbytes for tensor in got.values())
    assert fake.stat("mallocs") - mallocs == 1
    assert cuda.memory_reserved() - reserved <= size + (4 << 20)
    assert [int(t.cpu()[-1]) for t in got.values()] == list(range(20))


def test_memory_of_the_device_stays_close_to_the_model_s(
    start: Start, open_stream: Open, tmp_path: Path, fake: ModuleType, cuda: Any
) -> None:
    folder = tmp_path / "wide"
    for name in "abc":
        sizes = {f"{name}{i}": 700_000 + 3 * i for i in range(6)} | {f"{name}-{i}": 100 + i for i in range(200)}
        tensors = {tensor: torch.full((size,), size % 251, dtype=torch.uint8) for tensor, size in sizes.items()}
        tensors |= {f"{name}+{i}": torch.full((600_000,), i, dtype=torch.float32) for i in range(8)}
        write(tensors, folder / f"{name}.safetensors")
    gc.collect()
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    reserved, mallocs = cuda.memory_reserved(), fake.stat("mallocs")
    got = open_stream(complete(start, folder=folder), pinned_bytes=MIB).collect()
    size = sum(tensor.nbytes for tensor in got.values())
    # One piece a file for what is large; torch takes memory for small tensors 2 MiB at a time.
    small = sum(tensor.nbytes for tensor in got.values() if tensor.nbytes <= MIB)
    assert fake.stat("mallocs") - mallocs <= 3 + -(-small // (2 * MIB)) + 2
    assert cuda.max_memory_reserved() - reserved <= size + 12 * MIB
    assert cuda.memory_reserved() - reserved <= size + 12 * MIB
    assert all(int(t[0].cpu()) == int(t[-1].cpu()) for t in got.values())


def test_everything_is_given_back(start: Start, open_stream: Open, cuda: Any) -> None:
    gc.collect()
    before = cuda.memory_allocated()
    stream = open_stream(complete(start))
    next(iter(stream))
    stream.close()
    del stream
    gc.collect()
    assert cuda.memory_allocated() == before


def test_copies_are_told_to_observers(start: Start, open_stream: Open) -> None:
    arrival = complete(start)
    events: list[Any] = []
    arrival.transfer.events.add(events.append)
    got = open_stream(arrival).collect()
    copies = [event for event in events if event.name == "copy.finished"]
    assert sum(event.data["bytes"] for event in copies) == sum(tensor.nbytes for tensor in got.values())
    assert {event.data["device"] for event in copies} == {"cuda:0"}


# -- page-locked memory -----------------------------------------------------------------------------------------------


def test_copies_are_from_page_locked_memory(start: Start, open_stream: Open, fake: ModuleType) -> None:
    open_stream(complete(start)).collect()
    assert fake.stat("pageable_copies") == 0
    assert fake.stat("blocking_copies") == 0


def test_memory_that_cannot_be_locked_is_one_warning_and_a_slower_load(
    start: Start, open_stream: Open, fake: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "_warned", False)
    arrival = complete(start)
    with fake.settings(register_limit=0), caplog.at_level(logging.WARNING, "fastload"):
        got = [open_stream(arrival).collect() for _ in range(2)]
        # The next kernel is not blamed for the failure.
        assert torch.zeros(3, device="cuda").cpu().tolist() == [0, 0, 0]
    assert not wrong(got[0], expected())
    assert not wrong(got[1], expected())
    assert [record.message for record in caplog.records if "page-locked" in record.message] == [
        f"{PINNED_BYTES} bytes of host memory could not be page-locked (error 2): copies to cuda:0 will be slower. "
        "A smaller pinned_bytes, or a higher limit on locked memory, helps"
    ]
