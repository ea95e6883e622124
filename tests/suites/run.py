"""Runs parts of the libraries' own test suites with and without ``fastload.accelerate()``, and compares every outcome.

    python tests/suites/run.py FOLDER [SUITE …]

FOLDER holds the source distributions (``pip download --no-deps --no-binary :all:``). Nothing is asked of the internet: tests
that need it (those marked so are not run) fail in both runs, and count as what they are. Ends with 1 if any outcome differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """Part of one library's tests.

    Attributes:
        archive: Start of the name of the source distribution.
        tests: Paths in it.
        beside: Files that the distribution lacks: path in it → text.
        only: As pytest's ``-k``.
        refused: Tests that put bytes into the cache under a digest that is not theirs, and must fail for it.
        without: Start of a test's name → what it needs and cannot have here; it is left out.
    """

    archive: str
    tests: tuple[str, ...]
    beside: dict[str, str]
    only: str = ""
    refused: frozenset[str] = frozenset()
    without: Mapping[str, str] = field(default_factory=dict)


SUITES = {
    "huggingface_hub": Suite(
        "huggingface_hub",
        (
            "tests/test_file_download.py",
            "tests/test_snapshot_download.py",
            "tests/test_local_folder.py",
            "tests/test_tree_cache.py",
            "tests/test_shared_blobs.py",
            "tests/test_hub_mixin_pytorch.py",
            "tests/test_offline_utils.py",
        ),
        {"tests/__init__.py": "", "tests/conftest.py": (HERE / "hub_conftest.py").read_text()},
        refused=frozenset(
            f"tests.test_shared_blobs.TestDownloadIntegration.{name}"
            for name in (
                "test_disable_xet_bypasses_prepopulated_store",
                "test_http_fallback_does_not_publish",
                "test_store_enabled_by_default_and_can_be_disabled",
            )
        ),
        without={
            "tests/test_file_download.py::TestStagingDownload::test_download_from_a_gated_repo_with_hf_hub_download": (
                "a hub whose repositories can be made gated over HTTP"
            ),
            "tests/test_snapshot_download.py::TestSnapshotDownload::test_xet_file_skips_per_file_head_call": (
                "a hub that stores files with Xet"
            ),
            "tests/test_snapshot_download.py::TestResolveRevision::test_resolve_revision_for_another_repo": (
                "a hub with data sets"
            ),
            "tests/test_hub_mixin_pytorch.py::TestPytorchHubMixin::test_push_to_hub": "a hub that takes uploads over HTTP",
        },
    ),
    "transformers": Suite(
        "transformers",
        ("tests/test_bert.py",),
        {
            "tests/__init__.py": "",
            "tests/test_bert.py": (HERE / "bert.py").read_text(),
            "tests/exporters/test_export.py": "class ExportTesterMixin: pass",
            "tests/generation/test_utils.py": "class GenerationTesterMixin: pass",
        },
        "save_load or from_pretrained or load_save or tied or keep_in_fp32 or mismatched or checkpoint or safetensors",
    ),
}


def outcomes(suite: Suite, root: Path, accelerated: bool) -> dict[str, str]:
    """Run *suite* in *root* and return how each test ended."""
    with tempfile.TemporaryDirectory(prefix="fastload-suite-") as home:
        report = Path(home, "report.xml")
        plugin = ["-p", "accelerated"] if accelerated else []
        only = ["-k", suite.only] if suite.only else []
        only += [f"--deselect={test}" for test in suite.without]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FASTLOAD_"))}
        environ |= {"HF_HOME": home, "HF_XET_CACHE": home, "HF_ENDPOINT": "http://127.0.0.1:9"}
        environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(HERE), "PYTHONHASHSEED": "0"}
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=",
             "--timeout", "60", "-m", "not production", f"--rootdir={root}", f"--junitxml={report}",
             *plugin, *only, *suite.tests],
            cwd=root, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            ends = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            found[f"{case.get('classname')}.{case.get('name')}"] = ends[0] if ends else "passed"
        return found


def compare(name: str, folder: Path) -> bool:
    """Run the suite *name* both ways; print the figures; tell whether they are the same."""
    suite = SUITES[name]
    [archive] = folder.glob(f"{suite.archive}-*.tar.gz")
    with tempfile.TemporaryDirectory(prefix="fastload-suite-") as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        [root] = Path(scratch).iterdir()
        for path, text in suite.beside.items():
            root.joinpath(path).parent.mkdir(exist_ok=True)
            root.joinpath(path).write_text(text)
        plain, ours = outcomes(suite, root, False), outcomes(suite, root, True)
    counts = Counter(plain.values())
    refused = {test for test in suite.refused if ours.get(test) == "failure"}
    different = {test for test in plain.keys() | ours.keys() if plain.get(test) != ours.get(test)} ^ refused
    figures = (
        f"{archive.name}: {len(plain)} tests, {dict(counts)}; with accelerate(): {len(refused)} wrong digests refused"
    )
    print(f"{figures}, {len(different)} other differences")
    for test, needed in suite.without.items():
        print(f"  {test}: left out, needs {needed}")
    for test in sorted(different):
        print(f"  {test}: {plain.get(test)} / {ours.get(test)}")
    return not different and counts["passed"] > 0


if __name__ == "__main__":
    results = [compare(name, Path(sys.argv[1])) for name in sys.argv[2:] or SUITES]
    sys.exit(0 if all(results) else 1)
