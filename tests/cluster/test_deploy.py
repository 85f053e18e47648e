"""The contents of ray_cluster.yaml and deploy/ are valid, safe by default, and agree with pyproject.toml.

Nothing is launched: the cluster launcher's files are verified with the schema that the installed Ray ships, the
manifests for Kubernetes with KubeRay's own resource definitions, the Dockerfile is read as text.
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

from launcher.config.loading import load_settings
from launcher.config.setting_names import setting_names

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT_FILES = [
    ROOT / "ray_cluster.yaml",
    *(path for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file() and "secrets" not in path.parts),
]

SECRET_KEY = re.compile(r"secret|password|passwd|access_?key|api_?key|private_?key|credential|token$", re.IGNORECASE)
# Values: an AWS key id, a private key's head, Hugging Face and GitHub tokens, and a token given in the open.
SECRET_VALUE = re.compile(
    r"\bA(?:KI|SI)A[0-9A-Z]{16}\b|-----BEGIN|\bhf_\w{20,}|\bgh[pousr]_\w{20,}"
    r"|RAY_AUTH_TOKEN=\S|AWS_SECRET_ACCESS_KEY|_PASSWORD="
)
PIN = re.compile(r"\b([A-Za-z][\w.-]*)(?:\[[\w,\s-]*\])?==([\w.+!]+)")


@pytest.fixture(scope="module", params=["ray_cluster.yaml", "deploy/on-premises.yaml"])
def cluster(request) -> dict:
    return yaml.safe_load((ROOT / request.param).read_text())


@pytest.fixture(scope="module")
def aws() -> dict:
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


def test_head_has_no_gpu_and_gpu_workers_are_spot_and_end_when_idle(aws):
    node_types = dict(aws["available_node_types"])
    head = node_types.pop(aws["head_node_type"])
    assert "GPU" not in head["resources"] and "InstanceMarketOptions" not in head["node_config"]
    assert aws["idle_timeout_minutes"] > 0 and aws["provider"]["cache_stopped_nodes"] is False
    for worker in node_types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert 0 <= worker["min_workers"] < worker["max_workers"] <= aws["max_workers"]


def test_cluster_file_has_no_secret_looking_key(cluster):
    suspects = [key for key in keys_of(cluster) if SECRET_KEY.search(key)]
    # Two are allowed: where the token's *file* is copied to, and which *file* holds the ssh key. Both files are outside
    # the repository.
    assert [key for key in suspects if key not in ("~/.ray/auth_token", "ssh_private_key")] == []
    assert cluster["auth"].get("ssh_private_key", "~/").startswith("~/")
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
    requirements = [
        *project["dependencies"],
        *(line for extra in project.get("optional-dependencies", {}).values() for line in extra),
    ]
    wanted = pins_of("\n".join(requirements))
    contradictions = {
        name: (sorted(versions), sorted(wanted[name]))
        for name, versions in pins_of(path.read_text()).items()
        if name in wanted and not versions <= wanted[name]
    }
    assert contradictions == {}, "(here, pyproject.toml)"


def commands_of(text: str) -> list[str]:
    """Returns the command lines of a page's bash blocks, continued lines joined, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(blocks)).splitlines()
    return [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]


def check_run_command(command: str) -> None:
    preset = re.search(r"--preset (\S+)", command)
    load_settings(preset=preset and preset[1], overrides=re.findall(r"--set (\S+)", command))


PAGES = sorted((ROOT / "deploy").rglob("*.md"))
ROADS = {"one-machine.md", "container.md", "aws.md", "on-premises.md", "kubernetes.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_run_command_of_the_pages_names_a_preset_and_settings_that_exist(page):
    commands = [command for command in commands_of(page.read_text()) if re.search(r"\bmmcot (run|submit) ", command)]
    assert commands or page.name not in ROADS, "every road ends in a table"
    for command in commands:
        check_run_command(command)
        if "mmcot submit" in command:
            assert "--address http://127.0.0.1:8265" in command and "cluster.address" not in command
            paths = re.findall(r"--set (?:run\.dir|data\.shards_dir)=(\S+)", command)
            assert len(paths) == 2 and all(path.startswith("/") for path in paths)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_in_its_text_exists(page):
    sections = {name.split(".")[0] for name in setting_names()}
    named = set(re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_.]+)", page.read_text()))
    assert named <= set(setting_names())


@pytest.mark.parametrize("name", ["ray_cluster.yaml", "deploy/on-premises.yaml"])
def test_a_clusters_page_brings_up_its_file_and_takes_it_down(name):
    page = commands_of(
        (
            ROOT / "deploy" / {"ray_cluster.yaml": "aws.md", "deploy/on-premises.yaml": "on-premises.md"}[name]
        ).read_text()
    )
    assert {f"ray up {name}", f"ray dashboard {name}", f"ray down {name}"} <= set(page)


KUBERAY = {"raycluster.yaml": "rayclusters", "rayjob.yaml": "rayjobs"}


@pytest.fixture(scope="module")
def resource_schemas() -> dict[str, dict]:
    """The schemas of the two resources as a JSON schema that refuses what the API server would silently drop."""
    folder = os.environ.get("MMCOT_KUBERAY_SCHEMAS_DIR")
    if not folder:
        pytest.skip(
            "MMCOT_KUBERAY_SCHEMAS_DIR is not set: a folder with KubeRay 1.7.0's resource definitions, "
            "kuberay-1.7.0-ray.io_*.yaml"
        )
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML's own takes half a minute for them
    schemas = {}
    for plural in KUBERAY.values():
        definition = yaml.load((Path(folder) / f"kuberay-1.7.0-ray.io_{plural}.yaml").read_text(), loader)
        versions = {version["name"]: version for version in definition["spec"]["versions"] if version["served"]}
        schema = close_objects(versions["v1"]["schema"]["openAPIV3Schema"])
        schema["properties"]["kind"] = {"const": definition["spec"]["names"]["kind"]}
        schema["properties"]["apiVersion"] = {"const": f"{definition['spec']['group']}/v1"}
        schema["properties"]["metadata"] = {  # the definition leaves it to the API server
            "properties": {
                "name": {"type": "string"},
                "namespace": {"type": "string"},
                "labels": {"additionalProperties": {"type": "string"}},
            },
            "required": ["name", "namespace"],
            "additionalProperties": False,
        }
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        schemas[plural] = schema
    return schemas


def close_objects(schema: object) -> object:
    """Returns a structural schema in which an object with known fields has no others.

    The API server prunes fields that a definition does not know, without a word.
    """
    if isinstance(schema, list):
        return [close_objects(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close_objects(value) for key, value in schema.items()}
    # A field may itself be called "properties"; a schema's own is a mapping of mappings beside a type.
    if (
        schema.get("type") == "object"
        and "properties" in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed.setdefault("additionalProperties", False)
    return closed


def read_manifests(name: str) -> list[dict]:
    """Returns a file's documents, each use of an anchor a copy of its own."""
    return json.loads(json.dumps(list(yaml.safe_load_all((ROOT / "deploy" / "kuberay" / name).read_text()))))


@pytest.fixture(scope="module", params=KUBERAY)
def manifest(request) -> dict:
    [manifest] = read_manifests(request.param)
    return manifest


def cluster_of(manifest: dict) -> dict:
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def groups_of(manifest: dict) -> list[dict]:
    return [cluster_of(manifest)["headGroupSpec"], *cluster_of(manifest)["workerGroupSpecs"]]


def pods_of(manifest: dict) -> list[dict]:
    """Returns every pod template of a manifest: the head's, the workers', a job's submitter's."""
    submitter = manifest["spec"].get("submitterPodTemplate")
    return [group["template"] for group in groups_of(manifest)] + ([submitter] if submitter else [])


@pytest.mark.parametrize("name", KUBERAY)
def test_manifest_is_valid_against_kuberays_definition(name, resource_schemas):
    [manifest] = read_manifests(name)
    jsonschema.validate(manifest, resource_schemas[KUBERAY[name]])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("authOption",), {"mode": "token"}, "'authOption' was unexpected"),
        (("authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (("headGroupSpec", "template", "spec", "containers", 0, "readinesProbe"), {}, "'readinesProbe' was unexpected"),
        (("headGroupSpec", "template", "spec", "securityContext", "runAsUser"), "10001", "is not of type 'integer'"),
        (("workerGroupSpecs", 0, "rayStartParams", "num-cpus"), 0, "is not of type 'string'"),
        (
            ("workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "32 GB",
            "does not match",
        ),
        (("workerGroupSpecs", 0, "template", "metadata", "label"), {}, "'label' was unexpected"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("name", KUBERAY)
def test_a_wrong_manifest_is_refused(name, path, value, message, resource_schemas):
    [manifest] = read_manifests(name)
    node = cluster_of(manifest)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    errors = list(jsonschema.Draft202012Validator(resource_schemas[KUBERAY[name]]).iter_errors(manifest))
    assert len(errors) == 1 and message in errors[0].message


def test_network_policies_and_claim_have_no_unknown_field(resource_schemas):
    cluster = resource_schemas["rayclusters"]["properties"]["spec"]["properties"]
    rules = cluster["networkPolicy"]["properties"]["head"]["properties"]
    for policy in read_manifests("network-policy.yaml"):
        spec = policy["spec"]
        assert set(spec) <= {"podSelector", "policyTypes", "ingress", "egress"} and policy["kind"] == "NetworkPolicy"
        for direction in ("ingress", "egress"):
            jsonschema.validate(spec.get(direction, []), rules[f"{direction}Rules"])
    volume = cluster["headGroupSpec"]["properties"]["template"]["properties"]["spec"]["properties"]["volumes"]["items"][
        "properties"
    ]
    [claim] = read_manifests("storage.yaml")
    jsonschema.validate(claim["spec"], volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_no_pod_runs_as_root_or_may_become_root(manifest):
    assert len(pods_of(manifest)) == (3 if manifest["kind"] == "RayJob" else 2)
    for pod in pods_of(manifest):
        context = pod["spec"]["securityContext"]
        assert (
            context["runAsNonRoot"] is True
            and context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
        )
        assert (
            context["seccompProfile"] == {"type": "RuntimeDefault"}
            and pod["spec"]["automountServiceAccountToken"] is False
        )
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    assert "ARG USER_ID=10001\n" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_every_pod_asks_for_what_it_may_use_and_only_workers_see_gpus(manifest):
    for pod in pods_of(manifest):
        [container] = pod["spec"]["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"] and {"cpu", "memory"} <= set(resources["limits"])
        hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container.get("env", [])
        assert hidden == ("nvidia.com/gpu" not in resources["limits"]) == (container["name"] != "ray-worker")


def test_ray_nodes_have_probes_shared_memory_and_the_shared_folder(manifest):
    gibibyte = 2**30
    for group in groups_of(manifest):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        shared_memory = volumes[mounts["/dev/shm"]]["emptyDir"]
        size = int(shared_memory["sizeLimit"].removesuffix("Gi")) * gibibyte
        assert shared_memory["medium"] == "Memory"
        assert (
            int(group["rayStartParams"]["object-store-memory"])
            <= size
            < int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * gibibyte
        )
        assert (
            volumes[mounts["/mnt/mmcot"]]["persistentVolumeClaim"]["claimName"]
            == read_manifests("storage.yaml")[0]["metadata"]["name"]
        )


def test_the_probes_paths_need_no_token():
    agent = Path(importlib.util.find_spec("ray").origin).parent / "dashboard" / "http_server_agent.py"
    assert '"/api/healthz",' in agent.read_text()


def test_kuberay_demands_the_token_and_starts_the_pinned_ray(manifest):
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert pins_of("\n".join(dependencies))["ray"] == {cluster["rayVersion"]}


def test_secrets_are_read_from_a_secret_and_stand_in_no_manifest(manifest):
    for group in groups_of(manifest):
        env = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
            assert env[name]["valueFrom"]["secretKeyRef"] == {
                "name": "mmcot-credentials",
                "key": name,
                "optional": True,
            }
        assert [name for name, entry in env.items() if SECRET_KEY.search(name) and "value" in entry] == []


def test_kueue_finds_the_queue_can_admit_the_cluster_and_gets_it_back(manifest):
    flavor, cluster_queue, local_queue = read_manifests("queue.yaml")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local_queue["metadata"]["name"]
    assert manifest["metadata"]["namespace"] == local_queue["metadata"]["namespace"]
    assert local_queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    # Kueue's: no autoscaler inside, the cluster ends with its job, and `suspend` is Kueue's to write.
    assert cluster_of(manifest)["enableInTreeAutoscaling"] is False and "suspend" not in manifest["spec"]
    if manifest["kind"] == "RayJob":
        assert (
            manifest["spec"]["shutdownAfterJobFinishes"] is True and manifest["spec"]["ttlSecondsAfterFinished"] <= 60
        )
    [resources] = cluster_queue["spec"]["resourceGroups"]
    assert [item["name"] for item in resources["flavors"]] == [flavor["metadata"]["name"]]
    quota = {item["name"]: item["nominalQuota"] for item in resources["flavors"][0]["resources"]}
    assert list(quota) == resources["coveredResources"]
    pods = [(1, pod) for pod in pods_of(manifest)]
    for group in cluster_of(manifest)["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        pods.append((group["replicas"] - 1, group["template"]))
    asked = dict.fromkeys(quota, 0)
    for count, pod in pods:
        for name, amount in pod["spec"]["containers"][0]["resources"]["requests"].items():
            asked[name] += count * int(amount.removesuffix("Gi"))
    assert all(asked[name] <= int(quota[name].removesuffix("Gi")) for name in quota), asked


def test_only_our_pods_and_the_operator_reach_a_cluster():
    ours, operator = (policy["spec"] for policy in read_manifests("network-policy.yaml"))
    for name in KUBERAY:
        for pod in pods_of(read_manifests(name)[0]):
            assert ours["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert ours["policyTypes"] == ["Ingress", "Egress"] and ours["ingress"] == [
        {"from": [{"podSelector": ours["podSelector"]}]}
    ]
    assert operator["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert [port["port"] for rule in operator["ingress"] for port in rule["ports"]] == [8265]
    blocks = [
        (peer["ipBlock"], {port["port"] for port in rule["ports"]})
        for rule in ours["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    assert (
        len(blocks) == 2
    )  # the node's DNS cache by its one address; everything else but the metadata service, over HTTPS
    assert ({"cidr": "169.254.20.10/32"}, {53}) in blocks and (
        {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]},
        {443},
    ) in blocks


def test_the_jobs_command_names_a_preset_and_settings_that_exist_and_writes_to_the_shared_folder():
    [job] = read_manifests("rayjob.yaml")
    command = job["spec"]["entrypoint"]
    check_run_command(command)
    assert command.startswith("mmcot run ") and "\n" not in command
    settings = dict(item.split("=", 1) for item in re.findall(r"--set (\S+)", command))
    assert settings["cluster.address"] == "auto" and int(settings["cluster.num_workers"]) == sum(
        group["replicas"] for group in cluster_of(job)["workerGroupSpecs"]
    )
    assert settings["run.dir"].startswith("/mnt/mmcot/") and settings["data.shards_dir"].startswith("/mnt/mmcot/")


def test_the_image_builds_deepspeeds_ops_for_gpus_where_none_is_in_sight():
    instructions = parse_dockerfile((ROOT / "deploy" / "Dockerfile").read_text())
    defaults = dict(rest.split("=", 1) for name, rest in instructions if name == "ARG" and "=" in rest)
    built = set(re.findall(r"DS_BUILD_(\w+)=1", defaults["DEEPSPEED_OPS"]))
    assert built == {"CPU_ADAM", "FUSED_ADAM", "AIO", "PIN_MEMORY"}
    [install] = [rest for name, rest in instructions if name == "RUN" and "${DEEPSPEED_OPS}" in rest]
    assert "env DS_ACCELERATOR=cuda ${DEEPSPEED_OPS} pip install --no-build-isolation" in install
    builders = Path(importlib.util.find_spec("deepspeed").origin).parent / "ops" / "op_builder"
    known = set(
        re.findall(r'BUILD_VAR = "DS_BUILD_(\w+)"', "".join(path.read_text() for path in builders.rglob("*.py")))
    )
    assert built <= known


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
    assert all(
        list(secret) == ["file"] and secret["file"].startswith("secrets/") for secret in compose["secrets"].values()
    )
    for service in compose["services"].values():
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for key, value in service.get("environment", {}).items():
            if SECRET_KEY.search(key):
                assert (
                    key.endswith("_FILE")
                    and Path(value).parent == Path("/run/secrets")
                    and Path(value).name in service["secrets"]
                )


def test_the_team_servers_command_is_one_that_the_command_line_knows(compose, monkeypatch):
    from typer.testing import CliRunner

    from launcher.cli.main import app
    from launcher.tracking import server as mlflow_server

    planned = {}
    monkeypatch.setattr(mlflow_server, "plan_server", lambda **settings: planned.update(settings))
    monkeypatch.setattr(mlflow_server, "serve", lambda server, report: None)
    command = [re.sub(r"\$\{(\w+)[^}]*\}", r"\1", word) for word in compose["services"]["mlflow"]["command"]]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (
        planned["auth"]
        and planned["host"] == "0.0.0.0"
        and planned["allowed_hosts"] == "NAME"
        and planned["artifacts"] == "ARTIFACTS"
    )


def test_the_team_servers_image_needs_neither_torch_nor_ray(tmp_path):
    dockerfile = (ROOT / "deploy" / "mlflow" / "Dockerfile").read_text()
    wanted = set(re.findall(r"'([\w-]+)'", re.search(r"wanted = (\{.*?\})", dockerfile)[1]))
    assert wanted == {"mlflow", "typer", "psutil", "pydantic", "PyYAML"}
    block = (
        "import sys\nfor name in ('torch', 'ray', 'deepspeed', 'transformers', 'webdataset', 'evaluate', "
        "'safetensors', 'fsspec', 'PIL'):\n"
        "    sys.modules[name] = None\nfrom launcher.cli.main import app\napp(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", block, "mlflow", "up", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "add --auth" in done.stderr, done.stderr


def test_the_slurm_script_has_nothing_that_shellcheck_minds():
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", ROOT / "deploy" / "slurm.sh"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_asks_for_a_token_a_checkpoint_before_its_end_and_another_turn():
    script = (ROOT / "deploy" / "slurm.sh").read_text()
    for words in (
        "#SBATCH --signal=B:TERM@300",
        "#SBATCH --requeue",
        "export RAY_AUTH_MODE=token",
        "umask 077",
        "ray symmetric-run",
        "scontrol requeue",
    ):
        assert words in script
