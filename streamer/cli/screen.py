"""Screen: what a command says on stderr while it works, notes and progress, without the two running into each other."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Screen:
    """Lines and one progress bar on stderr.

    Args:
        shows_progress: False never shows a bar; True does when stderr is a terminal.
    """

    def __init__(self, *, shows_progress: bool):
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._shows_progress = shows_progress and self._console.is_terminal

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, soft_wrap=True)

    def advance(self, what: str, share: float) -> None:
        """Moves the bar of what is being done; share is 0 to 1, and 1 takes it away. Other work has its own bar."""
        if not self._shows_progress:
            return
        if share >= 1 or what != self._what:
            self._take_away()
        if share >= 1:
            return
        if self._progress is None:
            columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            # transient: the answer starts on the line where the bar was
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._task, self._what = self._progress.add_task(what, total=1.0), what
            self._progress.start()
        if self._task is not None:
            self._progress.update(self._task, completed=share)

    def end_progress(self) -> None:
        """Takes the bar away for good."""
        self._shows_progress = False
        self._take_away()

    def _take_away(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> "Screen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_progress()
