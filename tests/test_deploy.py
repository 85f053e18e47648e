"""What stands in ray_cluster.yaml and deploy/ is valid, safe by default, and agrees with pyproject.toml.

Nothing is launched: the cluster file is held against the schema that the installed Ray ships, the Dockerfile is read
as text.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from launcher.config import load_settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENT_FILES = [ROOT / "ray_cluster.yaml", *(path for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file() and "secrets" not in path.parts)]

SECRET_KEY = re.compile(r"secret|password|passwd|access_?key|api_?key|private_?key|credential|token$", re.IGNORECASE)
# Values: an AWS key id, a private key's head, Hugging Face and GitHub tokens, and a token given in the open.
SECRET_VALUE = re.compile(
    r"\bA(?:KI|SI)A[0-9A-Z]{16}\b|-----BEGIN|\bhf_\w{20,}|\bgh[pousr]_\w{20,}"
    r"|RAY_AUTH_TOKEN=\S|AWS_SECRET_ACCESS_KEY|_PASSWORD="
)
PIN = re.compile(r"\b([A-Za-z][\w.-]*)(?:\[[\w,\s-]*\])?==([\w.+!]+)")


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@pytest.fixture(scope="module", params=["deploy/Dockerfile", "deploy/mlflow/Dockerfile"])
def dockerfile(request) -> list[tuple[str, str]]:
    return parse_dockerfile((ROOT / request.param).read_text())


def parse_dockerfile(text: str) -> list[tuple[str, str]]:
    """Returns the instructions as (NAME, arguments), without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    instructions = [line.strip().split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), " ".join(rest).strip()) for name, *rest in instructions]


def keys_of(node: object) -> list[str]:
    """Returns every mapping key of a YAML tree, at any depth."""
    if isinstance(node, dict):
        return [str(key) for key in node] + [key for value in node.values() for key in keys_of(value)]
    if isinstance(node, list):
        return [key for value in node for key in keys_of(value)]
    return []


def pins_of(text: str) -> dict[str, set[str]]:
    """Returns the versions pinned as `name==version` in a text, by normalised name."""
    pins: dict[str, set[str]] = {}
    for name, version in PIN.findall(text):
        pins.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version.rstrip("."))
    return pins


def test_cluster_file_is_valid_against_the_schema_that_ray_ships(cluster):
    ray_folder = Path(importlib.util.find_spec("ray").origin).parent
    schema = json.loads((ray_folder / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_cluster_file_passes_the_checks_of_ray_up(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_head_has_no_gpu_and_gpu_workers_are_spot_and_end_when_idle(cluster):
    node_types = dict(cluster["available_node_types"])
    head = node_types.pop(cluster["head_node_type"])
    assert "GPU" not in head["resources"] and "InstanceMarketOptions" not in head["node_config"]
    assert cluster["idle_timeout_minutes"] > 0 and cluster["provider"]["cache_stopped_nodes"] is False
    for worker in node_types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert 0 <= worker["min_workers"] < worker["max_workers"] <= cluster["max_workers"]


def test_cluster_file_has_no_secret_looking_key(cluster):
    suspects = [key for key in keys_of(cluster) if SECRET_KEY.search(key)]
    # The one allowed: where the token's *file* is copied to, from a file outside the repository.
    assert [key for key in suspects if key != "~/.ray/auth_token"] == []
    assert cluster["file_mounts"]["~/.ray/auth_token"].startswith("~/")


@pytest.mark.parametrize("path", DEPLOYMENT_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_deployment_file_holds_no_secret_looking_value(path):
    assert SECRET_VALUE.findall(path.read_text()) == []


def test_every_node_starts_ray_with_the_token_and_the_dashboard_stays_on_loopback(cluster):
    starts = {
        role: [command for command in cluster[f"{role}_start_ray_commands"] if "ray start" in command]
        for role in ("head", "worker")
    }
    activate = [command for command in cluster["setup_commands"] if "> ~/mmcot/activate" in command]
    assert len(activate) == 1 and "RAY_AUTH_MODE=token" in activate[0]
    for commands in starts.values():
        assert len(commands) == 1 and commands[0].startswith(". ~/mmcot/activate && ")
    assert "--dashboard-host=127.0.0.1" in starts["head"][0]


def test_dockerfile_pins_every_base_image_by_a_version_tag(dockerfile):
    defaults = dict(rest.split("=", 1) for name, rest in dockerfile if name == "ARG" and "=" in rest)
    stages: set[str] = set()
    for image in (rest for name, rest in dockerfile if name == "FROM"):
        base, *alias = image.split()
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base)
        if base not in stages:
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base), base
        if alias:
            stages.add(alias[-1])


def test_the_training_image_is_built_in_one_stage_and_runs_in_another():
    froms = [rest for name, rest in parse_dockerfile((ROOT / "deploy" / "Dockerfile").read_text()) if name == "FROM"]
    assert len(froms) == 2 and " AS " in froms[0], "one stage to build, with compilers; one to run, without"


def test_dockerfile_does_not_run_as_root(dockerfile):
    last_stage = max(index for index, (name, _) in enumerate(dockerfile) if name == "FROM")
    instructions = dockerfile[last_stage:]
    users = [rest for name, rest in instructions if name == "USER"]
    assert users and users[-1].split(":")[0] not in ("root", "0")
    names = [name for name, _ in instructions]
    assert len(names) - 1 - names[::-1].index("USER") < names.index("ENTRYPOINT")


def test_dockerfile_takes_no_secret_as_build_argument_or_environment(dockerfile):
    names = [name for kind, rest in dockerfile if kind in ("ARG", "ENV") for name in re.findall(r"\b(\w+)=", rest)]
    assert [name for name in names if SECRET_KEY.search(name)] == []


@pytest.mark.parametrize("path", DEPLOYMENT_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pinned_version_contradicts_pyproject(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *sum(project.get("optional-dependencies", {}).values(), [])]
    wanted = pins_of("\n".join(requirements))
    contradictions = {
        name: (sorted(versions), sorted(wanted[name]))
        for name, versions in pins_of(path.read_text()).items()
        if name in wanted and not versions <= wanted[name]
    }
    assert contradictions == {}, "(here, pyproject.toml)"


def test_every_run_command_of_the_guide_names_a_preset_and_settings_that_exist():
    guide = re.sub(r"\\\n\s*", " ", (ROOT / "deploy" / "README.md").read_text())
    commands = [line for line in guide.splitlines() if "--preset " in line]
    assert len(commands) == 3, "one for each road: a machine, a cluster, a container"
    for command in commands:
        preset = re.search(r"--preset (\S+)", command)[1]
        load_settings(preset=preset, overrides=re.findall(r"--set (\S+)", command))


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((ROOT / "deploy" / "mlflow" / "docker-compose.yaml").read_text())


def test_the_team_server_publishes_the_database_nowhere_and_mlflow_on_loopback_alone(compose):
    published = {name: service.get("ports", []) for name, service in compose["services"].items()}
    assert published == {"postgres": [], "mlflow": ["127.0.0.1:5000:5000"], "caddy": ["80:80", "443:443"]}
    assert compose["services"]["caddy"]["profiles"] == ["https"]
    for name in ("postgres", "caddy"):
        assert re.fullmatch(r"[a-z]+:\d+\.\d+[\w.-]*", compose["services"][name]["image"])


def test_the_team_servers_secrets_are_files_outside_git_and_every_one_is_declared(compose):
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/deploy/mlflow/secrets/", "/deploy/mlflow/.env"} <= set(ignored)
    assert all(list(secret) == ["file"] and secret["file"].startswith("secrets/") for secret in compose["secrets"].values())
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for key, value in service.get("environment", {}).items():
            if SECRET_KEY.search(key):
                assert key.endswith("_FILE") and Path(value).parent == Path("/run/secrets") and Path(value).name in service["secrets"]


def test_the_team_servers_command_is_one_that_the_command_line_knows(compose, monkeypatch):
    from typer.testing import CliRunner

    from launcher import mlflow_server
    from launcher.cli import app

    planned = {}
    monkeypatch.setattr(mlflow_server, "plan_server", lambda **settings: planned.update(settings))
    monkeypatch.setattr(mlflow_server, "serve", lambda server, report: None)
    command = [re.sub(r"\$\{(\w+)[^}]*\}", r"\1", word) for word in compose["services"]["mlflow"]["command"]]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert planned["auth"] and planned["host"] == "0.0.0.0" and planned["allowed_hosts"] == "NAME" and planned["artifacts"] == "ARTIFACTS"


def test_the_team_servers_image_needs_neither_torch_nor_ray(tmp_path):
    dockerfile = (ROOT / "deploy" / "mlflow" / "Dockerfile").read_text()
    wanted = set(re.findall(r"'([\w-]+)'", re.search(r"wanted = (\{.*?\})", dockerfile)[1]))
    assert wanted == {"mlflow", "typer", "psutil", "pydantic", "PyYAML"}
    block = ("import sys\nfor name in ('torch', 'ray', 'deepspeed', 'transformers', 'webdataset', 'evaluate', 'safetensors', 'fsspec', 'PIL'):\n"
             "    sys.modules[name] = None\nfrom launcher.cli import app\napp(sys.argv[1:])\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", block, "mlflow", "up", "--host", "0.0.0.0"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 1 and "add --auth" in done.stderr, done.stderr
