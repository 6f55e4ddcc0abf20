"""Commands' arguments, whose mistakes are one line, as all others."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from shards.ground.terminal import fail_line

WRONG = 2
"""Exit code of a command whose arguments cannot be used."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong, and where help is, in place of a page of options; names the option that was meant."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser`."""
        self.exit(fail_line(f"{message}; see `{self.prog} --help`", WRONG))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse.ArgumentParser`; refuses an option here, where those that there are are known."""
        found, left = super().parse_known_args(args, namespace)
        for word in left:
            if word.startswith("-") and word != "--":
                self.error(f"unknown option {word}{self._meant(word)}")
        return found, left

    def _meant(self, word: str) -> str:
        near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""
