"""Addresses of MLflow's pages.

MLflow 3 opens its page for language-model applications, which lists runs under "Evaluations", unless the address
has the parameter for model training. A redirect drops the parameter, so an address must be the final one: it
contains the experiment as well as the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote

_TRAINING = "workflowType=machine_learning"


def mlflow_page(server: str, *, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """The page of a run, of an experiment's runs, or of all experiments, depending on the given ids."""
    if run_id is not None:
        place = f"experiments/{experiment_id}/runs/{run_id}" if experiment_id is not None else f"runs/{run_id}"
    else:
        place = f"experiments/{experiment_id}/runs" if experiment_id is not None else "experiments"
    return f"{server.rstrip('/')}/#/{place}?{_TRAINING}"


def compare_page(server: str, *, experiment_id: str, run_ids: Sequence[str]) -> str:
    """The page that compares runs: parameters that differ, and metrics.

    A filter for a run's children would show them collapsed.
    """
    runs, experiments = (
        quote(json.dumps(ids, separators=(",", ":")), safe="[],") for ids in (list(run_ids), [experiment_id])
    )
    return f"{server.rstrip('/')}/#/compare-runs?runs={runs}&experiments={experiments}&{_TRAINING}"
