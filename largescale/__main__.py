"""`python -m largescale` (and `torchrun -m largescale`) is the `largescale` command."""

import os
import sys


def main() -> int:
    """Load the command, then run it; returns the exit code."""
    try:
        from largescale.cli import main as command
    except KeyboardInterrupt:
        os.write(2, b"error: interrupted\n")
        exec("")  # see `shards.ground.terminal.forget_interrupt`
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
