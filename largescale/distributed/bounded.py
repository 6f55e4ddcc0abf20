"""Time limits for actions that may hang forever, such as requests to a store that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


class TookTooLong(Exception):
    """An action did not end within its time limit."""


def within(limit_s: float, action: Callable[[], Result]) -> Result:
    """Run an action in a thread and return its result; an action that takes too long is abandoned.

    Where the process may have no more threads, it runs here, without a limit.

    Raises:
        TookTooLong: after `limit_s`.
    """
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    # A daemon, so that the process can exit while it hangs.
    thread = threading.Thread(target=work, name="bounded", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        work()
    try:
        return outcome.result(limit_s)
    except TimeoutError as error:
        if outcome.done():
            raise  # the action's own
        raise TookTooLong(f"no answer for {limit_s:.0f} s") from error
