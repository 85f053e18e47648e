"""The commands for MLflow: mlflow up, sync."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import (
    AllowExtensions,
    RunFolder,
    allow,
    errors_as_messages,
    say,
)

if TYPE_CHECKING:
    from launcher.runs.run_dir import RunDir

sync_app = typer.Typer()
mlflow_app = typer.Typer(help="Serve MLflow.", no_args_is_help=True)


@mlflow_app.command("up")
def mlflow_up(
    runs: Annotated[Path, typer.Option(help="The folder of the runs, with mlflow.db and mlartifacts in it.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback only with --auth.")
    ] = "127.0.0.1",
    backend_store_uri: Annotated[
        str | None,
        typer.Option(help="Database instead of mlflow.db; with a password: by MLFLOW_BACKEND_STORE_URI[_FILE]."),
    ] = None,
    artifacts: Annotated[
        str | None, typer.Option(help="Folder or s3:// URL instead of mlartifacts; clients need no access to it.")
    ] = None,
    auth: Annotated[
        bool,
        typer.Option("--auth", help="Require a login; the first user: MLFLOW_AUTH_ADMIN_USERNAME, _PASSWORD[_FILE]."),
    ] = False,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    allowed_hosts: Annotated[
        str | None,
        typer.Option(help="Host names that clients use for this server, comma-separated; default: its own names."),
    ] = None,
) -> None:
    """Serve the runs of a folder, or of a team, until Ctrl-C."""
    with errors_as_messages():
        from launcher.tracking.server import plan_server, serve

        server = plan_server(
            runs=runs,
            environment=dict(os.environ),
            port=port,
            host=host,
            backend_store_uri=backend_store_uri,
            artifacts=artifacts,
            auth=auth,
            workers=workers,
            allowed_hosts=allowed_hosts,
        )
        serve(server, report=say)


@sync_app.command()
def sync(
    folder: RunFolder,
    uri: Annotated[str | None, typer.Option(help="MLflow; default: the run's own.")] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Send everything to this experiment, also what the run logs later.")
    ] = None,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Send everything of a run that MLflow does not have, such as after an outage; nothing is sent twice."""
    with errors_as_messages():
        allow([folder], allow_extensions)
        from launcher.runs.adoption import copied_from
        from launcher.runs.ownership import owner
        from launcher.runs.run_dir import RunDir, RunError
        from launcher.runs.run_settings import settings_of

        run_dir = RunDir(folder)
        settings = settings_of(run_dir)
        is_given = uri is not None
        # The MLflow that has the rest, whatever this shell's environment names.
        uri = uri or settings.tracking.uri or _last_uri(run_dir)
        if current := owner(run_dir):
            raise RunError(
                f"{folder} is being run by process {current['pid']} on {current['host']}, which sends its values itself"
            )
        if uri:
            settings = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": uri})})
        from launcher.config.loading import tracking_uri
        from launcher.tracking.sending import sync_run

        if (source := copied_from(run_dir)) and not is_given and tracking_uri(settings) == _last_uri(RunDir(source)):
            raise RunError(
                f"{folder} is a copy of {source}, and its values would be sent to the MLflow runs of that one; send "
                "them from there, give another --uri, or make this folder a run of its own with `mmcot run ... --adopt`"
            )
        typer.echo(f"{sync_run(run_dir, settings, experiment=experiment):,} values sent to {tracking_uri(settings)}")


def _last_uri(run_dir: RunDir) -> str | None:
    """The MLflow to which a run was sent last, at its present place."""
    from launcher.runs.places import uri_around
    from launcher.runs.records import read_mlflow_state

    last = read_mlflow_state(run_dir.mlflow_state).get("uri")
    return last and uri_around(run_dir.path, last)
