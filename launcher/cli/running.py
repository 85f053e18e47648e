"""Running the pipeline up to a step, for the commands that do."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import errors_as_messages, say


def run_until(
    step: str | None,
    preset: str | None,
    config: Path | None,
    overrides: list[str],
    write_job: Path | None = None,
    adopt: bool = False,
    *,
    take_over: bool = False,
) -> None:
    """Run the pipeline up to a step, or to its end, and print where the run is stored."""
    with errors_as_messages():
        from launcher.config.loading import load_settings
        from launcher.runs.run_settings import of_moved_folder

        settings = load_settings(preset=preset, config=config, overrides=overrides)
        settings = of_moved_folder(settings, config, overrides)
        from launcher.cli.console import open_console
        from launcher.runs.progress import Phase

        with open_console(settings, until=step) as console:
            console(Phase("loading"))
            from launcher.pipeline.pipeline import run_pipeline
            from launcher.runs.status import describe_end

            run_dir = run_pipeline(
                settings, until=step, report=console, write_job=write_job, adopt=adopt, take_over=take_over
            )
        for line in describe_end(settings, run_dir):
            say(line)
