"""`python -m largescale` (and `torchrun -m largescale`) is the `largescale` command."""

import sys

from largescale.cli import main

if __name__ == "__main__":
    sys.exit(main())
