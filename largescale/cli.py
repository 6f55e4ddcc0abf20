"""The `largescale` command: pretrain, evaluate, report."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shards.errors import InputError

USER_ERROR, STOPPED = 2, 3
"""Exit codes: the input has to be mended; the run had to stop."""

_EXAMPLES = {
    "pretrain": """examples:
  largescale pretrain configs/demo.yaml
  largescale pretrain configs/demo.yaml optim.lr=0.001 run.seed=1 --print
  torchrun --standalone --nproc-per-node=2 -m largescale pretrain configs/demo.yaml parallel.strategy=fsdp""",
    "evaluate": """examples:
  largescale evaluate knn runs/demo
  largescale evaluate linear runs/demo evaluate.linear_epochs=50""",
    "report": """example:
  largescale report runs/demo""",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (InputError, OSError) as error:
        if arguments.debug:
            raise
        return _fail(str(error), USER_ERROR)
    except Exception as error:
        # Imported late: `--help` must not wait for torch.
        from largescale.pretrain import TrainingStopped

        if arguments.debug or not isinstance(error, TrainingStopped):
            raise
        return _fail(str(error), STOPPED)


def _fail(message: str, code: int) -> int:
    """One line on stderr. Ranks usually fail alike: rank 0 speaks first, and torchrun then ends the others."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(3)
    prefix = f"[rank {rank}] " if rank > 0 else ""
    sys.stderr.write(f"{prefix}error: {' '.join(message.split())}\n")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largescale", description="Self-supervised pretraining at scale: from shards to a measured representation."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "pretrain", _pretrain, "train a network on shards; continues where it stopped")
    command.add_argument("config", metavar="CONFIG", help="YAML recipe, see configs/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    command.add_argument("--print", action="store_true", help="show the resolved configuration, do not train")

    command = _command(commands, "evaluate", _evaluate, "measure the frozen features of a run on labelled shards")
    command.add_argument("protocol", metavar="PROTOCOL", choices=["knn", "linear"], help="knn or linear")
    command.add_argument("run_dir", metavar="RUN", help="folder of a run")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the run's configuration")

    command = _command(commands, "report", _report, "write RUN/report.html, one self-contained page")
    command.add_argument("run_dir", metavar="RUN", help="folder of a run")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=summary, epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _pretrain(arguments: argparse.Namespace) -> None:
    from largescale.config import load_config, to_yaml

    config = load_config(arguments.config, arguments.overrides)
    from largescale.pretrain import describe, pretrain

    if arguments.print:
        facts = "".join(f"# {key}: {value:,}\n" if isinstance(value, int | float) else f"# {key}: {value}\n"
                        for key, value in describe(config).items())
        sys.stdout.write(to_yaml(config) + facts)
    else:
        pretrain(config)


def _evaluate(arguments: argparse.Namespace) -> None:
    from largescale.evaluate import evaluate

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    sys.stdout.write(evaluate(arguments.protocol, _run_dir(arguments.run_dir), arguments.overrides) + "\n")


def _report(arguments: argparse.Namespace) -> None:
    from largescale.observe.report import write_report

    sys.stdout.write(f"{write_report(_run_dir(arguments.run_dir))}\n")


def _run_dir(path: str) -> Path:
    if not (Path(path) / "config.yaml").is_file():
        raise InputError(f"{path}: no run here (config.yaml is missing); pass the folder that pretrain wrote")
    return Path(path)
