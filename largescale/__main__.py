"""`python -m largescale` (and `torchrun -m largescale`) is the `largescale` command."""

import os
import sys


def share_cores() -> None:
    """Let threads that compute together sleep soon where one is late, unless the user says how they wait.

    By default they spin, which is as fast on an idle machine; where another program has a core, each spends its time on
    waiting for one that cannot run. To be called before torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main() -> int:
    """Load the command, then run it; returns the exit code."""
    share_cores()
    try:
        from largescale.cli import main as command
    except KeyboardInterrupt:
        os.write(2, b"error: interrupted\n")
        exec("")  # see `shards.ground.terminal.forget_interrupt`
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
