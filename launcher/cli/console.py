"""What a long command prints: plain lines, or on a terminal a live display of its run below them.

    with open_console(settings) as console:
        run_pipeline(settings, report=console)

Neither is silent for longer than ``SILENCE_S``: plain lines are then followed by what is going on and for how long.
The live display reads the run's folder, as ``mmcot status`` does: markers of steps, and journals.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from launcher.cli.options import say
from launcher.config.settings import Settings
from launcher.runs.background import background_thread
from launcher.runs.journal import JournalReader, Pace
from launcher.runs.progress import Phase, ProgressLine, StepHeading, format_seconds
from launcher.runs.run_dir import RunDir

SILENCE_S = 4.2
_LOOK_EVERY_S = 0.25
Console = Callable[[str], None]


@contextlib.contextmanager
def open_console(settings: Settings | None = None, *, until: str | None = None) -> Iterator[Console]:
    """Yield the function that prints a command's lines; on a terminal the run of ``settings`` is shown live.

    Args:
        until: the last step of the command; None: of the chain.
    """
    if settings is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        with _live(settings, until) as console:
            yield console
    else:
        console = PlainConsole()
        with background_thread(console.break_silence, name="console"):
            yield console


class PlainConsole:
    """Prints every line, and after a silence what is going on and since when."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may print while a line is printed
        self._printed_at = self._began_at = time.monotonic()
        self._working = self._phase = "  at work"

    def __reduce__(self) -> tuple[type[PlainConsole], tuple[()]]:
        """Ray Tune pickles what its callbacks hold; a copy has a lock of its own."""
        return PlainConsole, ()

    def __call__(self, line: str) -> None:
        """Print a line."""
        with self._lock:
            self._printed_at = self._began_at = time.monotonic()
            if isinstance(line, StepHeading):
                self._working = f"  {line.split()[-1]}: at work"
            self._phase = line if isinstance(line, Phase) else self._working
            say(line)

    def break_silence(self, stopped: threading.Event) -> None:
        """Print what is going on whenever nothing was printed for ``SILENCE_S``, until the event is set."""
        while not stopped.wait(_LOOK_EVERY_S):
            with self._lock:
                now = time.monotonic()
                if now - self._printed_at >= SILENCE_S:
                    self._printed_at = now
                    say(f"{self._phase}, {format_seconds(now - self._began_at)}")


@contextlib.contextmanager
def _live(settings: Settings, until: str | None) -> Iterator[Console]:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

    terminal = RichConsole(file=cast(IO[str], _Terminal()), highlight=False)
    display = RunDisplay(settings, until=until, can_draw=(sys.stdout.encoding or "").lower().startswith("utf"))

    def console(line: str) -> None:
        display.phase = line.strip() if isinstance(line, Phase) else ""
        if not isinstance(line, (Phase, ProgressLine)):
            terminal.print(Text(line), soft_wrap=True)

    with Live(
        display,
        console=terminal,
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    ):
        terminal.show_cursor(True)  # a process that is killed could not show it again
        yield console


class _Terminal:
    """Standard output for rich; after the terminal is closed the work continues without output."""

    encoding = property(lambda self: sys.stdout.encoding)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return sys.stdout.fileno()


class RunDisplay:
    """A run's steps with marks, and the progress of the one that is running; drawn anew from the run's folder.

    Attributes:
        phase: what is going on, where a line has said so.
    """

    def __init__(self, settings: Settings, *, until: str | None = None, can_draw: bool = True) -> None:
        self.phase = ""
        steps = settings.chain.steps
        self._steps = steps[: steps.index(until) + 1] if until in steps else steps
        self._settings, self._run_dir = settings, RunDir(settings.run_dir)
        self._done_mark, self._running_mark, self._open_mark = ("✓", "▶", "·") if can_draw else ("x", ">", ".")
        self._journals: dict[str, _Progress] = {}
        self._began: dict[str, float] = {}  # when a step was first seen to run

    def __rich__(self) -> Any:
        """Draw the present state."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        steps = Table.grid(padding=(0, 2))
        below, running = [], None
        for step in self._steps:
            marker = self._run_dir.marker(step)
            if marker:
                steps.add_row(Text(self._done_mark, "green"), step, format_seconds(marker["seconds"]))
            elif running is None:
                running = step
                began = self._began.setdefault(step, time.monotonic())
                steps.add_row(
                    Text(self._running_mark, "cyan"),
                    Text(step, "bold"),
                    f"{format_seconds(time.monotonic() - began)}   {self.phase}".rstrip(),
                )
                below = self._draw_progress(step)
            else:
                steps.add_row(Text(self._open_mark, "dim"), Text(step, "dim"), "")
        return Group(Text(""), steps, *below)

    def _draw_progress(self, step: str) -> list[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        stage = self._settings.chain.stage_of_step(step)
        writer = stage.name if stage else step
        progress = self._journals.setdefault(step, _Progress(JournalReader(self._run_dir.journal_of(writer))))
        if (found := progress.read()) is None:
            return []
        done, total, left = found
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            " ",
            ProgressBar(total=total, completed=done, width=30),
            f"{done:,} of {total:,} {'steps' if stage else 'questions'}",
            "" if left is None else f"{format_seconds(left)} left",
        )
        facts = Table.grid(padding=(0, 2))
        facts.add_row(" ", *progress.describe())
        return [bar, facts]


class _Progress:
    """What a journal tells about the step that writes it."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader, self._pace, self._last = reader, Pace(), {}

    def read(self) -> tuple[int, int, float | None] | None:
        """Read new points; returns ``Pace.progress_of``."""
        for point in self._reader.read():
            self._pace.add(point)
            self._last |= point["metrics"]
        return self._pace.progress_of()

    def describe(self) -> list[str]:
        """The losses and the speed."""
        names = {
            "loss": "loss {:.4f}",
            "validation_loss": "validation loss {:.4f}",
            "retrieval_at_1": "retrieval {:.1%}",
        }
        speeds = {"tokens_per_s": "{:,.0f} tokens/s", "generation_tokens_per_s": "{:,.0f} tokens/s"}
        return [text.format(self._last[name]) for name, text in (names | speeds).items() if name in self._last]
