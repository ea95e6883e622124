"""The public calls, from a hub to the device: cold, warm, resumed, shared; and what from_pretrained gives, there."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import fakecuda
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from compare import diff_models  # noqa: E402
from device_weights import bits, write, wrong  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fastload  # noqa: E402
from fastload import supply  # noqa: E402
from fastload.errors import DeviceError, DownloadError, IntegrityError  # noqa: E402
from fastload.testing import Fault, Hub  # noqa: E402

#: Small and impatient, as in the tests of the engine.
QUICK = {"range_bytes": 64 << 10, "ring_bytes": 512 << 10, "pinned_bytes": 256 << 10, "attempts": 2, "stall_s": 1}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two shards of 800 kB."""
    folder = tmp_path / "weights"
    source = torch.Generator().manual_seed(3)
    for shard in "ab":
        tensors = {f"{shard}.{i}": torch.randn(100 * i, 200, generator=source) for i in range(1, 5)}
        write({**tensors, f"{shard}.scalar": torch.tensor(1.0)}, folder / f"model-{shard}.safetensors")
    return folder


def of(folder: Path) -> dict[str, Any]:
    """Return what the files of *folder* hold."""
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.fixture
def serve(make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Serve a folder as ``org/m``; HF_ENDPOINT points there."""

    def serve(folder: Path, **options: Any) -> Hub:
        hub = make_hub({"org/m": folder}, **options)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        return hub

    return serve


@pytest.fixture
def by_slots(cuda: Any) -> Iterator[None]:
    """Every copy of the test comes from page-locked memory, as far as the device can tell."""
    yield
    if fakecuda.installed():
        assert fakecuda.stat("h2d_bytes")
        assert fakecuda.stat("pageable_copies") == fakecuda.stat("d2h_copies")  # those of the comparison


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_cold_and_warm_loads_give_the_tensors_on_the_device(
    weights: Path, serve: Callable[..., Hub], by_slots: None
) -> None:
    serve(weights)
    for _ in range(2):
        got = fastload.load_tensors("org/m", device="cuda", settings=QUICK)
        assert not wrong(got, of(weights))
        assert all(tensor.is_cuda for tensor in got.values())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_casts_are_those_of_the_host(weights: Path, serve: Callable[..., Hub], dtype: Any) -> None:
    serve(weights)
    got = fastload.load_tensors("org/m", device="cuda", dtype=dtype, settings={**QUICK, "verify_device": True})
    assert not wrong(got, of(weights), getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def test_resumed_load_gives_the_same(weights: Path, serve: Callable[..., Hub], by_slots: None) -> None:
    hub = serve(weights, faults=[Fault("truncate", path="model-b.safetensors", offset=600_000)])
    with pytest.raises(DownloadError):
        fastload.load_tensors("org/m", device="cuda", settings=QUICK)
    hub.script()
    assert not wrong(fastload.load_tensors("org/m", device="cuda", settings=QUICK), of(weights))


def test_two_loads_at_once_share_the_download_and_not_the_tensors(
    weights: Path, serve: Callable[..., Hub], by_slots: None
) -> None:
    hub = serve(weights)
    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(fastload.load_tensors, "org/m", device="cuda", settings=QUICK) for _ in range(2)]
        one, other = (load.result() for load in loads)
    assert not wrong(one, of(weights))
    assert not wrong(other, of(weights))
    assert not {t.data_ptr() for t in one.values()} & {t.data_ptr() for t in other.values()}
    asked = [request.path for request in hub.requests if request.file == "model-a.safetensors"]
    assert len(asked) <= 2 * (800_000 // QUICK["range_bytes"])


def test_load_beside_another_program_s_download_takes_its_bytes(
    weights: Path, serve: Callable[..., Hub], by_slots: None
) -> None:
    hub = serve(weights, faults=[Fault("hold", path="model-b.safetensors", offset=600_000, times=1)])
    copied = threading.Event()

    def observe(event: fastload.Event) -> None:
        if event.name == "copy.finished":
            copied.set()

    # It has the locks and the partial files.
    code = f"import fastload; fastload.prefetch('org/m', settings={dict(QUICK, stall_s=60)!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        hub.wait(lambda requests: any(request.held for request in requests))
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(fastload.load_tensors, "org/m", device="cuda", settings=QUICK, observers=[observe])
            assert copied.wait(60), "nothing went to the device while the other program was at work"
            hub.release()
            assert not wrong(waiting.result(), of(weights))
        assert other.wait() == 0
    # Once, but for what was asked again because it was held.
    assert hub.bytes_sent() < 1.2 * sum(path.stat().st_size for path in weights.iterdir())


def test_pickled_weights_end_on_the_device_too(tmp_path: Path, serve: Callable[..., Hub]) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    want = {"a": torch.arange(1000.0), "b": torch.ones(3, 5).half()}
    torch.save(want, folder / "pytorch_model.bin")
    serve(folder)
    got = fastload.load_tensors("org/m", device="cuda", settings=QUICK)
    assert {str(tensor.device) for tensor in got.values()} == {"cuda:0"}
    assert all(torch.equal(got[name].cpu(), want[name]) for name in want)


def test_changed_byte_fails_a_load_that_proves_its_copies(
    weights: Path, serve: Callable[..., Hub], fake: ModuleType
) -> None:
    serve(weights)
    proven = {**QUICK, "verify_device": True}
    with fake.settings(corrupt_copy_at=4, fail_kind="h2d"), pytest.raises(DeviceError, match="other bytes"):
        fastload.load_tensors("org/m", device="cuda", settings=proven)
    assert not wrong(fastload.load_tensors("org/m", device="cuda", settings=proven), of(weights))


def test_corrupt_range_is_fetched_anew_and_the_device_gets_the_right_one(
    weights: Path, serve: Callable[..., Hub]
) -> None:
    serve(weights, faults=[Fault("flip", path="model-a.safetensors", offset=300_000, times=1)])
    assert not wrong(fastload.load_tensors("org/m", device="cuda", settings=QUICK), of(weights))


def test_stream_of_corrupt_bytes_says_so_at_its_end(weights: Path, serve: Callable[..., Hub]) -> None:
    serve(weights, faults=[Fault("flip", path="model-a.safetensors", offset=300_000, times=1)])
    with (
        pytest.raises(IntegrityError),
        fastload.stream("org/m", device="cuda", settings=QUICK) as stream,
    ):
        list(stream)


def test_stream_gives_owned_tensors_in_order(weights: Path, serve: Callable[..., Hub]) -> None:
    serve(weights)
    with fastload.stream("org/m", device="cuda", settings=QUICK) as stream:
        kept = list(stream)
    assert not wrong(dict(kept), of(weights))
    assert [name[0] for name, _ in kept] == ["a"] * 5 + ["b"] * 5


async def test_twins_give_the_same(weights: Path, serve: Callable[..., Hub]) -> None:
    serve(weights)
    assert not wrong(await fastload.aload_tensors("org/m", device="cuda", settings=QUICK), of(weights))
    async with fastload.astream("org/m", device="cuda", settings=QUICK) as stream:
        kept = {name: tensor async for name, tensor in stream}
    assert not wrong(kept, of(weights))


@pytest.mark.parametrize("twin", [False, True])
def test_tensors_are_ready_on_the_stream_that_is_current_when_the_call_returns(
    weights: Path, serve: Callable[..., Hub], cuda: Any, twin: bool
) -> None:
    serve(weights)
    side = cuda.Stream()
    with cuda.stream(side):
        got = (
            asyncio.run(fastload.aload_tensors("org/m", device="cuda", settings=QUICK))
            if twin
            else fastload.load_tensors("org/m", device="cuda", settings=QUICK)
        )
        copies = {name: tensor.clone() for name, tensor in got.items()}
    side.synchronize()
    assert not wrong(copies, of(weights))


def test_failing_copy_fails_the_call(weights: Path, serve: Callable[..., Hub], fake: ModuleType) -> None:
    serve(weights)
    with fake.settings(fail_copy_at=3, fail_code=1, fail_kind="h2d"), pytest.raises(DeviceError):
        fastload.load_tensors("org/m", device="cuda", settings=QUICK)
    assert not wrong(fastload.load_tensors("org/m", device="cuda", settings=QUICK), of(weights))


def plain(**options: Any) -> Any:
    """Load ``org/tiny`` the usual way, from the cache that fastload filled."""
    cache = Path(os.environ["HF_HOME"]) / "hub"
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        "org/tiny", cache_dir=cache, local_files_only=True, **options
    )
    return model


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.float16}, {"dtype": "float32"}, {"device_map": "auto"}, {"device_map": "cuda:0"}],
    ids=str,
)
def test_model_is_that_of_from_pretrained(tiny_model: Path, hub: Hub, options: dict[str, Any]) -> None:
    device = {} if "device_map" in options else {"device": "cuda"}
    ours = [fastload.load("org/tiny", **device, settings=QUICK, **options) for _ in range(2)]  # cold, warm
    theirs = plain(**{"device_map": {"": "cuda"}, **options})
    for model in ours:
        assert not diff_models(model, theirs)
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def test_model_on_two_devices_is_that_of_from_pretrained(hub: Hub, cuda: Any) -> None:
    if cuda.device_count() < 2:
        pytest.skip("needs two devices")
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
                  "model.rotary_emb": 0, "lm_head": 1}  # fmt: skip
    ours = fastload.load("org/tiny", device_map=device_map, settings=QUICK)
    theirs = plain(device_map=device_map)
    assert {str(p.device) for p in ours.parameters()} == {str(p.device) for p in theirs.parameters()}
    different = [d for d in diff_models(ours, theirs) if "_hf_hook" not in d and "forward" not in d]
    assert not different


def test_tied_weights_are_one_on_the_device(
    tmp_path: Path, serve: Callable[..., Hub], cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=500, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    serve(tmp_path / "tied")
    model = fastload.load("org/m", device="cuda", settings=QUICK)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.is_cuda
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        "org/m", cache_dir=Path(os.environ["HF_HOME"]) / "hub", local_files_only=True, device_map={"": "cuda"}
    )
    assert not diff_models(model, theirs)


def test_allocation_that_fails_while_a_model_is_built_is_survived_or_our_error(
    hub: Hub, fake: ModuleType, cuda: Any
) -> None:
    for n in range(1, 20):
        gc.collect()
        cuda.empty_cache()
        allocated, mallocs = cuda.memory_allocated(), fake.stat("mallocs")
        with fake.settings(malloc_fail_at=n):
            try:
                assert not diff_models(
                    fastload.load("org/tiny", device="cuda", settings=QUICK), plain(device_map={"": 0})
                )
            except DeviceError as e:
                assert "out of memory" in str(e)
                assert "free" in str(e)
        gc.collect()
        assert cuda.memory_allocated() == allocated
        if fake.stat("mallocs") - mallocs < n:
            break
    assert n > 1


def test_weights_of_a_model_come_from_page_locked_memory(hub: Hub, fake: ModuleType) -> None:
    fastload.prefetch("org/tiny")
    fake.reset()
    model = fastload.load("org/tiny", device="cuda", settings=QUICK)
    size = sum(p.nbytes for p in model.parameters())
    assert fake.stat("h2d_bytes") >= size
    # What transformers makes itself (buffers) may come from elsewhere.
    assert fake.stat("pageable_copies") <= len(list(model.buffers()))


def test_nothing_is_on_the_device_before_the_framework_reads(hub: Hub, fake: ModuleType) -> None:
    order: list[str] = []
    warmup = transformers.modeling_utils.caching_allocator_warmup

    def noted(*args: Any, **kwargs: Any) -> None:
        order.append(f"warm-up after {fake.stat('h2d_copies')} copies")
        warmup(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "caching_allocator_warmup", noted)
        before = fake.stat("h2d_copies")
        fastload.load("org/tiny", device="cuda", settings=QUICK)
    assert order == [f"warm-up after {before} copies"]


def test_model_that_does_not_fit_is_our_error_and_leaves_nothing(hub: Hub, fake: ModuleType, cuda: Any) -> None:
    gc.collect()
    cuda.empty_cache()
    allocated = cuda.memory_allocated()
    with fake.settings(oom_bytes=fake.stat("device_used") + 1):
        with pytest.raises(DeviceError, match="out of memory") as caught:
            fastload.load("org/tiny", device="cuda", settings=QUICK)
        gc.collect()
        assert cuda.memory_allocated() == allocated
        assert "free" in str(caught.value)


def test_copy_that_fails_while_a_model_is_built_is_our_error(hub: Hub, fake: ModuleType) -> None:
    for n in (1, 5, 12):
        with fake.settings(fail_copy_at=n, fail_code=1, fail_kind="h2d"), pytest.raises(DeviceError):
            fastload.load("org/tiny", device="cuda", settings=QUICK)


def test_safe_open_of_an_arriving_file_puts_tensors_on_its_device(
    weights: Path, start: Any, open_stream: Any, fake: ModuleType
) -> None:
    arrival = start(folder=weights)
    for name in arrival.weights:
        arrival.land_head(name)
    want = of(weights)
    with open_stream(arrival, "cpu").served() as path, ThreadPoolExecutor() as pool:
        with safe_open(path / "model-a.safetensors", framework="pt", device="cuda:0") as handle:
            waiting = pool.submit(handle.get_tensor, "a.4")
            arrival.land("model-a.safetensors")
            one = waiting.result()
            everything = dict(load_file(path / "model-a.safetensors", device="cuda"))
            assert fake.stat("pageable_copies") == 0
            assert bits(one) == bits(want["a.4"])
            assert bits(handle.get_slice("a.3")[5:7]) == bits(want["a.3"][5:7])
            assert one.device == torch.device("cuda:0")
        assert not wrong(everything, {n: t for n, t in want.items() if n[0] == "a"})


def test_tensors_travel_ahead_of_the_framework_as_far_as_they_may(
    weights: Path, start: Any, open_stream: Any, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "_LEAD_BYTES", 200 << 10)  # of 800 kB a file
    arrival = start(folder=weights)
    arrival.finish()
    want = {n: t for n, t in of(weights).items() if n[0] == "a"}
    stream = open_stream(arrival, "cpu")
    before = cuda.memory_allocated()
    with (
        stream.served(defer=True, ahead="cuda") as path,
        safe_open(path / "model-a.safetensors", framework="pt") as handle,
    ):
        stand_ins = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        assert cuda.memory_allocated() == before, "it began before anything was sent"
        got = {"a.1": stand_ins["a.1"].to("cuda")}
        while stream._supply.feeder._thread is not None:  # it ends when it may not go on
            pass
        ahead = cuda.memory_allocated() - before - got["a.1"].nbytes
        assert want["a.2"].nbytes <= ahead <= (200 << 10) + QUICK["pinned_bytes"] // 8 + want["a.4"].nbytes
        got.update({name: tensor.to("cuda") for name, tensor in stand_ins.items() if name not in got})
    assert not wrong(got, want)


def test_stand_in_behaves_as_the_tensor_it_stands_for(weights: Path, start: Any, open_stream: Any) -> None:
    arrival = start(folder=weights)
    arrival.finish()
    want = of(weights)["a.2"]
    with (
        open_stream(arrival, "cpu").served(defer=True) as path,
        safe_open(path / "model-a.safetensors", framework="pt") as handle,
    ):

        def one() -> Any:
            return handle.get_slice("a.2")[...]

        assert (one().shape, one().dtype, str(one().device)) == (want.shape, want.dtype, "cpu")
        assert (one().stride(), one().is_contiguous(), torch.is_floating_point(one())) == (want.stride(), True, True)
        for use in (
            lambda t: t.to("cpu"), lambda t: t[3:5], lambda t: t + 1, lambda t: t.detach(), lambda t: t.half(),
            lambda t: torch.stack([t, t]), lambda t: torch.empty_like(t).copy_(t), lambda t: t.to(torch.float64) + 1,
            lambda t: t.to(torch.float64).to("cuda").cpu(), lambda t: t.to(torch.float64, copy=True),
            lambda t: t.to(torch.float16).contiguous().to(torch.float32).to("cpu"), lambda t: t.contiguous() * 2,
            lambda t: t.to("cuda").cpu(), lambda t: t.to(device="cuda", dtype=torch.bfloat16).cpu(),
            lambda t: t.cuda().cpu(), lambda t: t.to(0).cpu(), lambda t: t.to(torch.empty(1, device="cuda")).cpu(),
        ):  # fmt: skip
            got = use(one())
            assert type(got) is torch.Tensor
            assert torch.equal(got, use(want))
        assert one().numpy().tobytes() == want.numpy().tobytes()


def test_what_was_done_to_a_stand_in_goes_with_it_to_the_device(weights: Path, start: Any, open_stream: Any) -> None:
    arrival = start(folder=weights)
    arrival.finish()
    want = of(weights)["a.2"]
    with (
        open_stream(arrival, "cpu").served(defer=True) as path,
        safe_open(path / "model-a.safetensors", framework="pt") as handle,
    ):
        one = handle.get_tensor("a.2")
        cast = one.to(torch.float64)
        assert one.to(torch.float32) is one
        one.mul_(2)
        cast.add_(1)
        cast[0] = 7
    assert torch.equal(one.to("cuda").cpu(), want * 2)
    expected = want.double() + 1
    expected[0] = 7
    assert torch.equal(cast.to("cuda").cpu(), expected)
