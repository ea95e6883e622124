"""The promises of a weight format that need no network: how it reads the head of a file, whole, cut or damaged."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import FormatError, UnsupportedSourceError
from ..transfer import Transfer
from ..types import NeedBytes, TensorInfo
from ..weightfile import HEAD_BYTES, WeightFile
from .conformance import Broken, Subject, Unproven
from .samples import Plain, Sample, difference, plain

#: Libraries that a plugin imports where it needs them, not when it is found.
_HEAVY = ("diffusers", "jax", "numpy", "tensorflow", "torch", "transformers")
#: Guessed: a format that asks more often than this walks through the file instead of jumping.
_ASKS = 64
#: Guessed: heads up to this length are cut at every byte, longer ones at their beginning and near what may matter.
_ALL_CUTS, _FIRST_CUTS = 2048, 64
_DAMAGES = 1500  # guessed: as many damaged heads as take a second
_FOREIGN = {
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}", "config.json": b"{}", "pytorch_model.bin": b"PK\x03\x04" + bytes(60),
    "model.gguf": b"GGUF\x03\0\0\0" + bytes(16), "README.md": b"# Model\n", "weights.of.others": bytes(HEAD_BYTES),
    "random": random.Random(0).randbytes(HEAD_BYTES), "empty": b"",
}  # fmt: skip
_REFUSALS = (FormatError, UnsupportedSourceError)


def imports_light(subject: Subject, sample: Sample) -> None:
    """Importing the plugin imports no framework: every start of every program with fastload pays for it."""
    if not isinstance(subject.module, ModuleType) or subject.module.__spec__ is None:
        raise Unproven("only a module can be imported alone")
    program = f"import sys, {subject.module.__name__}; print(*sorted(sys.modules.keys() & {set(_HEAVY)!r}))"
    path = os.pathsep.join([str(Path(subject.module.__file__ or ".").parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise Broken(f"cannot be imported by itself: {done.stderr.strip().rpartition(chr(10))[2]}")
    if done.stdout.strip():
        raise Broken(f"importing it imports {done.stdout.strip()}: do that in the function that needs it")


def recognises_its_files(subject: Subject, sample: Sample) -> None:
    """The hook returns a format for the file, wherever in the repository it stands, and raises for no head."""
    head = sample.data()[:HEAD_BYTES]
    for name in (sample.name, f"folder/of.{sample.name}"):
        found = subject.recognise(name, head)
        if found is None:
            raise Broken(f"does not recognise {name} by its first {len(head)} bytes")
    if not isinstance(getattr(found, "name", None), str) or not found.name:
        raise Broken("the format has no name")
    if not callable(getattr(found, "parse", None)):
        raise Broken("the format has no parse(head)")
    for other in (b"", b"\0", head[:1], head[:-1]):
        subject.recognise(sample.name, other)


def leaves_other_files_alone(subject: Subject, sample: Sample) -> None:
    """The hook returns None for what others have written: a plugin is asked about every file of every repository."""
    own = {Path(s.name).suffix for s in subject.samples}
    for name, head in _FOREIGN.items():
        if Path(name).suffix not in own and subject.recognise(name, head) is not None:
            raise Broken(f"takes {name} (first bytes {head[:8]!r}) for its own")


def answers_alike(subject: Subject, sample: Sample) -> None:
    """The same head gets the same answer, however often it is asked, whatever was asked before."""
    data = sample.data()
    found = _format(subject, sample)
    if hasattr(found, "load"):
        return
    first = found.parse(data)
    again, after_less = found.parse(data), (found.parse(data[: len(data) // 2]), found.parse(data))[1]
    if not _answer(first) == _answer(again) == _answer(after_less) == _answer(_format(subject, sample).parse(data)):
        raise Broken("parse() answers another time in another way")


def asks_for_what_it_needs(subject: Subject, sample: Sample) -> None:
    """A head that is too short, wherever it ends, is answered by NeedBytes with a count that leads on."""
    data = sample.data()
    found = _format(subject, sample)
    if hasattr(found, "load"):
        raise Unproven("the format reads whole files")
    whole = _answer(found.parse(data))
    for cut in _cuts(data, whole):
        seen, asks = cut, 0
        while True:
            try:
                answer = found.parse(data[:seen])
            except FormatError as e:
                raise Broken(f"refuses a sound file of which it sees {seen} of {len(data)} bytes: {e.message}") from e
            if not isinstance(answer, NeedBytes):
                break
            asks += 1
            if answer.count <= seen:
                raise Broken(f"asks for {answer.count} bytes where it has {seen}")
            if answer.count > len(data):
                raise Broken(f"asks for {answer.count} bytes of a sound file of {len(data)}")
            if asks > _ASKS:
                raise Broken(f"asks more than {_ASKS} times, for {answer.count} bytes at last: jump, or say likely=")
            seen = max(answer.count, min(answer.likely, len(data)))
        if _answer(answer) != whole:
            raise Broken(f"gives other tensors where it sees {seen} bytes than where it sees all {len(data)}")


def reads_every_tensor(subject: Subject, sample: Sample) -> None:
    """Names, types, shapes and bytes are those of the sample; the metadata is a table of texts, the size right."""
    data, expected = sample.data(), sample.expected()
    with _on_disk(subject, sample.name, data) as file:
        infos = file.tensors()
        if hasattr(_format(subject, sample), "load"):
            read: dict[str, Plain] = {name: plain(file.tensor(name)) for name in infos}
        else:
            read = {n: (i.dtype, i.shape, data[i.span.start : i.span.stop]) for n, i in infos.items()}
            if wrong := [n for n, i in infos.items() if n in expected and i.shape != expected[n][1]]:
                raise Broken(f"tensor {wrong[0]!r} has the shape {list(infos[wrong[0]].shape)}")
        metadata = file.metadata()
    if reason := difference(read, expected):
        raise Broken(reason)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise Broken(f"metadata() has {key!r}: {value!r}, no texts")


def refuses_truncated_files(subject: Subject, sample: Sample) -> None:
    """A file that ends early, in its head or in its data, is a FormatError that names it."""
    data = sample.data()
    answer = None if hasattr(found := _format(subject, sample), "load") else _answer(found.parse(data))
    if answer is None:
        cuts: Sequence[int] = sorted({0, 1, len(data) // 4, len(data) // 2, len(data) * 3 // 4})
    else:
        needed = max((stop for *_, (_, stop) in answer), default=0)
        exact = getattr(found, "file_bytes", 0) == len(data)
        cuts = [n for n in _cuts(data, answer) if n < (len(data) if exact else needed)]
    with _folder_of(subject, sample.name, data) as path:
        for cut in reversed(cuts):
            os.truncate(path, cut)
            _refused(subject, sample.name, path, cut, f"the first {cut} of {len(data)} bytes")


def refuses_broken_files(subject: Subject, sample: Sample) -> None:
    """The files that the caller says are broken are FormatErrors that name them."""
    if not subject.broken:
        raise Unproven("pass broken={what is wrong: bytes}: tensors that overlap, lie outside of the file …")
    for what, content in subject.broken.items():
        data = content if isinstance(content, bytes) else content.read_bytes()
        with _folder_of(subject, sample.name, data) as path:
            _refused(subject, sample.name, path, len(data), repr(what))


def survives_damage(subject: Subject, sample: Sample) -> None:
    """Whatever bytes stand in a head, the answer is tensors that fit into the file, or a FormatError; and it comes."""
    data = sample.data()
    found = _format(subject, sample)
    whole = hasattr(found, "load")
    starts = [] if whole else [start for *_, (start, stop) in _answer(found.parse(data)) if stop > start]
    head_bytes = min(starts, default=len(data))
    chance = random.Random(20261122)
    count = _DAMAGES if head_bytes <= _ALL_CUTS and not whole else _DAMAGES // 10
    with _folder_of(subject, sample.name, data) as path, path.open("r+b", buffering=0) as f:
        for at, damage in _damages(head_bytes, count, chance):
            f.seek(at)
            f.write(damage[: len(data) - at])
            try:
                with _weight_file(subject, path, len(data)) as file:
                    file.tensors()
            except _REFUSALS:
                pass
            except Exception as e:  # a stranger's code may raise anything
                cause = e.__cause__ or e
                raise Broken(f"with {damage!r} at byte {at}: {type(cause).__name__}: {cause}") from e
            f.seek(at)
            f.write(data[at : at + len(damage)])


# -- what the checks share ------------------------------------------------------------------------------------------


def _format(subject: Subject, sample: Sample) -> Any:
    found = subject.recognise(sample.name, sample.data()[:HEAD_BYTES])
    if found is None:
        raise Unproven("the file is not recognised")
    return found


def _answer(answer: Any) -> list[tuple[str, str, tuple[int, ...], tuple[int, int]]]:
    """Return what parse() said in a form that can be compared."""
    if isinstance(answer, NeedBytes):
        raise Broken(f"asks for {answer.count} bytes when it has seen the whole file")
    for tensor in answer:
        if not isinstance(tensor, TensorInfo):
            raise Broken(f"parse() gives a {type(tensor).__name__}, not a TensorInfo")
    return sorted((t.name, t.dtype, tuple(t.shape), (t.span.start, t.span.stop)) for t in answer)


def _cuts(data: bytes, answer: Any) -> list[int]:
    """Return lengths at which a head may end: every one in a short head, and around every border in a long one."""
    starts = [start for *_, span in answer for start in span]
    head_bytes = min(starts, default=len(data))
    borders = {len(data), HEAD_BYTES, head_bytes, *(1 << n for n in range(40)), *starts[:10], *starts[-10:]}
    near = {border + step for border in borders for step in (-1, 0, 1)}
    cuts = near | set(range(head_bytes + 1 if head_bytes <= _ALL_CUTS else _FIRST_CUTS))
    return sorted(n for n in cuts if 0 <= n <= len(data))


def _damages(head_bytes: int, count: int, chance: random.Random) -> Iterator[tuple[int, bytes]]:
    """Yield what to write where: single bytes, digits and letters of formats that are text, numbers out of all bounds."""
    wide = (b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"99999999", b"-1", b"[[[[[[[[", b"1e400,")
    for at in range(min(head_bytes, count // 4)):
        yield from ((at, damage) for damage in (b"\0", b"\xff", b"9", wide[at % len(wide)]))
    for _ in range(count):
        if head_bytes:
            damage = chance.choice(
                [*wide, bytes([chance.randrange(256)]), bytes([chance.choice(b'0123456789[]{}",:-')])]
            )
            yield chance.randrange(head_bytes), damage


def _refused(subject: Subject, name: str, path: Path, size: int, what: str) -> None:
    try:
        with _weight_file(subject, path, size) as file:
            tensors = file.tensors()
    except UnsupportedSourceError:
        return  # no longer recognised
    except FormatError as e:
        if name not in e.message:
            raise Broken(f"{what}: the message does not name the file: {e.message}") from e
        return
    except Exception as e:  # a stranger's code may raise anything
        cause = e.__cause__ or e
        raise Broken(f"{what}: {type(cause).__name__} instead of FormatError: {cause}") from e
    raise Broken(f"{what}: read as if it were sound ({len(tensors)} tensors)")


@contextmanager
def _folder_of(subject: Subject, name: str, data: bytes) -> Iterator[Path]:
    path = subject.new_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    yield path
    path.unlink()


@contextmanager
def _on_disk(subject: Subject, name: str, data: bytes) -> Iterator[WeightFile]:
    with _folder_of(subject, name, data) as path, _weight_file(subject, path, len(data), name) as file:
        yield file


@contextmanager
def _weight_file(subject: Subject, path: Path, size: int, name: str | None = None) -> Iterator[WeightFile]:
    """Give the file at *path* as a load sees it once it is complete."""
    name = name or path.name
    transfer = Transfer()
    transfer.apply(
        {"kind": "manifest", "path": str(path.parent), "source": "org/sample", "revision": "main", "commit": "0" * 40,
         "endpoint": "", "weights": [name], "files": [{"path": name, "size": size, "digest": None}]}
    )  # fmt: skip
    transfer.apply({"kind": "ready", "file": name, "final": str(path)})
    try:
        yield WeightFile(transfer, name, subject.pm)
    finally:
        transfer.close()
