"""The parts of benchmarks/gpu_proof.py as tests: each part runs once, and each test asserts some of its checks."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    """Skip these tests where there is no GPU."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (reason := missing_gpu()):
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


def missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device here"


@pytest.fixture(scope="session", autouse=True)
def _repository_on_the_path():
    """Find the parts in this process and in those that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        yield


@pytest.fixture(scope="session")
def part(tmp_path_factory):
    """A function that runs a part at its tiny size in a process of its own and returns what its JSON contains."""
    out = tmp_path_factory.mktemp("gpu_proof")

    @cache
    def run(name: str, *options: str) -> dict[str, Any]:
        from benchmarks import gpu_proof

        arguments = ["--out", str(out / "-".join([name, *options])), "--size", "tiny", "--parts", name, *options]
        parsed = gpu_proof.parse(arguments)
        parsed.out.mkdir(parents=True)
        return gpu_proof.run_in_process(name, parsed)

    def result_of(name: str, *options: str) -> dict[str, Any]:
        result = run(name, *options)
        assert "error" not in result, result["error"]
        return result

    return result_of


def assert_checks(result: dict[str, Any], *texts: str, at_least: int = 1) -> None:
    """All checks whose names contain one of the texts hold, and there are so many of them."""
    chosen = {check: holds for check, holds in result["checks"].items() if any(text in check for text in texts)}
    assert len(chosen) >= at_least, (
        f"{len(chosen)} checks contain {texts}, expected {at_least}: {list(result['checks'])}"
    )
    wrong = [check for check, holds in chosen.items() if not holds]
    assert not wrong, (
        f"{wrong}; the part found { ({name: value for name, value in result.items() if name != 'checks'}) }"
    )


@pytest.fixture
def asserted():
    """``assert_checks``."""
    return assert_checks
