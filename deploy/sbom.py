"""The software bill of materials of the pinned dependencies, from the installed packages.

    python deploy/sbom.py    # writes deploy/sbom.cdx.json and prints the licences

The file is CycloneDX 1.6, sorted, without a time or a serial number. Roots are the dependencies
and extras of pyproject.toml, without those of tests and development. From the roots the script
follows the installed metadata, so the list contains what this platform needs. A required package
that is not installed is an error.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SBOM = ROOT / "deploy" / "sbom.cdx.json"
NOT_SHIPPED = {"test", "dev"}
# SPDX expressions of the licence texts and classifiers of metadata without one; "OSI Approved" alone names no licence.
SPDX = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "mit": "MIT",
    "mit license": "MIT",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd-2-clause": "BSD-2-Clause",
    "psfl": "PSF-2.0",
    "psf-2.0": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "mpl-2.0": "MPL-2.0",
    "mpl-2.0 and mit": "MPL-2.0 AND MIT",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
}
# Read by hand in the package's licence file, where its metadata has no licence or two different ones.
READ_BY_HAND = {
    "hjson": "MIT OR AFL-2.1",
    "huey": "MIT",
    "pyasn1-modules": "BSD-2-Clause",
    "python-dateutil": "Apache-2.0 AND BSD-3-Clause",
    "skops": "MIT",
}


def normalised(name: str) -> str:
    """Return a package's name in the normalised form of package indexes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def roots() -> list[Requirement]:
    """Return the requirements of pyproject.toml that a user installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for name in extras if name not in NOT_SHIPPED for text in extras[name])]
    return [Requirement(text) for text in texts]


def resolve(wanted: list[Requirement]) -> dict[str, dict[str, Any]]:
    """Return every distribution that these need on this platform, by normalised name, with its needs."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(requirement, "pyproject.toml") for requirement in wanted]
    while waiting:
        requirement, wanted_by = waiting.pop()
        name, extras = normalised(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            raise SystemExit(
                f"{requirement} (wanted by {wanted_by}) is not installed; pip install '.[lora,optuna,s3,server]' first"
            ) from None
        entry = found.setdefault(name, {"distribution": distribution, "needs": set()})
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                entry["needs"].add(normalised(needed.name))
                waiting.append((needed, name))
    return found


def licence_of(distribution: metadata.Distribution) -> str:
    """Return a distribution's licence as an SPDX expression."""
    about = cast(Message, distribution.metadata)  # its type has no get() before Python 3.12
    name = normalised(about["Name"])
    if name in READ_BY_HAND:
        return READ_BY_HAND[name]
    if expression := about.get("License-Expression"):
        return expression
    classifiers = [
        text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or [] if text.startswith("License :: ")
    ]
    for words in ((about.get("License") or "").strip(), *classifiers):
        if spdx := SPDX.get(words.lower()):
            return spdx
    raise SystemExit(
        f"{name}: no licence that is known in its metadata ({about.get('License')!r:.80}, {classifiers}); read its "
        "file, and add it to READ_BY_HAND"
    )


def bill() -> dict[str, Any]:
    """Return the bill of materials in CycloneDX's form."""
    found = resolve(roots())
    # A suffix such as +cpu names a build of the same release.
    versions = {name: found[name]["distribution"].version.partition("+")[0] for name in sorted(found)}
    refs = {name: f"pkg:pypi/{name}@{version}" for name, version in versions.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = {
        "type": "application",
        "bom-ref": project["name"],
        "name": project["name"],
        "version": project["version"],
        "licenses": [{"expression": project["license"]}],
    }
    components = [
        {
            "type": "library",
            "bom-ref": refs[name],
            "name": name,
            "version": versions[name],
            "purl": refs[name],
            "licenses": [{"expression": licence_of(found[name]["distribution"])}],
        }
        for name in versions
    ]
    edges = [
        {"ref": refs[name], "dependsOn": sorted(refs[needed] for needed in found[name]["needs"])} for name in versions
    ]
    edges.insert(0, {"ref": own["bom-ref"], "dependsOn": sorted({refs[normalised(root.name)] for root in roots()})})
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own},
        "components": components,
        "dependencies": edges,
    }


if __name__ == "__main__":
    made = bill()
    SBOM.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    licences = Counter(component["licenses"][0]["expression"] for component in made["components"])
    print(
        f"{SBOM}: {len(made['components'])} packages",
        *(f"{number:4} {licence}" for licence, number in licences.most_common()),
        sep="\n",
    )
