"""A module that the caller made is filled as ``load_state_dict`` would, tensor by tensor as they land."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
from arrival import Arrival, demanded, finish_on_demand  # noqa: E402

import fastload  # noqa: E402
from fastload import plugins  # noqa: E402
from fastload.builtin.module import fastload_build_model  # noqa: E402
from fastload.errors import DownloadError, FormatError, SettingsError  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(64, 64)
        self.outer = torch.nn.Linear(64, 64)
        self.outer.weight = self.inner.weight
        self.register_buffer("scale", torch.rand(3))


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))


class Filler:
    """Serves state dicts as a repository that arrives, and fills modules from it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arrivals: list[Arrival] = []

    def arrive(self, state: dict[str, Any], name: str = "model.safetensors") -> Arrival:
        folder = self.root / f"repo{len(self.arrivals)}"
        folder.mkdir()
        state = {key: value.detach().clone() for key, value in state.items()}
        (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(state, folder / name)
        self.arrivals.append(Arrival(folder, self.root / f"cache{len(self.arrivals)}", weights=[name]))
        return self.arrivals[-1]

    def fill(self, arrival: Arrival, module: Any, framework: str | None = None, **options: Any) -> Any:
        """Call the hook as the loader does."""
        stream = TensorStream(arrival.transfer, plugins.manager(Settings(plugins=())), dtype=options.get("dtype"))
        return fastload_build_model(
            framework=framework,
            snapshot=arrival.transfer.wait_manifest(),
            stream=stream,
            options={"device": "cpu", "dtype": None, "into": module, **options},
        )

    def filled(self, state: dict[str, Any], module: Any, **options: Any) -> Any:
        arrival = self.arrive(state)
        arrival.finish()
        return self.fill(arrival, module, **options)


@pytest.fixture
def filler(tmp_path: Path) -> Iterator[Filler]:
    """Fills modules; everything is given back after the test."""
    made = Filler(tmp_path)
    yield made
    for arrival in made.arrivals:
        arrival.close()


def assert_same(a: Any, b: Any) -> None:
    of_a, of_b = a.state_dict(), b.state_dict()
    assert of_a.keys() == of_b.keys()
    assert all(of_a[k].dtype == of_b[k].dtype and torch.equal(of_a[k], of_b[k]) for k in of_a)


def batch_norm() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))


@pytest.mark.parametrize("make", [network, Tied, batch_norm])
def test_module_is_filled_as_load_state_dict_fills_it(filler: Filler, make: Callable[[], Any]):
    source, module, plain = make(), make(), make()
    parameters = list(module.parameters())
    assert filler.filled(source.state_dict(), module) is module
    plain.load_state_dict(source.state_dict())
    assert_same(module, plain)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(p.requires_grad for p in module.parameters())


def test_tensors_are_copied_as_they_land(filler: Filler):
    source, module = network(), network()
    arrival = filler.arrive(source.state_dict())
    arrival.land(arrival.weights[0], 0, 1)
    with ThreadPoolExecutor(1) as pool:
        ended = threading.Event()
        waited = pool.submit(finish_on_demand, arrival, ended)
        filler.fill(arrival, module)
        ended.set()
        assert waited.result()
    assert_same(module, source)


def test_values_are_cast_to_the_modules_types(filler: Filler):
    source, module = network(), network().to(torch.bfloat16)
    filler.filled(source.state_dict(), module)
    assert_same(module, source.to(torch.bfloat16))


def test_one_of_several_tied_names_is_enough(filler: Filler):
    source, module = Tied(), Tied()
    state = source.state_dict()
    del state["outer.weight"]
    filler.filled(state, module)
    assert_same(module, source)
    assert module.outer.weight is module.inner.weight


def test_names_that_do_not_fit_are_listed_before_anything_is_copied(filler: Filler):
    state = network().state_dict()
    state["ghost"] = state.pop("1.bias")
    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    arrival = filler.arrive(state)
    arrival.land_head(arrival.weights[0])
    with pytest.raises(FormatError) as caught:
        filler.fill(arrival, module)
    text = "org/model does not fit the module: 1 missing in the files: 1.bias; 1 unknown to the module: ghost"
    assert caught.value.message == text
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("make", [network, lambda: torch.nn.Sequential(*network(), torch.nn.BatchNorm1d(10))])
def test_strict_false_takes_what_fits(filler: Filler, make: Callable[[], Any]):
    source, module = make(), make()
    state = source.state_dict()
    state["ghost"] = state.pop("1.bias")
    kept = module.state_dict()["1.bias"].clone()
    filler.filled(state, module, strict=False)
    assert torch.equal(module.state_dict()["1.bias"], kept)
    assert torch.equal(module.state_dict()["0.weight"], source.state_dict()["0.weight"])
    with pytest.raises(FormatError, match=r"1 missing in the files: 1\.bias; 1 unknown to the module: ghost"):
        filler.filled(state, make())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("extra", [(), (torch.nn.BatchNorm1d,)], ids=["plain", "own way"])
def test_another_shape_is_always_an_error(filler: Filler, strict: bool, extra: Any):
    state = network().state_dict()
    state["0.bias"] = torch.rand(63)
    module = torch.nn.Sequential(*network(), *(kind(10) for kind in extra))
    with pytest.raises(FormatError, match=r"org/model does not fit the module: (?s:.*)0\.bias"):
        filler.filled({**module.state_dict(), **state}, module, strict=strict)


def test_module_on_meta_takes_the_tensors_themselves(filler: Filler):
    source = network()
    with torch.device("meta"):
        module = network()
    assert_same(filler.filled(source.state_dict(), module), source)


def test_assign_takes_the_tensors_themselves(filler: Filler):
    source, module = network().to(torch.float16), network()
    filler.filled(source.state_dict(), module, assign=True)
    assert module[0].weight.dtype == torch.float16


def test_hooks_of_the_module_see_all_names(filler: Filler):
    def rename(state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in [n for n in state if n.startswith("old.")]:
            state[name.removeprefix("old.")] = state.pop(name)

    source, module = network(), network()
    module._register_load_state_dict_pre_hook(rename)
    filler.filled({f"old.{k}": v for k, v in source.state_dict().items()}, module)
    assert_same(module, source)


def test_failed_transfer_ends_the_filling(filler: Filler):
    arrival = filler.arrive(network().state_dict())
    arrival.land(arrival.weights[0], 0, 1)
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(filler.fill, arrival, network())
        demanded(arrival, arrival.weights[0])
        arrival.fail(DownloadError("the cable is cut"))
        with pytest.raises(DownloadError, match="cut"):
            filling.result()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"into": network(), "trust_remote_code": True}, "trust_remote_code= means nothing with into="),
        ({"into": network(), "framework": "transformers"}, "not for framework='transformers'"),
        ({"into": {}}, "into=dict is not a torch.nn.Module"),
        ({"into": None, "framework": "torch"}, "framework='torch' needs a module"),
    ],
)
def test_what_means_nothing_is_refused(filler: Filler, options: dict[str, Any], reason: str):
    arrival = filler.arrive(network().state_dict())
    options = dict(options)
    with pytest.raises(SettingsError, match=reason):
        filler.fill(arrival, options.pop("into"), **options)


def test_module_goes_before_any_framework(make_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, module = network(), network()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'
    files = {"config.json": config, "model.safetensors": (tmp_path / "model.safetensors").read_bytes()}
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/net": files}).endpoint)
    assert fastload.load("org/net", into=module) is module
    assert_same(module, source)


def test_pickled_files_fill_a_module_too(filler: Filler):
    source, module = network(), network()
    arrival = filler.arrive(source.state_dict(), "net.pth")
    arrival.finish()
    assert_same(filler.fill(arrival, module), source)
