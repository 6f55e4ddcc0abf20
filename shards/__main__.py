"""`python -m shards` is the `shards` command."""

import os
import sys


def main() -> int:
    """Load the command, then run it; returns the exit code. Too little memory to load it is one line, too."""
    try:
        from shards.cli import main as command
    except ModuleNotFoundError:
        raise
    except (ImportError, MemoryError, SystemError) as error:
        why = " ".join(str(error).split())[:200] or "out of memory"
        text = (
            f"error: shards cannot be loaded ({why}); if memory is limited (`ulimit -v`), allow more, else "
            f"reinstall it\n"
        )
        os.write(2, text.encode("utf-8", "replace"))
        os._exit(2)  # not sys.exit: libarrow crashes at the end of a process that it was half loaded in
    except KeyboardInterrupt:
        os.write(2, b"error: interrupted\n")
        exec("")  # see `shards.ground.terminal.forget_interrupt`
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
