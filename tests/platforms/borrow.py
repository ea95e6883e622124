"""Let this environment use what another one has installed: torch and transformers are 1 GB that each platform's would hold.

    python tests/platforms/borrow.py ENVIRONMENT REQUIREMENT…

The packages of ENVIRONMENT, of the same Python, become visible behind this environment's own, if then every requirement is
met, and what these require in turn. Otherwise pip installs the requirements here.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

HERE = sysconfig.get_path("purelib")


def unmet(requirements: list[str], paths: list[str]) -> str | None:
    """Return a requirement that the packages in *paths* do not meet, those that the requirements have included."""
    seen: set[str] = set()
    wanted = [(Requirement(text), "") for text in requirements]
    while wanted:
        requirement, extra = wanted.pop()
        if str(requirement) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add(str(requirement))
        found = next(iter(metadata.distributions(name=requirement.name, path=paths)), None)
        if found is None or not requirement.specifier.contains(found.version, prereleases=True):
            return f"{requirement}, {found.version if found else 'nothing'} found"
        for text in found.requires or ():
            wanted += [(Requirement(text), extra) for extra in ("", *requirement.extras)]
    return None


def main(environment: str, *requirements: str) -> None:
    lent = sysconfig.get_path("purelib", vars={"base": environment, "platbase": environment})
    link = Path(HERE, "borrowed.pth")
    link.unlink(missing_ok=True)
    missing = unmet([*requirements], [HERE, lent])
    if missing is None:
        link.write_text(f"{lent}\n")
        print(f"uses the packages of {environment}")
    else:
        print(f"{environment} is of no use here: {missing}", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", *requirements], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
