"""Addresses of MLflow's pages.

MLflow 3 opens its page for language-model applications, where a run stands under "Evaluations", unless the address
asks for model training. What is asked is lost at every redirect, so an address must be the page's own: the
experiment is named beside the run.
"""

from __future__ import annotations

from urllib.parse import quote

_TRAINING = "workflowType=machine_learning"


def mlflow_page(server: str, *, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """The page of a run, or of an experiment's runs, or of all experiments, by what is known."""
    if run_id is not None:
        place = f"experiments/{experiment_id}/runs/{run_id}" if experiment_id is not None else f"runs/{run_id}"
    else:
        place = f"experiments/{experiment_id}/runs" if experiment_id is not None else "experiments"
    return f"{server.rstrip('/')}/#/{place}?{_TRAINING}"


def trials_page(server: str, *, experiment_id: str, parent_id: str) -> str:
    """The charts of the runs right below one, side by side."""
    below = quote(f"tags.`mlflow.parentRunId` = '{parent_id}'", safe="")
    return f"{mlflow_page(server, experiment_id=experiment_id)}&compareRunsMode=CHART&searchFilter={below}"
