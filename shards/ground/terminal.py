"""The surroundings of a command: its streams, its locale, its folder; how it fails in one line."""

from __future__ import annotations

import io
import locale
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from shards.ground.errors import line_of

CLOSED_PIPE = 141
"""Exit code if the reader of the output is gone, as shells report SIGPIPE."""

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended; of SIGTERM and SIGHUP it is 128 and their number."""


class Ended(BaseException):
    """A signal asked the command to end; what is half written is removed on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; run the same command again")
        self.code = 128 + number


def run(command: Callable[[list[str] | None], int], argv: list[str] | None) -> int:
    """A command from its arguments to its exit code, with all its output written; None takes those of the process."""
    if argv is None:
        prepare()
    try:
        return _written(command(argv))
    except Ended as ended:
        return fail_line(str(ended), ended.code)
    except SystemExit as leaving:  # argparse: --help, or a wrong argument
        leaving.code = _written(leaving.code)
        raise
    except BrokenPipeError as error:
        unread = _is_unread()
        code = _written(0)
        return CLOSED_PIPE if unread else code or fail_line(line_of(error), 2)
    finally:
        if argv is None:  # all is done or said: what comes now need not be
            for number in _SIGNALS:
                if signal.getsignal(number) is _end:
                    signal.signal(number, signal.SIG_DFL)
            forget_interrupt()


def forget_interrupt() -> None:
    """Let a command that has answered Ctrl-C end with the exit code it gives.

    If Ctrl-C came while a text was executed, as `dataclasses` and `collections.namedtuple` do when a library is
    imported, Python kills itself by SIGINT in the end, whoever caught it; unless another text is executed after it.
    """
    exec("")


def _is_unread() -> bool:
    """Whether stdout is a pipe whose reader is gone."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (OSError, ValueError):
        return False


def _written(code: Any) -> Any:
    """Write what is left in the buffer of stdout, which the interpreter would complain about when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE if isinstance(error, BrokenPipeError) else fail_line(line_of(error), 2)
    return code


def prepare() -> None:
    """To be called first by a command: have streams to write to, UTF-8 everywhere, and a folder to work in."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed stream's number would go to the next file, which then got what libraries print
    os.close(descriptor)
    _use_utf8()
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr, by_line=True)
    _check_folder()
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and the background of a script have them
            signal.signal(number, _end)
    sys.unraisablehook = _unraisable


class _Output(io.FileIO):
    """Standard output, which says that it is what cannot be written."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # typeshed: io.FileIO itself returns this
        """See `io.RawIOBase`."""
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


class _Messages(io.FileIO):
    """Messages that cannot be written (the disk is full, the reader is gone) are lost; the work continues."""

    def write(self, data: Any) -> int:
        """Write what can be; returns as if that were all."""
        with suppress(OSError):
            written = super().write(data)
            return len(data) if written is None else written
        return len(data)


def _text(raw: io.FileIO, before: Any, *, by_line: bool = False) -> io.TextIOWrapper:
    """A stream of text like the one before, if it was open."""
    # Names of files need not be text in its encoding.
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",
        line_buffering=by_line or raw.isatty(),
    )


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_asked: list[int] = []


def _end(number: int, frame: FrameType | None) -> None:
    """The first time in order, the second time at once; at once too while a library is loaded.

    Libraries catch, or are left half loaded by, what is raised while they are; and nothing is half done yet that the
    next start would not find, as after a kill.
    """
    _asked.append(number)
    if len(_asked) > 1 or _loads_a_library(frame):
        _end_at_once()
    raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)


def _loads_a_library(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _end_at_once() -> None:
    ended = Ended(_asked[-1])
    os._exit(
        fail_line("interrupted; run the same command again" if ended.code == INTERRUPTED else str(ended), ended.code)
    )


def _unraisable(what: Any) -> None:
    """A signal that came where Python drops exceptions, in a finalizer or a callback of C, would be lost.

    What libraries drop while the process ends after one (a pool whose pipe is closed, say) is of no use to anybody.
    """
    if isinstance(what.exc_value, KeyboardInterrupt | Ended) and _asked:
        _end_at_once()
    if not _asked:
        sys.__unraisablehook__(what)


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode, which later versions begin in, where the locale has another encoding.

    Recipes and names of files are UTF-8, wherever they are read.
    """
    if locale.getencoding().lower().replace("-", "") != "utf8" and sys.orig_argv and not sys.flags.utf8_mode:
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def _check_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        # Libraries look at it when they are imported.
        sys.exit(fail_line("the working directory was removed; change to another one (cd) first", 2))


def _shows_progress() -> bool:
    """Whether a progress bar is on the line: one that was interrupted while it was made does not clear itself."""
    tqdm = sys.modules.get("tqdm")
    return tqdm is not None and len(getattr(tqdm.tqdm, "_instances", ())) > 0


def fail_line(message: str, code: int, label: str = "error") -> int:
    """Say in one line on stderr how a command ends; returns the exit code."""
    with suppress(OSError, ValueError):
        sys.stderr.write("\n" * _shows_progress() + f"{label}: {' '.join(message.split())}\n")
        sys.stderr.flush()
    return code
