"""Builds the emulated CUDA runtime for the CUDA build of torch in this Python's environment. Needs gcc and binutils.

    python build.py FOLDER      writes libcudart, libcuda, libnvidia-ml and stubs of cuBLAS, cuDNN, NCCL … to FOLDER
    python build.py sanitize    runs stress.c under the thread and address sanitizers

What the runtime does not implement is a stub that fails and says its name. The stubs of the other libraries hold just
the functions that torch's libraries refer to, each returning an error: with them torch loads without 4 GB of wheels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-pthread"]
#: Answers other than "not supported"; their signatures differ between releases, so one untyped definition serves all.
SPECIAL = {
    r"cudaStreamGetCaptureInfo(_v\d)?(_ptsz)?": (
        "int {name}(void *stream, int *status) {{ (void)stream; *status = 0; return 0; }}"
    ),
    r"cudaEventElapsedTime_v2": (
        "int cudaEventElapsedTime(float *, void *, void *);\n"
        "int {name}(float *ms, void *a, void *b) {{ return cudaEventElapsedTime(ms, a, b); }}"
    ),
}
#: Libraries whose symbols have no version, or one that is not called after the library: known by prefix.
PREFIXES = {"libcufile": "cuFile", "libcusparseLt": "cusparseLt", "libnccl": "nccl", "libnvshmem_host": "nvshmem"}
OWN = ("libcudart", "libcuda.", "libnvidia-ml")


def run(*command: str | Path) -> str:
    """Return what *command* prints."""
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout


def torch_folder() -> Path:
    """Return where torch is, without importing it (it may not load yet)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("build.py: this Python has no torch")
    return Path(spec.origin).parent


def real_runtime() -> Path:
    """Return the runtime of the nvidia-cuda-runtime wheel: its headers stand beside it."""
    site = torch_folder().parent
    found = [*site.glob("nvidia/cu[0-9]*/lib/libcudart.so.*"), *site.glob("nvidia/cuda_runtime/lib/libcudart.so.*")]
    if not found:
        raise SystemExit("build.py: no CUDA build of torch, or no nvidia-cuda-runtime beside it")
    return sorted(found)[-1]


def defined(path: Path, *flags: str) -> set[str]:
    """Return the functions that *path* defines."""
    lines = (line.split() for line in run("nm", *flags, "--defined-only", path).splitlines())
    return {words[-1] for words in lines if len(words) == 3 and words[1] in "TW"}


def build_runtime(out: Path, work: Path) -> None:
    """Build libcudart, with a stub for each function of the real one that is not implemented."""
    real = real_runtime()
    include = real.parent.parent / "include"
    soname = re.findall(r"SONAME.*\[(.*)\]", run("readelf", "-d", real))[0]
    objects = []
    for name in ("runtime", "kernels"):
        objects.append(work / f"{name}.o")
        run("gcc", *FLAGS, f"-I{HERE}", f"-I{include}", "-c", HERE / f"{name}.c", "-o", objects[-1])
    exported = defined(real, "-D")
    versions = {symbol.partition("@@")[2] for symbol in exported if "@@" in symbol}
    missing = {symbol.partition("@@")[0] for symbol in exported} - set().union(*map(defined, objects))
    stubs = work / "stubs.c"
    head = "int fakecuda_unsupported(const char *);\n#pragma GCC visibility push(default)\n"
    stubs.write_text(head + "".join(f"{stub_of(name)}\n" for name in sorted(missing)))
    version = versions.pop() if len(versions) == 1 else "LIBCUDART"
    exports = work / "exports.map"
    exports.write_text(f"{version} {{\n  global: cuda*; __cuda*; fakecuda_*;\n  local: *;\n}};\n")
    run("gcc", *FLAGS, "-Wno-builtin-declaration-mismatch", "-c", stubs, "-o", work / "stubs.o")
    run("gcc", "-shared", "-pthread", "-o", out / soname, *objects, work / "stubs.o", f"-Wl,-soname,{soname}",
        f"-Wl,--version-script={exports}", "-Wl,-z,defs", "-ldl")  # fmt: skip
    run("gcc", *FLAGS, "-shared", "-o", out / "libcuda.so.1", HERE / "driver.c", "-Wl,-soname,libcuda.so.1",
        f"-L{out}", f"-l:{soname}", "-Wl,-rpath,$ORIGIN")  # fmt: skip
    run("gcc", *FLAGS, "-shared", "-o", out / "libnvidia-ml.so.1", HERE / "nvml.c", "-Wl,-soname,libnvidia-ml.so.1")


def stub_of(name: str) -> str:
    """Return the definition of a function that is not implemented."""
    for pattern, text in SPECIAL.items():
        if re.fullmatch(pattern, name):
            return text.format(name=name)
    return f'int {name}(void) {{ return fakecuda_unsupported("{name}"); }}'


def build_other_libraries(out: Path, work: Path) -> None:
    """Build a stub of every other NVIDIA library that torch's libraries need."""
    sonames: set[str] = set()
    wanted: set[str] = set()
    for library in (torch_folder() / "lib").glob("lib*.so"):
        sonames.update(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)[^\]]*\.so\.[^\]]*)\]", run("readelf", "-d", library)))
        wanted.update(line.split()[-1] for line in run("nm", "-D", "--undefined-only", library).splitlines())
    for soname in sorted(name for name in sonames if not name.startswith(OWN)):
        prefix = PREFIXES.get(soname.partition(".so")[0])
        symbols = {s for s in wanted if s.endswith("@" + soname) or (prefix and s.startswith(prefix))}
        source, script = work / "stub.c", work / "stub.map"
        source.write_text("".join(f"{line}\n" for line in error_functions(symbols)))
        script.write_text("".join(f"{node}\n" for node in version_nodes(symbols)))
        versions = [f"-Wl,--version-script={script}"] if script.stat().st_size else []
        run("gcc", "-shared", "-fPIC", "-w", source, "-o", out / soname, f"-Wl,-soname,{soname}", *versions)


def error_functions(symbols: Iterable[str]) -> Iterator[str]:
    """Yield a definition for each of *symbols* that returns 1, an error in all of these libraries."""
    for name in sorted({symbol.partition("@")[0] for symbol in symbols}):
        value = '(long)"a stub of fakecuda"' if re.search("String|LastError", name) else "1"
        yield f"long {name}(void) {{ return {value}; }}"


def version_nodes(symbols: set[str]) -> Iterator[str]:
    """Yield one node of a version script for each version that *symbols* have."""
    for version in sorted({symbol.partition("@")[2] for symbol in symbols if "@" in symbol}):
        names = sorted(symbol.partition("@")[0] for symbol in symbols if symbol.endswith("@" + version))
        yield f"{version} {{ global: {'; '.join(names)}; }};"


def sanitize(work: Path) -> None:
    """Run stress.c under the sanitizers, in several schedules."""
    include = real_runtime().parent.parent / "include"
    for sanitizer in ("thread", "address,undefined"):
        program = work / "stress"
        sources = [HERE / f"{name}.c" for name in ("stress", "runtime", "kernels")]
        run("gcc", "-std=c11", "-O1", "-g", "-w", "-pthread", f"-fsanitize={sanitizer}", f"-I{HERE}", f"-I{include}",
            *sources, "-o", program, "-ldl")  # fmt: skip
        for setting in ("LATENCY_US=50", "SCHEDULE=late", "CHECK=1", "GBPS=5", "JITTER_US=100"):
            name, _, value = setting.partition("=")
            environment = {"FAKECUDA_LATENCY_US": "20", f"FAKECUDA_{name}": value, "ASAN_OPTIONS": "detect_leaks=0"}
            print(sanitizer, setting, flush=True)
            subprocess.run([program], check=True, timeout=120, env={**os.environ, **environment})


def main() -> None:
    """Build, or check."""
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["sanitize"]:
            sanitize(Path(folder))
            return
        out = Path(sys.argv[1])
        out.mkdir(parents=True, exist_ok=True)
        build_runtime(out, Path(folder))
        build_other_libraries(out, Path(folder))
        print(f"{len(list(out.glob('lib*.so.*')))} libraries in {out}")


if __name__ == "__main__":
    main()
