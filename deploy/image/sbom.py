"""`python sbom.py DIRECTORY VERSION`: what Python packages an image has, as CycloneDX 1.6 on stdout.

Needs nothing but the standard library, and says the same whenever it is run: no time, no random number.
"""

import json
import sys
from importlib.metadata import Distribution, distributions
from typing import Any


def bill(directory: str, version: str) -> dict[str, Any]:
    """The bill of materials of Holdfast `version` with the packages that are installed in a directory."""
    found = sorted(distributions(path=[directory]), key=_name)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": "holdfast", "name": "holdfast", "version": version}
        },
        "components": [_component(one) for one in found],
    }


def _name(one: Distribution) -> str:
    return one.metadata["Name"].lower().replace("_", "-").replace(".", "-")


def _component(one: Distribution) -> dict[str, Any]:
    url = f"pkg:pypi/{_name(one)}@{one.version}"
    component = {"type": "library", "bom-ref": url, "name": _name(one), "version": one.version, "purl": url}
    if "License-Expression" in one.metadata:
        return component | {"licenses": [{"expression": one.metadata["License-Expression"]}]}
    classifiers = one.metadata.get_all("Classifier") or []
    said = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License")]
    return component | ({"licenses": [{"license": {"name": name}} for name in said]} if said else {})


if __name__ == "__main__":
    json.dump(bill(sys.argv[1], sys.argv[2]), sys.stdout, indent=1)
