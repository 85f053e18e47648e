"""``mmcot rationales --model``: any model over any shards, as a person types it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from launcher.cli.main import app


@pytest.mark.ray
def test_rationales_of_any_model_are_written_over_any_shards_and_only_once(model_dir, tiny_data, ray_up, tmp_path):
    def run(*arguments, out="out", model=model_dir):
        command = [
            "rationales",
            "--model",
            str(model),
            "--shards",
            str(tiny_data.path),
            "--split",
            "test",
            "--out",
            str(tmp_path / out),
        ]
        return CliRunner().invoke(
            app, [*command, "--set", "rationale.max_target_tokens=8", "--set", "cluster.num_workers=1", *arguments]
        )

    refused = run()
    assert refused.exit_code == 1 and "has no mmcot.json; give --set rationale.format=QCM-E" in refused.output
    first = run("--set", "rationale.format=QCM-E")
    assert first.exit_code == 0 and "16 texts" in first.output, first.output
    path = tmp_path / "out" / "test" / "000000-000000.jsonl"
    before = path.stat().st_mtime_ns
    assert run("--set", "rationale.format=QCM-E").exit_code == 0 and path.stat().st_mtime_ns == before
    other = run("--set", "rationale.format=QCM-LE")
    assert other.exit_code == 1 and "outputs of different inputs are not mixed" in other.output
