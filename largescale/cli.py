"""The `largescale` command: `_parser` lists what it can do."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from largescale.command_examples import EXAMPLES
from largescale.curate.arguments import add_arguments as curate_arguments
from largescale.distributed import stopping
from largescale.distributed.stopping import INTERRUPTED, StoppedInOrder, own_rank
from largescale.evaluate.arguments import add_assign_arguments, add_features_arguments, add_finetune_arguments
from largescale.plan.arguments import add_arguments as plan_arguments
from largescale.propose.arguments import add_arguments as init_arguments
from largescale.prune.arguments import add_arguments as prune_arguments
from largescale.prune.arguments import run as prune
from shards.ground import terminal
from shards.ground.arguments import Parser
from shards.ground.errors import InputError

USER_ERROR, STOPPED, UNFINISHED = 2, 3, 85
"""Exit codes: the input has to be fixed; the run had to stop; it was asked to stop and can be continued.

A rank that hangs exits with 86 (`largescale/run/watchdog.py`)."""

_RECIPE = "YAML file, or the name of a recipe that comes with the package, such as swav/resnet50_800ep"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        return terminal.run(_main, argv)
    finally:
        if argv is None:
            stopping.nothing_left()


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand behind an option too, where argparse takes no more of them."""
    arguments, left = _parser().parse_known_args(argv)
    words: list[str] | None = getattr(arguments, "overrides", None)
    if words is None or not all(re.match(r"[a-z][\w.\[\]]*=", word) for word in left):
        return _parser().parse_args(argv)  # and say what is wrong
    words += left
    return arguments


def _main(argv: list[str] | None) -> int:
    arguments = _parsed(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise
    except InputError as error:
        if arguments.debug:
            raise
        return _fail(str(error), USER_ERROR)
    except StoppedInOrder as error:
        # torchrun restarts whatever exits with a code other than 0, if it may.
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        return _fail(str(error), 0 if restarts else UNFINISHED, "stopped in order")
    except Exception as error:
        if arguments.debug:
            raise
        # Imported late: `--help` must not wait for torch.
        from largescale.run.failures import end_of

        end = end_of(error)
        if end is None:
            raise
        line, by_input = end
        return _fail(line, USER_ERROR if by_input else STOPPED)


def _fail(message: str, code: int, label: str = "error") -> int:
    """One line on stderr. Ranks usually fail alike: rank 0 speaks first, then torchrun ends the others."""
    stopping.nothing_left()
    rank = own_rank()
    if rank > 0:
        time.sleep(3)
    prefix = f"[rank {rank}] " if rank > 0 else ""
    return terminal.fail_line(message, code, f"{prefix}{label}")


def _parser() -> Parser:
    parser = Parser(
        prog="largescale", description="Self-supervised pretraining at scale: from shards to a measured representation."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _command(commands, "init", _init, "look at shards and at this machine, and write a recipe for them")
    init_arguments(command)

    command = _command(commands, "pretrain", _pretrain, "train a network on shards; continues where it stopped")
    command.add_argument("config", metavar="CONFIG", help=_RECIPE)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    command.add_argument("--print", action="store_true", help="show the resolved configuration without training")

    command = _command(commands, "distill", _distill, "train a student on what a classifier says of unlabelled shards")
    command.add_argument("teacher", metavar="TEACHER", help="file that `largescale finetune` wrote, or a student's run")
    command.add_argument("config", metavar="CONFIG", help=_RECIPE)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")
    command.add_argument("--print", action="store_true", help="show the resolved configuration without training")

    command = _command(commands, "config", _config, "explain configuration keys, or show what a recipe sets")
    command.add_argument(
        "words",
        nargs="*",
        metavar="KEY|GROUP|CONFIG|key=value",
        help="a key or a group of keys, a "
        "recipe whose values to show, and overrides of it; with none of these: the groups",
    )
    command.add_argument("--markdown", action="store_true", help="all keys, as in docs/configuration.md")

    command = _command(commands, "evaluate", _evaluate, "measure the frozen features of a run on labelled shards")
    command.add_argument("protocol", metavar="PROTOCOL", help="how to measure (also A,B); a wrong name lists all")
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs, RUN/checkpoints/step-..., or files of weights"
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the runs' configurations")

    command = _command(commands, "finetune", _finetune, "train a run's network and a classifier on labels, and keep it")
    add_finetune_arguments(command)

    command = _command(commands, "features", _features, "write the features of a shard folder's images to files")
    add_features_arguments(command)

    command = _command(commands, "assign", _assign, "write which cluster of a run each image belongs to, by every head")
    add_assign_arguments(command)

    command = _command(commands, "curate", _curate, "choose what of a pile to train on, by its features")
    curate_arguments(command)

    command = _command(commands, "prune", prune, "find how few weights of a run are enough, and train those alone")
    prune_arguments(command)

    command = _command(commands, "export", _export, "write the weights to a file that other programs load")
    command.add_argument("run_dir", metavar="RUN", help="folder of a run")
    command.add_argument("out", metavar="OUT", help="file to write: NAME.safetensors, .onnx, .pt2, or a new folder")
    command.add_argument(
        "--format",
        default="torchvision",
        metavar="NAME",
        help="torchvision (default), timm, safetensors (this project's names), huggingface, onnx or torch_export",
    )
    command.add_argument("--head", action="store_true", help="with the projection head behind the backbone")
    command.add_argument("--card", type=Path, metavar="FILE", help="also write a model card (Markdown)")
    command.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest whole one)")

    command = _command(commands, "status", _status, "show how far a run has got; exit code 0 if complete, 85 if not")
    command.add_argument("target", metavar="RUN|CONFIG", help="folder of a run, or its recipe")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")

    command = _command(commands, "preflight", _preflight, "check nodes, network, disks and shards before a long run")
    command.add_argument("config", metavar="CONFIG", help=_RECIPE)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the recipe")

    command = _command(commands, "plan", _plan, "estimate memory, time, traffic and cost of a recipe on N GPUs")
    plan_arguments(command, _RECIPE)

    command = _command(commands, "report", _report, "write one self-contained page about a run, or that compares runs")
    command.add_argument("run_dirs", nargs="+", metavar="RUN", help="folders of runs")
    command.add_argument(
        "--out", metavar="FILE", help="default: RUN/report.html; for several runs beside the first of them"
    )
    command.add_argument("--figures", metavar="DIR", help="also write the plots as SVG and PNG files")
    command.add_argument(
        "--smooth", type=int, metavar="N", help="logged lines to average over; 0: none (default: 1/40)"
    )
    command.add_argument(
        "--watch", type=float, default=0, metavar="SECONDS", help="write it again and again while a run trains"
    )

    command = _command(commands, "runs", _runs, "list all runs below a folder: state, step, loss, speed, accuracies")
    command.add_argument("folder", metavar="DIR", nargs="?", default="runs", help="default: runs")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
) -> Parser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _init(arguments: argparse.Namespace) -> None:
    from largescale.propose.command import run

    sys.stdout.write(run(arguments))


def _pretrain(arguments: argparse.Namespace) -> None:
    _require_threads()
    stopping.listen()
    from largescale.config import load_config, to_yaml

    config = load_config(arguments.config, arguments.overrides)
    from largescale.pretrain import describe, pretrain
    from largescale.run.advice import about_copy

    if arguments.print:
        facts, complaints = describe(config)
        lines = [
            f"{key}: {value:,}" if isinstance(value, int | float) else f"{key}: {value}" for key, value in facts.items()
        ]
        sys.stdout.write(to_yaml(config) + "".join(f"# {line}\n" for line in lines))
        sys.stderr.write("".join(f"warning: {complaint}\n" for complaint in complaints))
    else:
        if own_rank() <= 0:
            sys.stderr.write(about_copy(Path(arguments.config), Path(config.run.dir)))
        pretrain(config)


def _distill(arguments: argparse.Namespace) -> None:
    _require_threads()
    from largescale.methods.taught import taught_by
    from largescale.run.teacher import teacher_file

    arguments.overrides = [*taught_by(teacher_file(arguments.teacher)), *arguments.overrides]
    _pretrain(arguments)


def _require_threads() -> None:
    """To be called before libraries are loaded that start threads at once and may not survive a refusal."""
    from largescale.distributed import threads

    threads.require(threads.COMMAND + threads.of_math())


def _config(arguments: argparse.Namespace) -> None:
    from largescale.config.command import run

    sys.stdout.write(run(arguments.words, markdown=arguments.markdown))


def _plan(arguments: argparse.Namespace) -> None:
    from largescale.plan.command import run

    sys.stdout.write(run(arguments) + "\n")


def _features(arguments: argparse.Namespace) -> None:
    _require_threads()
    from largescale.evaluate.features_out import write_features
    from largescale.evaluate.features_wish import Wish

    wish = Wish(
        arguments.format, arguments.dtype, arguments.assign, arguments.thumbnails, arguments.dim, arguments.whiten
    )
    _write_of_shards(arguments, lambda run, shards, out: write_features(run, shards, out, wish, arguments.overrides))


def _assign(arguments: argparse.Namespace) -> None:
    _require_threads()
    from largescale.evaluate.assign import assign

    _write_of_shards(arguments, lambda run, shards, out: assign(run, shards, out, arguments.overrides))


def _write_of_shards(arguments: argparse.Namespace, write: Callable[[str, str, Path], object]) -> None:
    from largescale.processes import process_group

    _log_times()
    out = Path(arguments.out).expanduser()
    with process_group():
        done = write(arguments.place, arguments.shards, out)
    if own_rank() <= 0:
        sys.stdout.write(f"{out}: {done}\n")


def _log_times() -> None:
    level = logging.INFO if own_rank() <= 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)


def _curate(arguments: argparse.Namespace) -> None:
    _require_threads()
    from largescale.curate.arguments import run

    _log_times()
    done = run(arguments)
    if own_rank() <= 0:
        sys.stdout.write(f"{arguments.out}: {done}\n")


def _evaluate(arguments: argparse.Namespace) -> None:
    _log_times()
    words = [*arguments.runs, *arguments.overrides]
    overrides = [word for word in words if re.match(r"[a-z][\w.\[\]]*=", word)]
    places = [word for word in words if word not in overrides]
    _require_threads()
    from largescale.evaluate.measure import evaluate
    from largescale.evaluate.protocols import settings_for
    from largescale.evaluate.table_of_runs import table

    for protocol, own in settings_for(arguments.protocol.split(","), overrides).items():
        records = evaluate(protocol, *places, overrides=own)
        if own_rank() <= 0:
            sys.stdout.write(table(places, records) + "\n")
            sys.stdout.flush()


def _finetune(arguments: argparse.Namespace) -> None:
    _require_threads()
    from largescale.evaluate.finetuned import finetune

    _log_times()
    done = finetune(arguments.place, arguments.out, protocol=arguments.protocol, overrides=arguments.overrides)
    if own_rank() <= 0:
        sys.stdout.write(f"{done}\n")


def _export(arguments: argparse.Namespace) -> None:
    from largescale.checkpoint.export import export
    from largescale.evaluate.figures import figures_of

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    run_dir = _run_dir(arguments.run_dir)
    done = export(
        run_dir,
        Path(arguments.out).expanduser(),
        format_name=arguments.format,
        step=arguments.step,
        head=arguments.head,
        card=arguments.card and arguments.card.expanduser(),
        figures=figures_of(run_dir),
    )
    about = done.metadata
    sys.stdout.write(
        f"{done.path}: {about['architecture']} of step {about['step']}, {about['num_features']} features, "
        f"{done.num_tensors} tensors, {done.num_bytes / 1e6:,.1f} MB; {done.checked}; see docs/export.md\n"
    )


def _preflight(arguments: argparse.Namespace) -> None:
    _require_threads()
    from largescale.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from largescale.run.preflight import preflight

    preflight(config)


def _status(arguments: argparse.Namespace) -> int:
    from largescale.config import load_config
    from largescale.config.recipes import packaged_recipe
    from largescale.run.status import COMPLETE, is_run, status_of

    run_dir = Path(arguments.target).expanduser()
    if run_dir.is_file() or (not is_run(run_dir) and packaged_recipe(run_dir)):
        run_dir = Path(load_config(run_dir, arguments.overrides).run.dir)
    elif not is_run(run_dir):
        raise InputError(f"{run_dir}: no run here; pass the folder that pretrain wrote, or its recipe")
    status = status_of(run_dir)
    sys.stdout.write(f"{run_dir}: {status}\n")
    return 0 if status.state == COMPLETE else UNFINISHED


def _report(arguments: argparse.Namespace) -> None:
    from largescale.report.page import Wanted, report

    run_dirs = [_run_dir(path) for path in arguments.run_dirs]
    out, figures = (Path(name).expanduser() if name else None for name in (arguments.out, arguments.figures))
    for path in report(run_dirs, Wanted(out, figures, arguments.smooth, arguments.watch)):
        sys.stdout.write(f"{path}\n")
        sys.stdout.flush()


def _runs(arguments: argparse.Namespace) -> None:
    from largescale.run.table import listing

    sys.stdout.write(listing(Path(arguments.folder).expanduser(), as_json=arguments.json) + "\n")


def _run_dir(path: str) -> Path:
    run_dir = Path(path).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise InputError(f"{path}: no run here (config.yaml is missing); pass the folder that pretrain wrote")
    return run_dir
