"""``gfnode-fast``: options, subcommands and exit codes.

Exit codes: 0 done; 1 a check failed (the demo not below its baseline, models that differ, a loss
that is not finite, an unphysical simulation); 2 usage or input that cannot be used, said in one
line; 130 interrupted, with a checkpoint to go on from.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gfnode_fast._version import __version__
from gfnode_fast.cli import commands, console, data_commands
from gfnode_fast.data import SimulationError, TrajectoryError
from gfnode_fast.solvers import SolverError
from gfnode_fast.training import (
    CheckpointError,
    ConfigError,
    GraphMismatchError,
    NonFiniteLossError,
    PeerLostError,
    TrainConfig,
    config_from_dict,
)

BAD_INPUT = 2

_Command = Callable[..., int]

_COMMANDS: dict[str, _Command] = {
    "demo": commands.demo_command,
    "evaluate": commands.evaluate_command,
    "predict": commands.predict_command,
    "info": commands.info_command,
    "check": commands.check_command,
}
_DATA_COMMANDS: dict[str, _Command] = {
    "inspect": data_commands.inspect_command,
    "simulate": data_commands.simulate_command,
    "spectrum": data_commands.spectrum_command,
}

# Commands that take the configuration of a run, and their own options beside it.
_WITH_CONFIG: dict[str, tuple[_Command, tuple[str, ...]]] = {
    "sweep-modes": (commands.sweep_modes_command, ("modes",)),
    "bench": (commands.bench_command, ("batch_sizes", "seconds", "compiled")),
}

# "op: `name` must be …" is how this package words what is wrong with an argument; any other
# ValueError, TypeError or RuntimeError is a defect and keeps its traceback.
_ABOUT_AN_ARGUMENT = re.compile(r"[\w .-]+: `[^`]+` must ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code.
    """
    from jsonargparse import ArgumentError

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, run = _parser()
    try:
        parsed = parser.parse_args(arguments)
        if parsed.command == "train" and parsed.train.resume is not None:
            parsed = parser.parse_args(_with_stored_config(arguments, parsed.train.resume))
    except (ArgumentError, ConfigError) as error:
        return _bad_input(f"gfnode-fast: {error}")
    try:
        return run(parsed)
    except (NonFiniteLossError, PeerLostError, SimulationError, SolverError) as error:
        console.complain(f"gfnode-fast: {error}")
        return console.FAILED
    except (ConfigError, CheckpointError, GraphMismatchError, TrajectoryError, OSError) as error:
        return _bad_input(f"gfnode-fast: {error}")
    except (ValueError, TypeError, RuntimeError) as error:
        if not _ABOUT_AN_ARGUMENT.match(str(error)):
            raise
        return _bad_input(f"gfnode-fast: {error}")
    except KeyboardInterrupt:
        console.complain("gfnode-fast: interrupted")
        return console.INTERRUPTED


def _bad_input(message: str) -> int:
    console.complain(" ".join(message.split()))
    return BAD_INPUT


def _parser() -> tuple[Any, Callable[[Any], int]]:
    """The parser, and what runs the arguments that it parsed."""
    parser = _new_parser(
        prog="gfnode-fast",
        description="Graph Fourier Neural ODEs, fast.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, command in _COMMANDS.items():
        subcommands.add_subcommand(name, _command_parser(command), help=_summary(command))
    training = _training_parser(commands.train_command)
    training.add_argument(
        "--resume",
        type=str,
        metavar="RUN",
        help="go on with the run in this directory, with its own configuration",
    )
    subcommands.add_subcommand("train", training, help=_summary(commands.train_command))
    sweep = _training_parser(commands.sweep_modes_command)
    sweep.add_argument("--modes", type=str, required=True, help="numbers of modes, as 1,2,3,5")
    subcommands.add_subcommand("sweep-modes", sweep, help=_summary(commands.sweep_modes_command))
    bench = _training_parser(commands.bench_command)
    bench.add_argument("--batch_sizes", type=str, default="10,50,200", help="as 10,50,200")
    bench.add_argument("--seconds", type=float, default=5.0, help="spent on each setting")
    bench.add_argument(
        "--compiled",
        type=bool,
        default=False,
        help="also time model.backend=compiled, which takes minutes to compile",
    )
    subcommands.add_subcommand("bench", bench, help=_summary(commands.bench_command))
    data = _new_parser(description="Inspect and make trajectories.")
    subcommands.add_subcommand("data", data, help="Inspect and make trajectories")
    data_subcommands = data.add_subcommands(required=True, dest="subcommand")
    for name, command in _DATA_COMMANDS.items():
        data_subcommands.add_subcommand(name, _command_parser(command), help=_summary(command))
    return parser, _run


def _training_parser(command: _Command) -> Any:
    """A parser of everything that configures a run."""
    parser = _new_parser(description=_summary(command))
    parser.add_argument("--config", action="config", help="YAML file; the command line beats it")
    parser.add_class_arguments(TrainConfig)
    return parser


def _with_stored_config(arguments: list[str], run: str) -> list[str]:
    """The same command line on top of the configuration that the run was started with."""
    stored = Path(run) / "config.json"
    if not stored.is_file():
        raise ConfigError(
            f"train: `resume` must be the directory of a run, got {run!r}, which has no "
            "config.json; check the path"
        )
    place = arguments.index("train") + 1
    return [*arguments[:place], "--config", str(stored), *arguments[place:]]


def _run(parsed: Any) -> int:
    values = parsed.as_dict()
    name = values["command"]
    if name == "train":
        options = {key: value for key, value in values["train"].items() if key != "config"}
        run = options.pop("resume")
        if run is not None:
            options["output"] = run  # wherever it is now
        return commands.train_command(config_from_dict(options), run is not None)
    if name in _WITH_CONFIG:
        command, own = _WITH_CONFIG[name]
        options = {key: value for key, value in values[name].items() if key != "config"}
        extra = {key: options.pop(key) for key in own}
        return command(config_from_dict(options), **extra)
    if name == "data":
        subcommand = values["data"]["subcommand"]
        return _call(_DATA_COMMANDS[subcommand], values["data"][subcommand])
    return _call(_COMMANDS[name], values[name])


def _call(command: _Command, options: dict[str, Any]) -> int:
    return command(**{key: value for key, value in options.items() if key != "config"})


def _command_parser(command: _Command) -> Any:
    parser = _new_parser(description=_summary(command))
    parser.add_argument("--config", action="config", help="YAML file; the command line beats it")
    parser.add_function_arguments(
        command,
        as_group=False,
        as_positional=command is not data_commands.simulate_command,
        skip={"json"},
    )
    # Added here because a bool option otherwise wants a value.
    if "json" in inspect.signature(command).parameters:
        parser.add_argument("--json", action="store_true", help="print as JSON")
    return parser


def _new_parser(**options: Any) -> Any:
    from jsonargparse import ArgumentParser

    return ArgumentParser(exit_on_error=False, **options)


def _summary(command: _Command) -> str:
    return (command.__doc__ or "").split("\n", 1)[0].rstrip(".")
