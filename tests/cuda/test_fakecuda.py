"""The emulated runtime is worth its tests: copies really happen later, races are found, what it computes is what torch does."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import ModuleType
from typing import Any

import fakecuda
import pytest

torch = pytest.importorskip("torch")

from device_weights import bits  # noqa: E402

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean(fake: ModuleType, cuda: Any) -> Any:
    """Tests here make violations on purpose."""
    yield
    fake.reset()


def pinned(size: int, value: int) -> Any:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(value)


def child(code: str, **environment: str) -> str:
    """Run *code* in a process that has the emulation by its environment alone."""
    base = {"PATH": "/usr/bin:/bin", **fakecuda.environment()}
    program = [sys.executable, "-c", f"import torch\n{code}"]
    return subprocess.run(program, env={**base, **environment}, check=True, capture_output=True, text=True).stdout


def test_source_that_is_overwritten_too_early_gives_wrong_bytes(fake: ModuleType, cuda: Any) -> None:
    source, target = pinned(MIB, 1), torch.empty(MIB, dtype=torch.uint8, device="cuda")
    with fake.hold():
        target.copy_(source, non_blocking=True)
        source.fill_(2)
    cuda.synchronize()
    assert set(fake.peek(target)) == {2}


def test_fresh_device_memory_is_poison(fake: ModuleType) -> None:
    assert set(fake.peek(torch.empty(100, dtype=torch.uint8, device="cuda"))) == {0xDB}


@pytest.mark.parametrize(("order", "races"), [("event", 0), ("host", 0), ("none", 1)])
def test_streams_that_nothing_orders_are_found(fake: ModuleType, cuda: Any, order: str, races: int) -> None:
    side = cuda.Stream()
    source, target = pinned(MIB, 1), torch.empty(MIB, dtype=torch.uint8, device="cuda")
    cuda.synchronize()
    fake.reset()
    with cuda.stream(side):
        target.copy_(source, non_blocking=True)
        event = cuda.Event()
        event.record()
    if order == "event":
        cuda.current_stream().wait_event(event)
    elif order == "host":
        event.synchronize()
    target.clone()
    cuda.synchronize()
    assert fake.stat("violations") == races


@pytest.mark.parametrize("record", [True, False])
def test_memory_that_is_freed_under_a_side_stream_is_found(fake: ModuleType, cuda: Any, record: bool) -> None:
    gc.collect()
    cuda.empty_cache()
    side, source = cuda.Stream(), pinned(4 * MIB, 8)
    fake.reset()
    tensor = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        tensor.copy_(source, non_blocking=True)
    if record:
        tensor.record_stream(side)
    del tensor
    torch.empty(4 * MIB, dtype=torch.uint8, device="cuda").zero_()
    cuda.synchronize()
    assert (fake.stat("violations") == 0) == record


def test_pinned_memory_that_goes_while_a_copy_needs_it_is_found(fake: ModuleType, cuda: Any) -> None:
    memory = torch.zeros(MIB, dtype=torch.uint8)
    runtime = cuda.cudart()
    assert int(runtime.cudaHostRegister(memory.data_ptr(), MIB, 0)) == 0
    with fake.settings(hold_timeout_ms=100), fake.hold():  # whoever unregisters waits for the copy
        torch.empty(MIB, dtype=torch.uint8, device="cuda").copy_(memory, non_blocking=True)
        assert int(runtime.cudaHostUnregister(memory.data_ptr())) == 0
    assert fake.stat("violations") == 1


def test_unknown_kernels_are_refused_by_name() -> None:
    tensor = torch.zeros(8, device="cuda")
    for use in (lambda: tensor + 1, lambda: torch.cat([tensor, tensor]), lambda: tensor.sum()):
        with pytest.raises(RuntimeError, match="fakecuda executes no kernels, and this was launched"):
            use()
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS"):
        tensor.view(2, 4) @ tensor.view(4, 2)


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_casts_are_those_of_the_cpu(source: Any, target: Any) -> None:
    special = torch.tensor([0.0, -0.0, 1e38, 1e-40, 65504.0, 65520.0, 1.00390625, float("inf"), float("-inf")])
    values = torch.cat([torch.randn(5000), special]).to(source)
    assert bits(values.cuda().to(target)) == bits(values.to(target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool], ids=str)
def test_strided_copies_and_fills_are_those_of_the_cpu(dtype: Any) -> None:
    values = torch.randint(0, 2, (6, 10, 14)).to(dtype)
    for use in (
        lambda t: t.permute(2, 0, 1).contiguous(), lambda t: t[:, 2:5].clone(), lambda t: t[1::2, :, ::3].contiguous(),
        lambda t: t.repeat(2, 1, 1), lambda t: t[:, :1].expand(6, 10, 14).contiguous(), lambda t: t.clone().fill_(1),
    ):  # fmt: skip
        assert bits(use(values.cuda())) == bits(use(values))


def test_errors_stick_as_they_do_on_a_device(fake: ModuleType, cuda: Any) -> None:
    source, target = pinned(MIB, 1), torch.empty(MIB, dtype=torch.uint8, device="cuda")
    try:
        with fake.settings(fail_copy_async_at=1, fail_code=700):
            target.copy_(source, non_blocking=True)
            for use in (cuda.synchronize, target.cpu):
                with pytest.raises(RuntimeError, match="illegal memory access"):
                    use()
    finally:
        fake.reset()  # before the tensors go: torch ends a process that cannot give pinned memory back


def test_child_processes_have_it_by_their_environment() -> None:
    code = "print(torch.cuda.device_count(), torch.arange(3).to('cuda').cpu().tolist())"
    assert child(code, FAKECUDA_DEVICES="3") == "3 [0, 1, 2]\n"
    assert child("print(torch.cuda.is_available())", FAKECUDA_DEVICES="0") == "False\n"
