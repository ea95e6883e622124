"""The conformance suite for weight formats: sound formats pass, and for every promise a plugin that breaks it is caught."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import fastload  # noqa: E402
from fastload import hookimpl, plugins  # noqa: E402
from fastload.builtin import pickled, safetensors  # noqa: E402
from fastload.errors import FormatError, PluginError, SettingsError  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.testing import PROMISES, Fault, Sample, check_format, random_tensor, write_safetensors  # noqa: E402
from fastload.types import ByteRange, NeedBytes, TensorInfo  # noqa: E402

HERE = Path(__file__).parent
SMALL = {"a": random_tensor("F32", (3, 4)), "b": random_tensor("BF16", (7,)), "s": random_tensor("I64", ()),
         "e": ("F32", (0, 3), b"")}  # fmt: skip
LARGE = {f"layer.{n}": random_tensor("F32", (128, 128), n) for n in range(4)}
MANY = {f"layer.{n}." + 60 * "x": random_tensor("U8", (3,), n) for n in range(800)}


# -- a format that keeps them all, to be broken ------------------------------------------------------------------------


def dumps(tensors: Mapping[str, Any], *, shift: int = 0) -> bytes:
    """Return a toy file: ``TOY1``, 4 bytes of length, a JSON table, the data; offsets are off by *shift*."""
    table, at = [], 0
    for name, (dtype, shape, data) in tensors.items():
        table.append([name, dtype, list(shape), at + shift, at + len(data) + shift])
        at += len(data)
    text = json.dumps(table).encode()
    return b"TOY1" + len(text).to_bytes(4, "little") + text + b"".join(data for *_, data in tensors.values())


class Toy:
    """The plugin; its hook makes formats of :attr:`format`."""

    format: Any

    @hookimpl
    def fastload_format(self, filename: str, head: bytes) -> Any:
        return self.format(filename) if head.startswith(b"TOY1") else None


class ToyFormat:
    name = "toy"

    def __init__(self, filename: str) -> None:
        self.filename = filename

    def parse(self, head: bytes) -> Any:
        if len(head) < 8:
            return NeedBytes(8)
        start = 8 + int.from_bytes(head[4:8], "little")
        if len(head) < start:
            return NeedBytes(start)
        try:
            return [self.tensor(start, *row) for row in json.loads(head[8:start])]
        except (ValueError, TypeError, RecursionError) as e:
            raise FormatError(f"{self.filename}: not a toy: {e}") from e

    def tensor(self, at: int, name: Any, dtype: Any, shape: Any, start: Any, stop: Any) -> TensorInfo:
        if not isinstance(name, str) or not isinstance(dtype, str):
            raise ValueError("a name is no text")
        if not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, start, stop]):
            raise ValueError("a number is none")
        return TensorInfo(name, dtype, tuple(shape), ByteRange(at + start, at + stop))


def toy(format: Any = ToyFormat) -> Toy:
    made = Toy()
    made.format = format
    return made


def samples(write: Callable[[Any], bytes], suffix: str) -> list[Sample]:
    return [
        Sample(f"{name}{suffix}", write(tensors), tensors)
        for name, tensors in (("small", SMALL), ("large", LARGE), ("many", MANY))
    ]


def reasons(plugin: Any, promise: str, files: Any = None, **options: Any) -> str:
    """Return what is said of *promise*, which must be broken."""
    files = [Sample("small.toy", dumps(SMALL), SMALL)] if files is None else files
    with pytest.raises(PluginError, match=r"breaks 1 of 1 promises of a weight format") as caught:
        check_format(plugin, files, only=[promise], **options)
    assert f"broken    {promise} (" in caught.value.message and caught.value.hint
    return caught.value.message


# -- sound formats -----------------------------------------------------------------------------------------------------


def test_sound_format_keeps_every_promise() -> None:
    broken = {"overlap": dumps({"a": SMALL["a"], "b": SMALL["a"]}).replace(b"48, 96", b"40, 88"),
              "outside": dumps(SMALL, shift=100)}  # fmt: skip
    report = check_format(toy(), samples(dumps, ".toy"), broken=broken)
    assert not report.of("broken") and {v.promise for v in report.of("kept")} == set(PROMISES) - {"imports_light"}
    assert [(v.promise, v.sample) for v in report.of("unproven")] == [
        ("imports_light", "small.toy"),  # no module
        ("streams_while_bytes_arrive", "small.toy"), ("streams_while_bytes_arrive", "many.toy")
    ]  # fmt: skip
    assert "kept      loads_from_a_hub (large.toy)" in str(report).splitlines()


def test_safetensors_keeps_its_own_promises(tmp_path: Path) -> None:
    def write(tensors: Any) -> bytes:
        return write_safetensors(tmp_path / "x.safetensors", tensors).read_bytes()

    overlap = write({"a": SMALL["a"], "b": SMALL["a"]}).replace(b"[48,96]", b"[40,88]")
    assert check_format(safetensors, samples(write, ".safetensors")[:2], broken={"overlap": overlap}).of("kept")


@pytest.mark.parametrize("zipped", [True, False])
def test_format_that_reads_whole_files_keeps_what_it_can_promise(zipped: bool) -> None:
    tensors = {"a": torch.rand(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "n": torch.tensor(7)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
    report = check_format(pickled, [Sample("x.bin", buffer.getvalue(), tensors)])
    assert {v.promise: v.reason for v in report.of("unproven")}.keys() == {
        "asks_for_what_it_needs", "refuses_broken_files", "streams_while_bytes_arrive"
    }  # fmt: skip


def test_gguf_plugin_keeps_its_promises(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    import fastload_gguf

    arrays = {f"blk.{n}.weight": np.random.default_rng(n).standard_normal((128, 256)).astype("f4") for n in range(3)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list([f"word{n}" for n in range(20)])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = check_format(fastload_gguf, [Sample("m.gguf", tmp_path / "m.gguf", arrays)])
    assert [v.promise for v in report.of("unproven")] == ["refuses_broken_files"]


def test_strangers_format_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE / "data" / "fastload-hello")
    hello: Any = importlib.import_module("fastload_hello")
    monkeypatch.delitem(sys.modules, "fastload_hello")
    assert check_format(hello, samples(hello.dumps, ".hello")[1:2]).of("kept")


# -- every promise can be broken ---------------------------------------------------------------------------------------


def test_plugin_that_imports_a_framework_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "heavy_plugin.py").write_text("import numpy\n")
    (tmp_path / "broken_plugin.py").write_text("x = 1\n")
    heavy, fragile = importlib.import_module("heavy_plugin"), importlib.import_module("broken_plugin")
    assert "importing it imports numpy" in reasons(heavy, "imports_light")
    (tmp_path / "broken_plugin.py").write_text("import nonesuch\n")
    assert "No module named 'nonesuch'" in reasons(fragile, "imports_light")


class Forgetful(Toy):
    @hookimpl
    def fastload_format(self, filename: str, head: bytes) -> Any:
        return ToyFormat(filename) if "/" not in filename else None


class Nervous(Toy):
    @hookimpl
    def fastload_format(self, filename: str, head: bytes) -> Any:
        return ToyFormat(filename) if head[3] == ord("1") else None


class Nameless(ToyFormat):
    name = ""


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [(Forgetful(), "does not recognise folder/of.small.toy"), (Nervous(), "IndexError"), (toy(Nameless), "no name"),
     (toy(lambda filename: type("X", (), {"name": "x"})()), r"no parse")],
)  # fmt: skip
def test_plugin_that_misses_its_files_is_caught(plugin: Any, reason: str) -> None:
    assert reason in reasons(plugin, "recognises_its_files")


class Greedy(Toy):
    @hookimpl
    def fastload_format(self, filename: str, head: bytes) -> Any:
        return ToyFormat(filename)


def test_plugin_that_takes_the_files_of_others_is_caught() -> None:
    assert "takes model.safetensors" in reasons(Greedy(), "leaves_other_files_alone")


class Piling(ToyFormat):
    def __init__(self, filename: str) -> None:
        super().__init__(filename)
        self.found: list[Any] = []

    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        if isinstance(answer, list):
            self.found += answer
        return list(self.found)


def test_plugin_that_remembers_what_it_was_asked_is_caught() -> None:
    assert "answers another time in another way" in reasons(toy(Piling), "answers_alike")


class Refusing(ToyFormat):
    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        if isinstance(answer, NeedBytes):
            raise FormatError(f"{self.filename}: too short")
        return answer


class Stuck(ToyFormat):
    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        return NeedBytes(8) if isinstance(answer, NeedBytes) else answer


class Excessive(ToyFormat):
    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        return NeedBytes(2**40) if isinstance(answer, NeedBytes) else answer


class Crawling(ToyFormat):
    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        return NeedBytes(len(head) + 1) if isinstance(answer, NeedBytes) else answer


class Crashing(ToyFormat):
    def parse(self, head: bytes) -> Any:
        return [head[100]] and super().parse(head)


class Guessing(ToyFormat):
    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        return [] if isinstance(answer, NeedBytes) else answer


@pytest.mark.parametrize(
    ("format", "reason"),
    [(Refusing, "refuses a sound file of which it sees 0 of "), (Stuck, "asks for 8 bytes where it has 8"),
     (Excessive, "bytes of a sound file"), (Crawling, "asks more than 64 times"), (Crashing, "raises IndexError"),
     (Guessing, "gives other tensors where it sees 0 bytes")],
)  # fmt: skip
def test_plugin_that_cannot_take_a_cut_head_is_caught(format: Any, reason: str) -> None:
    assert reason in reasons(toy(format), "asks_for_what_it_needs")


def changed(**to: Any) -> Any:
    """Return a format whose last tensor is another one."""

    class Changed(ToyFormat):
        def parse(self, head: bytes) -> Any:
            answer = super().parse(head)
            if isinstance(answer, NeedBytes):
                return answer
            last = answer[1]
            fields = {"name": last.name, "dtype": last.dtype, "shape": last.shape, "span": last.span}
            return [answer[0], TensorInfo(**{**fields, **to}), *answer[2:]]

    return Changed


class Numbers(ToyFormat):
    def metadata(self, head: bytes) -> Any:
        return {"epoch": 3}


class WrongSize(ToyFormat):
    file_bytes = 3


@pytest.mark.parametrize(
    ("format", "reason"),
    [(changed(name="c"), "lacks 'b'; has beyond them 'c'"), (changed(dtype="F16"), "is F16 instead of BF16"),
     (changed(shape=(7, 1)), "'b' has the shape [7, 1]"), (changed(dtype="Q4"), "FormatError"),
     (changed(span=ByteRange(0, 14)), "another byte 0"), (Numbers, "metadata() has 'epoch': 3"),
     (WrongSize, "by its head it should have 3")],
)  # fmt: skip
def test_plugin_that_reads_wrong_tensors_is_caught(format: Any, reason: str) -> None:
    assert reason in reasons(toy(format), "reads_every_tensor")


class Anonymous(ToyFormat):
    def parse(self, head: bytes) -> Any:
        if len(head) < 60:
            raise FormatError("too short")
        return super().parse(head)


class Reading(ToyFormat):
    """Reads whole files, and is content with half of one."""

    def load(self, path: Path) -> Any:
        return {"a": torch.ones(3)}


@pytest.mark.parametrize(
    ("format", "reason"),
    [(Anonymous, "the message does not name the file"), (Crashing, "IndexError instead of FormatError"),
     (Reading, "read as if it were sound (1 tensors)")],
)  # fmt: skip
def test_plugin_that_reads_truncated_files_is_caught(format: Any, reason: str) -> None:
    assert reason in reasons(toy(format), "refuses_truncated_files")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(dumps(SMALL), "'which': read as if it were sound (4 tensors)"), (b"TOY1\2\0\0\0{}", "'which': read as if it were"),
     (b"TOY1\1\0\0\0x", "KeyError instead of FormatError")],
)  # fmt: skip
def test_plugin_that_takes_broken_files_is_caught(data: bytes, reason: str) -> None:
    class Trusting(ToyFormat):
        def parse(self, head: bytes) -> Any:
            if head[8:] == b"x":
                raise KeyError("x")
            return super().parse(head)

    assert reason in reasons(toy(Trusting), "refuses_broken_files", broken={"which": data})


class Careless(ToyFormat):
    def parse(self, head: bytes) -> Any:
        start = 8 + int.from_bytes(head[4:8], "little")
        return (
            [self.tensor(start, *row) for row in json.loads(head[8:start])] if len(head) >= start else NeedBytes(start)
        )


class Endless(ToyFormat):
    def parse(self, head: bytes) -> Any:
        while head[4:5] == b"\xff":
            try:
                pass
            except Exception:  # must not keep it alive
                continue
        return super().parse(head)


class Hungry(ToyFormat):
    def parse(self, head: bytes) -> Any:
        return [bytes(2**60)] if head[4:5] == b"\xff" else super().parse(head)


@pytest.mark.parametrize(
    ("format", "reason"),
    [(Careless, "JSONDecodeError"), (Endless, "did not end within 1 s"), (Hungry, "MemoryError")],
)  # fmt: skip
def test_plugin_that_chokes_on_damage_is_caught(format: Any, reason: str) -> None:
    limit_s = 1.0 if format is Endless else 60.0
    assert reason in reasons(toy(format), "survives_damage", limit_s=limit_s)


def fickle(right: int) -> Any:
    """Return a format that gives the right tensors to its first *right* objects only."""
    made: list[Any] = []

    class Fickle(ToyFormat):
        def parse(self, head: bytes) -> Any:
            if self not in made:
                made.append(self)
            return super().parse(head) if made.index(self) < right else []

    return Fickle


def test_plugin_that_gives_other_tensors_from_the_cache_is_caught() -> None:
    assert "from the hub: 0 tensors instead of 4" in reasons(toy(fickle(0)), "loads_from_a_hub")
    assert "from the cache: 0 tensors instead of 4" in reasons(toy(fickle(1)), "loads_from_a_hub")


class Patient(ToyFormat):
    def parse(self, head: bytes) -> Any:
        answer = super().parse(head)
        end = 0 if isinstance(answer, NeedBytes) else max(t.span.stop for t in answer)
        return NeedBytes(end) if len(head) < end else answer


def test_plugin_that_waits_for_the_whole_file_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.testing.arriving._PATIENCE_S", 0.5)
    files = [Sample("large.toy", dumps(LARGE), LARGE)]
    assert "'layer.0' waited for bytes from 131072 on" in reasons(toy(Patient), "streams_while_bytes_arrive", files)


def test_plugin_that_is_wrong_after_a_cut_is_caught() -> None:
    assert "after a cut at byte" in reasons(toy(fickle(0)), "goes_on_after_a_cut")


def test_load_that_lets_a_wrong_byte_pass_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin can bring that about: here the byte is only said to be wrong."""
    monkeypatch.setattr(
        "fastload.testing.arriving.Fault", lambda kind, **options: Fault(kind, **{**options, "mask": 0})
    )
    assert "loaded although byte 0 was changed on the way" in reasons(toy(), "gives_no_wrong_bytes")


@pytest.mark.parametrize(
    "answer",
    [None, 7, ["a"], [TensorInfo("a", "F32", (1,), None)], [TensorInfo("a", "F32", ("1",), ByteRange(0, 4))],  # type: ignore[arg-type]
     [TensorInfo("a", ["F32"], (1,), ByteRange(0, 4))]],  # type: ignore[arg-type]
    ids=str,
)  # fmt: skip
def test_answer_that_is_none_is_the_plugins_error_in_a_load(tmp_path: Path, answer: Any) -> None:
    class Odd(ToyFormat):
        def parse(self, head: bytes) -> Any:
            return answer

    plugin, pm = toy(Odd), plugins.manager(Settings(plugins=()))
    (tmp_path / "x.toy").write_bytes(dumps(SMALL))
    pm.register(plugin, name="odd")
    try:
        with pytest.raises(PluginError, match="plugin toy failed in "):
            fastload.load_tensors(tmp_path, settings={"process": False, "plugins": ()})
    finally:
        pm.unregister(plugin)


# -- the call ----------------------------------------------------------------------------------------------------------


def test_plugin_is_registered_for_the_check_alone() -> None:
    plugin, pm = toy(), plugins.manager(Settings(plugins=()))
    check_format(plugin, [Sample("small.toy", dumps(SMALL), SMALL)], only=["reads_every_tensor"])
    assert not pm.is_registered(plugin)


def test_installed_plugin_goes_by_its_name() -> None:
    sample = Sample("small.toy", dumps(SMALL), SMALL)
    with pytest.raises(PluginError, match="plugin nonesuch is not in use: no installed package"):
        check_format("nonesuch", [sample])


def test_wrong_arguments_are_refused() -> None:
    sample = Sample("small.toy", dumps(SMALL), SMALL)
    with pytest.raises(SettingsError, match="samples is empty"):
        check_format(toy(), [])
    with pytest.raises(SettingsError, match="no promise 'flies'"):
        check_format(toy(), [sample], only=["flies"])


@pytest.mark.parametrize(
    "make",
    [lambda t: t, lambda t: torch.frombuffer(bytearray(t[2]), dtype=torch.float32).reshape(t[1])],
    ids=["plain", "torch"],
)
def test_expected_tensors_may_be_of_any_library(make: Any) -> None:
    sample = Sample("a.toy", dumps({"a": SMALL["a"]}), {"a": make(SMALL["a"])})
    assert sample.expected() == {"a": SMALL["a"]}


def test_expected_tensors_may_be_arrays(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    arrays = {"a": np.frombuffer(SMALL["a"][2], "<f4").reshape(3, 4), "b": np.array([True, False]),
              "c": np.arange(3, dtype=">i2")}  # fmt: skip
    plain = Sample("a.toy", b"", arrays).expected()
    assert plain == {"a": SMALL["a"], "b": ("BOOL", (2,), b"\1\0"), "c": ("I16", (3,), b"\0\0\1\0\2\0")}
    with pytest.raises(TypeError, match="not list"):
        Sample("a.toy", b"", {"a": [1.0]}).expected()


def test_testing_is_light_to_import() -> None:
    import subprocess

    program = "import sys, fastload.testing; print(sorted({'torch', 'numpy', 'huggingface_hub'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
