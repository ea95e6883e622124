"""The recipes of docs/build-step.md leave a cache from which a program starts with no request, and read-only.

They run as an image would run them: commands, order, variables; folders of the image lie below a temporary root.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, snippets, transferred_bytes, weights_bytes

from fastload.cache import RepoCache
from fastload.lock import Lock
from fastload.testing import Hub

PAGE = "build-step.md"
#: Paths that the recipes name, which must not be those of this machine.
ABSOLUTE = re.compile(r"(?<![\w.])/(?=(app|models|mnt|root|data)\b)")
LOADS = "import fastload, sys; print(len(fastload.load_tensors(sys.argv[1], lock=sys.argv[2] or None)))"
TOKEN = "hf_" + "secret" * 5


@dataclass
class Image:
    """A temporary root, and what an image's configuration says. Commands are run at once, with its variables."""

    root: Path
    hub: Hub
    environ: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"

    def path(self, inside: str) -> Path:
        """Return where a path inside the image lies."""
        return self.root / os.path.join(self.workdir, inside).lstrip("/")

    def run(self, command: str, **environ: str) -> str:
        """Run *command* in its shell; return what it printed."""
        scripts = Path(sys.executable).parent
        inside = {name: self.below(value) for name, value in {**self.environ, **environ}.items()}
        done = subprocess.run(
            ["sh", "-c", self.below(command)],
            cwd=self.path(""), capture_output=True, text=True, timeout=120,
            env={
                "PATH": f"{scripts}:/usr/bin:/bin", "HOME": str(self.root / "root"), "HF_ENDPOINT": self.hub.endpoint,
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **inside,
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def below(self, text: str) -> str:
        """Put the absolute paths of a command below the temporary root."""
        return ABSOLUTE.sub(f"{self.root}/", text)


@pytest.fixture
def image(tmp_path: Path, tiny_model: Path, make_hub: Callable[..., Hub]) -> Image:
    """An image before its first step, and the hub that its build may reach."""
    root = tmp_path / "root"
    (root / "root").mkdir(parents=True)
    return Image(root, make_hub({MODEL: tiny_model}, token=TOKEN))


@pytest.fixture
def lock(image: Image, tmp_path: Path) -> Path:
    """The lock beside the code, made with the page's own command."""
    [command] = re.findall(r"^    (fastload lock .*)$", (Path(__file__).parents[2] / "docs" / PAGE).read_text(), re.M)
    image.run(f"cd {tmp_path} && {command}")
    image.hub.clear()
    return tmp_path / "fastload.lock"


def arrived(image: Image, tiny_model: Path) -> None:
    """Assert that the build has fetched the weights, once; from here on there is no hub."""
    assert transferred_bytes(image.hub) == weights_bytes(tiny_model)
    image.hub.clear()


def starts(image: Image, source: str = MODEL, lock: str = "", **environ: str) -> None:
    """Assert that a fresh process loads, and asks nothing of a hub that would answer."""
    assert int(image.run(shlex.join([sys.executable, "-c", LOADS, source, lock]), **environ)) > 0
    assert image.hub.requests == []


def becomes_a_layer(image: Image) -> None:
    """Take from all files what a layer does not keep: parts of a second."""
    for path in image.root.rglob("*"):
        second_ns = path.lstat().st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(second_ns, second_ns), follow_symlinks=False)


def is_verified(image: Image, lock: Path) -> bool:
    """Tell whether no weights that the lock lists would be hashed again."""
    [manifest] = Lock.read(lock).manifests
    cache = RepoCache(Path(image.below(image.environ["HF_HOME"])) / "hub", manifest.source)
    snapshot = cache.snapshot_path(manifest.commit)
    weights = [file for file in manifest.files if file.path.endswith(".safetensors")]
    return all(file.digest and cache.is_trusted(file.digest, snapshot / file.path) for file in weights)


def commands(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile: name and the rest."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def test_dockerfile(image: Image, lock: Path, tiny_model: Path, make_hub: Callable[..., Hub]):
    """A gated model: the token comes as a secret and stays out of the image."""
    image.hub = make_hub({MODEL: tiny_model}, token=TOKEN, gated=[MODEL])
    program = snippets(PAGE, "")["app.py"]
    (lock.parent / "app.py").write_text(program)
    for instruction, rest in commands(snippets(PAGE, "Dockerfile")["Dockerfile"]):
        if instruction == "WORKDIR":
            image.workdir = rest
            image.path("").mkdir(parents=True)
        elif instruction == "ENV":
            image.environ |= [rest.split("=", 1)]  # type: ignore[arg-type]
        elif instruction == "COPY":
            name, target = rest.split()
            shutil.copy(lock.parent / name, image.path(target))
        elif instruction == "RUN":
            secret = re.match(r"--mount=type=secret,id=\w+,env=(\w+) ", rest)
            assert secret is not None
            # Files of one range are hashed whenever they are read; the weights here shall not be such.
            image.run(rest[secret.end() :], **{secret[1]: TOKEN}, FASTLOAD_RANGE_BYTES="65536")
            arrived(image, tiny_model)
            becomes_a_layer(image)
            assert is_verified(image, lock)
        elif instruction == "CMD":
            assert image.environ["HF_HUB_OFFLINE"] == "1"
            assert image.run(shlex.join(json.loads(rest))) == "LlamaForCausalLM\n"
        else:
            assert (instruction, rest) == ("FROM", "my-base")
    assert image.hub.requests == []
    assert not [p for p in image.root.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_truss(image: Image, lock: Path, tiny_model: Path):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(snippets(PAGE, "Truss")["config.yaml"])
    image.workdir = "/app"
    image.path("data").mkdir(parents=True)
    shutil.copy(lock, image.path("data"))
    for command in config["build_commands"]:  # without the deployment's variables
        image.run(command)
    arrived(image, tiny_model)
    starts(image, **config["environment_variables"])


def test_cog(image: Image, lock: Path, tiny_model: Path):
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load(snippets(PAGE, "Cog")["cog.yaml"])
    [manifest] = Lock.read(lock).manifests
    for command in config["build"]["run"]:
        image.run(command.replace("COMMIT", manifest.commit))
    arrived(image, tiny_model)
    starts(image, f"{MODEL}@{manifest.commit}", **dict(pair.split("=", 1) for pair in config["environment"]))


def test_modal(image: Image, lock: Path, tiny_model: Path):
    """The steps of the image, in the order of their calls; `.pip_install` is left to the reader."""
    tree = ast.parse(snippets(PAGE, "Modal")["app.py"])
    [chain] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "image"]  # type: ignore[attr-defined]
    for name, arguments in steps(chain):
        if name == "env":
            image.environ |= arguments[0]
        elif name == "add_local_file":
            shutil.copy(lock.parent / arguments[0], image.path(arguments[1]))
        elif name == "run_commands":
            image.run(*arguments)
            arrived(image, tiny_model)
        else:
            assert name == "debian_slim"
    assert image.environ["HF_HUB_OFFLINE"] == "1"
    starts(image, lock=str(image.path("/root/fastload.lock")), HF_HUB_OFFLINE="")  # with the lock it is not needed


def steps(chain: ast.expr) -> list[tuple[str, list[Any]]]:
    """Return the calls of a chain of methods, first call first."""
    if not isinstance(chain, ast.Call) or not isinstance(chain.func, ast.Attribute):
        return []
    return [*steps(chain.func.value), (chain.func.attr, [ast.literal_eval(argument) for argument in chain.args])]


def test_kserve_from_a_volume_that_is_mounted_read_only(image: Image, lock: Path, tiny_model: Path):
    yaml = pytest.importorskip("yaml")
    predictor = yaml.safe_load(snippets(PAGE, "KServe")["inference-service.yaml"])["spec"]["predictor"]
    [init], [container] = predictor["initContainers"], predictor["containers"]
    (image.root / "app").mkdir()
    shutil.copy(lock, image.root / "app")
    image.run(shlex.join(init["command"]), **variables(init))
    arrived(image, tiny_model)
    [mount] = container["volumeMounts"]
    assert mount["readOnly"]
    image.hub.close()
    volume = image.path(mount["mountPath"])
    before = {path: path.lstat().st_mtime_ns for path in volume.rglob("*")}
    assert int(read_only(image, volume, variables(container))) > 0
    assert {path: path.lstat().st_mtime_ns for path in volume.rglob("*")} == before


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    return {pair["name"]: pair["value"] for pair in container["env"]}


#: Root may write whatever the permissions say, so the folder is mounted read-only, for one process and its children.
READ_ONLY = (
    'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/written" 2>/dev/null && shift && exec "$@"'
)


def read_only(image: Image, folder: Path, environ: Mapping[str, str]) -> str:
    """Load the model in a process that sees *folder* read-only."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs unshare(1) and user namespaces")
    words = [sys.executable, "-c", LOADS, MODEL, ""]
    return image.run(shlex.join([unshare, "-rm", "sh", "-c", READ_ONLY, "sh", str(folder), *words]), **environ)


def test_a_changed_byte_fails_the_build(image: Image, lock: Path):
    text = lock.read_text()
    digest = re.findall(r"sha256:(\w{64})", text)[0]
    lock.write_text(text.replace(digest, digest[::-1]))
    with pytest.raises(AssertionError, match=r"IntegrityError|sha256"):
        image.run(f"fastload prefetch --locked {lock}", FASTLOAD_ATTEMPTS="1")
