"""The wheel works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the unpacked wheel, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("launcher", "mmcot", "data_shards"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    subprocess.run([*command, str(folder / "source")], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run_outside(site, tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_wheel_brings_every_preset(site, tmp_path):
    shipped = {path.name for path in (ROOT / "launcher" / "config" / "presets").glob("*.yaml")}
    assert {
        path.name for path in (site / "launcher" / "config" / "presets").glob("*.yaml")
    } == shipped and "demo.yaml" in shipped
    output = run_outside(site, tmp_path, "-m", "launcher", "config", "show", "--preset", "demo")
    assert "learning_rate: 0.001" in output


def test_the_wheel_brings_the_reports_page(site):
    shipped = {path.name for path in (ROOT / "launcher" / "report" / "page").iterdir()}
    assert {
        path.name for path in (site / "launcher" / "report" / "page").iterdir()
    } == shipped and "report.html" in shipped


def test_the_wheel_makes_and_describes_data_outside_the_checkout(site, tmp_path):
    code = "import launcher, sys; print(launcher.__file__)"
    assert str(site) in run_outside(site, tmp_path, "-c", code)
    run_outside(
        site,
        tmp_path,
        "-m",
        "launcher",
        "data",
        "make",
        "quiz",
        "--num-train",
        "16",
        "--num-val",
        "8",
        "--num-test",
        "8",
    )
    assert "32 questions" in run_outside(site, tmp_path, "-m", "launcher", "data", "describe", "quiz")


def test_the_wheel_holds_nothing_but_the_three_packages_and_a_licence(site):
    names = {path.name for path in site.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"launcher", "mmcot", "data_shards"}
    assert list(site.glob("*.dist-info/licenses/LICENSE"))


def test_what_is_sent_to_a_cluster_is_what_the_wheel_holds(site, tmp_path):
    from launcher.cluster.job_submission import write_package
    from launcher.config.loading import load_settings

    write_package(tmp_path, load_settings(preset="demo"))
    packages = ("launcher", "mmcot", "data_shards")
    held, sent = (
        {
            path.relative_to(root): path.read_bytes()
            for name in packages
            for path in (root / name).rglob("*")
            if path.is_file()
        }
        for root in (site, tmp_path)
    )
    assert sent == {path: data for path, data in held.items() if "__pycache__" not in path.parts}
    assert {path.name for path in tmp_path.iterdir()} == {*packages, "run.yaml"}
