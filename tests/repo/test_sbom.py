"""The bill of materials agrees with what is pinned and with what is installed."""

from __future__ import annotations

import json
import runpy
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MAKER = runpy.run_path(str(ROOT / "deploy" / "sbom.py"))  # leaves no bytecode in deploy/
BILL = json.loads((ROOT / "deploy" / "sbom.cdx.json").read_text(encoding="utf-8"))
VERSIONS = {component["name"]: component["version"] for component in BILL["components"]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_TESTS = {
    MAKER["normalised"](Requirement(text).name)
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
}


def installed(name):
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("pin", MAKER["roots"](), ids=lambda pin: pin.name)
def test_a_pin_is_in_the_bill_and_is_what_is_installed(pin):
    name = MAKER["normalised"](pin.name)
    assert str(pin.specifier) == f"=={VERSIONS[name]}"
    if name not in FOR_TESTS and installed(name) != VERSIONS[name]:
        pytest.skip(f"{name} {installed(name)} is here: the tests' environment does not pin this extra")
    assert installed(name) == VERSIONS[name]


def test_everything_that_is_needed_here_is_in_the_bill():
    here = [pin for pin in MAKER["roots"]() if installed(pin.name)]
    missing = set(MAKER["resolve"](here)) - set(VERSIONS)
    # A torch for CUDA brings these from its index; docs/security.md answers for them.
    assert {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))} == set()
    others = {
        name: f"{version}, here {installed(name)}" for name, version in VERSIONS.items() if installed(name) != version
    }
    if others:
        warnings.warn(f"versions that nothing pins are not the bill's: {others}", stacklevel=1)


def test_the_bill_is_cyclonedx_sorted_and_the_same_every_time():
    assert (
        (BILL["bomFormat"], BILL["specVersion"]) == ("CycloneDX", "1.6")
        and "serialNumber" not in BILL
        and "timestamp" not in BILL["metadata"]
    )
    assert list(VERSIONS) == sorted(VERSIONS) and len(VERSIONS) == len(BILL["components"])
    for component in BILL["components"]:
        assert component["purl"] == component["bom-ref"] == f"pkg:pypi/{component['name']}@{component['version']}"
        assert component["licenses"][0]["expression"]
    refs = {component["bom-ref"] for component in BILL["components"]}
    assert {edge["ref"] for edge in BILL["dependencies"]} == refs | {"mmcot"}
    assert all(set(edge["dependsOn"]) <= refs for edge in BILL["dependencies"])


def test_every_licence_that_asks_for_more_than_a_notice_is_answered():
    answers = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    asking = {
        c["name"]
        for c in BILL["components"]
        if any(word in c["licenses"][0]["expression"] for word in ("GPL", "MPL", "EPL", "CDDL", "SSPL", "LicenseRef"))
    }
    assert {name for name in asking if f"`{name}`" not in answers} == set() and asking
