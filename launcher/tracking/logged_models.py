"""The models of trainings as MLflow's LoggedModels: one for each exported stage, with its parameters and metrics.

A LoggedModel describes a model and links the runs that trained and scored it. Its files stay in the run's folder; those
of registered models are uploaded by ``launcher/tracking/registry.py``.
"""

from __future__ import annotations

from typing import Any


def log_trained_model(
    client: Any, experiment_id: str, run_id: str, values: dict[str, Any], *, parent_run_id: str
) -> None:
    """Create the LoggedModel of a training once, as an output of its run and of the parent run.

    Args:
        values: ``name``, ``params`` and ``tags`` of the model.
    """
    from mlflow.entities import LoggedModelOutput

    model = find_logged_model(client, experiment_id, run_id)
    if model is None:
        model = client.create_logged_model(
            experiment_id, name=values["name"], source_run_id=run_id, params=values["params"], tags=values["tags"]
        )
    for owner in (run_id, parent_run_id):
        outputs = client.get_run(owner).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            client.log_outputs(owner, [LoggedModelOutput(model.model_id, 0)])  # MLflow refuses it a second time
    if model.status != "READY":
        client.finalize_logged_model(model.model_id, "READY")


def find_logged_model(client: Any, experiment_id: str, run_id: str) -> Any:
    """Return the LoggedModel of a run, or None."""
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'", max_results=1)
    return found[0] if found else None
