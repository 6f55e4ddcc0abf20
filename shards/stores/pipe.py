"""Output of shell commands, for WebDataset's `pipe:`. What they start ends with them, and with their reader."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress

from shards.ground.pauses import let_go, slices

_BLOCK = 2**20


def run(command: str, write: Callable[[bytes], object], stall_s: float) -> None:
    """Run a command of the shell to its end.

    Args:
        command: its standard input is empty.
        write: called with what it writes to its standard output, piece by piece.
        stall_s: seconds without a byte after which it is killed, with all that it started.

    Raises:
        TimeoutError: it stood still.
        OSError: it failed; or what `write` raises.
    """
    watched, held = os.pipe()
    # The command may outlive a process that is killed. So `cat` waits until no process holds the pipe, and then
    # ends all of the group. The command is in a shell of its own: it may `wait` for its jobs, of which `cat` is none.
    script = f"(cat /dev/fd/{watched}; kill -9 0) >/dev/null 2>&1 & exec sh -c {shlex.quote(command)}"
    try:
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                script,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=(watched,),
                start_new_session=True,
            ) as process,
        ):
            assert process.stdout is not None
            try:
                _copy(process.stdout.fileno(), write, stall_s)
                code = _exit_code(process, stall_s)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            if code != 0:
                errors.seek(0)
                message = " ".join(errors.read().decode("utf-8", "replace").split())[-200:]
                raise OSError(f"`{command}` ended with exit code {code}: {message}")
    finally:
        os.close(watched)
        os.close(held)


def _copy(source: int, write: Callable[[bytes], object], stall_s: float) -> None:
    poll = select.poll()
    poll.register(source, select.POLLIN | select.POLLHUP)
    while True:
        for part in slices(stall_s):
            if poll.poll(1000 * part):
                break
            let_go()
        else:
            raise TimeoutError(f"not a byte for {stall_s:.0f} s")
        if not (block := os.read(source, _BLOCK)):
            return
        write(block)


def _exit_code(process: subprocess.Popen[bytes], stall_s: float) -> int:
    try:
        return process.wait(stall_s)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"did not end within {stall_s:.0f} s of its last byte") from error
