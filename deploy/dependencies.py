"""`python -m deploy.dependencies`: licences and known vulnerabilities of what Holdfast is built on.

Licences are those of what runs in a pod, and of what that needs in turn; one that is not in ALLOWED, or that nobody
tells, fails. It needs no network. Vulnerabilities are looked for in all that is locked, where the service that knows
them can be asked; where it cannot, that is said and is no failure.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# They ask for a notice at most; of MPL 2.0 (certifi) only changes to its own files are bound.
ALLOWED = {
    "Apache-2.0", "Apache Software License", "BSD-2-Clause", "BSD-3-Clause", "3-Clause BSD License", "BSD License",
    "ISC", "MIT", "MIT License", "MIT-0", "Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0", "PSF-2.0",
    "Python Software Foundation License", "Unlicense", "Zlib",
}  # fmt: skip
AUDIT_SECONDS_MAX = 120
ANSWER_SECONDS_MAX = 10


def runtime() -> set[str]:
    """The names of what a pod needs, and of what that needs, on this machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        asked = waiting.pop()
        known = (canonicalize_name(asked.name), tuple(sorted(asked.extras)))
        if known not in seen:
            seen.add(known)
            waiting += _needs(asked)
    return {name for name, _ in seen}


def _needs(asked: Requirement) -> Iterator[Requirement]:
    for text in metadata.requires(asked.name) or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *asked.extras)):
            yield needed


def allowed(licence: str) -> bool:
    """Whether an expression is met by licences that are: all of A AND B (or A; B), one of A OR B."""
    return all(
        any(option.strip(" ()") in ALLOWED or option.strip() in ALLOWED for option in part.split(" OR "))
        for part in re.split(r" AND |; ", licence)
    )


def licences() -> list[str]:
    """What is wrong with the licences of what runs in a pod."""
    names = sorted(runtime())
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--format=json", "--packages", *names]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    told = {str(canonicalize_name(one["Name"])): one["License"] for one in found}
    return [
        f"{name}: licence {told.get(name, 'UNKNOWN')} is not allowed"
        for name in names
        if not allowed(told.get(name, "UNKNOWN"))
    ]


def vulnerabilities() -> tuple[list[str], str]:
    """Known vulnerabilities of what is locked; and a remark, where not all of it could be asked about."""
    command = [
        sys.executable, "-m", "pip_audit", "-r", str(ROOT / "requirements.lock"), "--disable-pip", "--require-hashes",
        "--timeout", str(ANSWER_SECONDS_MAX), "--progress-spinner", "off", "--format", "json",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=AUDIT_SECONDS_MAX)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        return [], "vulnerabilities not looked for: the service that knows them does not answer"
    skipped = sum("skip_reason" in one for one in packages)
    found = [
        f"{one['name']} {one['version']}: {issue['id']}, mended in {', '.join(issue['fix_versions']) or 'no version'}"
        for one in packages
        for issue in one.get("vulns", ())
    ]
    remark = f"vulnerabilities not looked for in {skipped} of {len(packages)} packages: the service does not know them"
    return found, remark if skipped else ""


def main() -> int:
    bad = licences()
    found, remark = vulnerabilities()
    for line in (*bad, *found, *([remark] if remark else ())):
        sys.stdout.write(f"{line}\n")
    return 1 if bad or found else 0


if __name__ == "__main__":
    sys.exit(main())
