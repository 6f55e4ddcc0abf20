"""`python -m shards` is the `shards` command."""

import sys

from shards.cli import main

if __name__ == "__main__":
    sys.exit(main())
