"""Finished models in MLflow's registry.

    mlflow.pyfunc.load_model("models:/answer@champion").predict([{"question": ..., "choices": [...], "image": "a.png"}])

A version of ``answer`` holds both stages, so that it can answer; a version of ``rationale`` only the
first. A version is tagged with the run, the data and the rationales it comes from. Aliases are moved
automatically: ``rationale@candidate`` to the newest version, ``answer@champion-<data>`` to a better one, by
accuracy on the validation split of the same data. ``answer@champion`` is that of the data set that came first,
until somebody moves it by hand.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.atomic_files import process_mark
from launcher.runs.exported import verify_export
from launcher.runs.records import read_mlflow_state
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import EXTENSIONS, RUN_SETTINGS

FOLDER = "model"  # among the run's artifacts


def register_model(
    client: Any,
    run_id: str,
    run_dir: RunDir,
    values: dict[str, Any],
    *,
    model_id: str | None = None,
    log: Callable[..., None],
) -> None:
    """Register a run's model once, and move the alias if the model is better.

    Args:
        values: ``name`` of the model, ``stages`` it holds, ``alias``, ``data`` (a fingerprint),
            ``accuracy`` on the validation split or None where the newest is meant, and further ``tags``;
            ``exports``, by stage, the record of each exported model (``launcher/runs/exported.py``).
        model_id: the LoggedModel of the training that made it.

    Raises:
        RunError: a model is not the one that the run exported.
    """
    name = values["name"]
    version = _version_of_run(client, name, run_id)
    if version is None:
        _upload(client, run_id, run_dir, {stage: _export_of(run_dir, stage, values) for stage in values["stages"]})
        _create_name(client, name)
        tags = {"mmcot.data": values["data"], **values["tags"], **_written_by(client, values, run_dir)}
        if values["accuracy"] is not None:
            tags["mmcot.validation_accuracy"] = f"{values['accuracy']:.4f}"
        source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
        version = client.create_model_version(name, source=source, run_id=run_id, tags=tags, model_id=model_id)
    own = alias_of_data(values)  # before the common alias, whose message names it
    for alias in (own, values["alias"]) if own else (values["alias"],):
        current = _current(client, name, alias)
        is_older = current is not None and int(current.version) > int(version.version)  # the same line, much later
        if not is_older and may_take_alias(current, values, log=log):
            client.set_registered_model_alias(name, alias, version.version)


def alias_of_data(values: dict[str, Any]) -> str | None:
    """The alias for which models of the same data compete, such as champion-0f3a; None where the newest is meant."""
    return None if values["accuracy"] is None else f"{values['alias']}-{values['data'][:8]}"


def may_take_alias(current: Any, values: dict[str, Any], *, log: Callable[..., None]) -> bool:
    """Whether a model may take the alias from the version that has it, or from None."""
    if current is None or values["accuracy"] is None:
        return True
    if current.tags.get("mmcot.data") != values["data"]:
        log(
            "%s@%s stays with version %s (other data); of this data it is %s@%s",
            values["name"],
            values["alias"],
            current.version,
            values["name"],
            alias_of_data(values),
        )
        return False
    return values["accuracy"] > float(current.tags["mmcot.validation_accuracy"])


def _export_of(run_dir: RunDir, stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """The record of a stage's exported model; from the step's marker for lines of an earlier version."""
    marker = run_dir.marker(f"train-{stage}") or {}
    return values.get("exports", {}).get(stage) or marker.get("outputs", {})


def _upload(client: Any, run_id: str, run_dir: RunDir, exports: dict[str, dict[str, Any]]) -> None:
    import mlflow.pyfunc

    for left in run_dir.path.glob(".tmp-*-model-*"):  # of a process that was killed; a run has one sender
        shutil.rmtree(left, ignore_errors=True)
    # On the weights' own file system, to link them.
    with tempfile.TemporaryDirectory(dir=run_dir.path, prefix=f".tmp-{process_mark()}.0-model-") as temporary:
        bundle = Path(temporary) / "run"
        bundle.mkdir()
        for name in (RUN_SETTINGS, EXTENSIONS):
            if (run_dir.path / name).exists():
                shutil.copy(run_dir.path / name, bundle)
        for stage, export in exports.items():
            verify_export(run_dir.model(stage), export, source=str(run_dir.marker_path(f"train-{stage}")))
            shutil.copytree(run_dir.model(stage), bundle / stage / "model", copy_function=os.link)
            if export:  # the reader of the bundle verifies it too
                RunDir(bundle).mark_done(f"train-{stage}", {"step": f"train-{stage}", "outputs": export})
        folder = Path(temporary) / FOLDER
        logging.getLogger("mlflow.pyfunc").setLevel(
            logging.ERROR
        )  # it warns that a data frame's type hint has no columns
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"run": str(bundle)},
            pip_requirements=["mmcot"],  # given, because MLflow would otherwise load the model to guess them
        )
        client.log_artifacts(run_id, str(folder), FOLDER)


def _written_by(client: Any, values: dict[str, Any], run_dir: RunDir) -> dict[str, str]:
    """The registered models of the earlier stages, which wrote the texts that this one was trained on."""
    runs = read_mlflow_state(run_dir.mlflow_state).get("runs", {})
    versions = {}
    for stage in values["stages"]:
        run_id = runs.get(f"train-{stage}") if stage != values["name"] else None
        if run_id and (version := _version_of_run(client, stage, run_id)):
            versions[f"mmcot.{stage}_version"] = str(version.version)
    return versions


def _version_of_run(client: Any, name: str, run_id: str) -> Any:
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return found[0] if found else None


def _create_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _current(client: Any, name: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # Only "does not exist" means None: after any other error a worse model would take the alias.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
