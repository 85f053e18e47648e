"""What stands in ray_cluster.yaml and deploy/ is valid, safe by default, and agrees with pyproject.toml.

Nothing is launched: the cluster file is held against the schema that the installed Ray ships, the Dockerfile is read
as text.
"""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from launcher.config import load_settings

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENT_FILES = [ROOT / "ray_cluster.yaml", ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "README.md"]

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


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    return parse_dockerfile((ROOT / "deploy" / "Dockerfile").read_text())


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


@pytest.mark.parametrize("path", DEPLOYMENT_FILES, ids=lambda path: path.name)
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
    assert len(stages) >= 1, "one stage to build, one to run"


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


@pytest.mark.parametrize("path", DEPLOYMENT_FILES, ids=lambda path: path.name)
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
