"""The command line: `modelpar train`, `simulate`, `compare`, `profile`, `verify`, `view`, `explain`, `report`."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch logs each peer that goes; modelpar says why, once

import hydra
from omegaconf import DictConfig
from rich.console import Console

from modelpar import config as configs
from modelpar.config_folders import choices, own_folders, own_groups, searched
from modelpar.errors import ConfigError, ModelparError
from modelpar.paths import config_dir

_COMMANDS = {
    "train": "train a model in stages",
    "simulate": "predict a step and draw it; starts no process",
    "compare": "compare partitions and schedules, predicted and measured",
    "profile": "measure what each layer costs with all ranks busy, and save it",
    "verify": "compare the split model with the unsplit one, to the bit",
    "view": "show runs in TensorBoard",
    "explain": "say where a run's time went, and what would help most",
    "report": "write runs as one HTML file, or a step of one as a Chrome trace",
}
_EXAMPLES = {
    "train": (
        "modelpar train model=mlp schedule=gpipe pipeline.num_ranks=4",
        "modelpar train model=file model.factory=my_model.py:build data=arrays data.path=samples.npz",
    ),
    "simulate": (
        "modelpar simulate model=convnet partition=manual partition.balance=[5,3] pipeline.profile=flops",
        "modelpar simulate profile=graph.txt pipeline.num_ranks=4 cluster.link.bandwidth=10GB cluster.memory=16GB",
    ),
    "compare": (
        "modelpar compare partition=uniform,by_parameters,optimal schedule=gpipe,1f1b",
        "modelpar compare pipeline.num_microbatches=4,8,16 measure=0",
    ),
    "profile": (
        "modelpar profile model=gpt pipeline.num_ranks=2",
        "modelpar profile model=convnet pipeline.num_microbatches=16 file=convnet.json",
    ),
    "verify": (
        "modelpar verify model=gpt pipeline.num_ranks=4 schedule=gpipe",
        "modelpar verify model=hf model.config=GPT2Config +model.n_layer=4 transport=threads",
    ),
    "view": ("modelpar view runs", "modelpar view runs/first runs/second --port 6007"),
    "explain": ("modelpar explain runs/first", "modelpar explain runs"),
    "report": ("modelpar report runs", "modelpar report runs/first --output step.json.gz"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 when it is done, 1 when it failed, 2 for bad input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            _run(words)
        finally:
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except ModelparError as error:
        print(f"modelpar: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except OSError as error:  # such as of standard output: a full disk, or "| head", which wants no more
        if not isinstance(error, BrokenPipeError):
            print(f"modelpar: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python still flushes when it ends
        sys.exit(1)


def _run(words: list[str]) -> None:
    """Runs the command that the words name."""
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        sys.exit(0 if words else 2)
    command, *rest = words
    if command not in _COMMANDS:
        raise ConfigError(f"{command} is not a command; expected one of {', '.join(_COMMANDS)}")
    if command not in ("view", "explain", "report"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # for a _target_ beside the user's configurations; last, so it shadows nothing
        rest = _searched(rest)
        if {"-h", "--help"} & set(rest):
            print(_command_help(command, rest))
            return
    commands = {"train": _train, "simulate": _simulate, "compare": _compare}
    commands |= {"profile": _profile, "verify": _verify, "view": _view, "explain": _explain, "report": _report}
    commands[command](rest)


def _searched(words: list[str]) -> list[str]:
    """Returns the words with each `--config-dir DIR` as the override that says the same."""
    folders, rest, given = [], [], iter(words)
    for word in given:
        flag, equals, value = word.partition("=")
        if flag not in ("--config-dir", "-cd"):
            rest.append(word)
        elif folder := value if equals else next(given, ""):
            folders.append(folder)
        else:
            raise ConfigError("--config-dir has no value; expected --config-dir path/to/folder")
    for folder in folders:
        if not Path(folder).expanduser().is_dir():
            raise ConfigError(f"--config-dir is {folder}, which is not a folder; expected one with your configurations")
    return searched(folders, rest)


_HYDRA_FLAGS = {"-m": 0, "--multirun": 0, "-c": 1, "--cfg": 1, "--resolve": 0, "-p": 1, "--package": 1}
"""Those of Hydra's flags that `train` passes on, and how many values follow each."""


def _train(words: list[str]) -> None:
    """Runs the training under Hydra, so that its own flags work: -m for several runs, --cfg job to see the config."""
    overrides, flags = _split_flags(words)
    several = "-m" in flags or "--multirun" in flags
    for combination in itertools.product(*configs.parse_lists(overrides)) if several else [overrides]:
        configs.load("train", combination)  # Hydra would say what is wrong at length
    with tempfile.TemporaryDirectory() as folder:  # for what Hydra notes of several runs: each has its own config.yaml
        sweep = [f"hydra.sweep.dir='{folder}'"] if several else []
        _under_hydra("train", [*flags, *sweep, *overrides], _run_training)


def _split_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """Returns overrides, and Hydra's flags with their values; raises ConfigError for other flags."""
    overrides, flags, rest = [], [], iter(words)
    for word in rest:
        flag, equals, _ = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif flag not in _HYDRA_FLAGS:
            raise ConfigError(
                f"{word} is not an option of train; expected overrides, --config-dir, {', '.join(_HYDRA_FLAGS)}"
            )
        else:
            flags += [word, *itertools.islice(rest, 0 if equals else _HYDRA_FLAGS[flag])]
    return overrides, flags


def _run_training(config: DictConfig) -> None:
    from modelpar.train import train

    train(configs.checked(config), Console())


def _under_hydra(name: str, words: list[str], run: Callable[[DictConfig], None]) -> None:
    failure: list[BaseException] = []

    def job(config: DictConfig) -> None:
        try:
            run(config)
        except (ModelparError, OSError, KeyboardInterrupt) as error:
            failure.append(error)
            sys.exit(1)  # past Hydra, which would print a traceback

    sys.argv = [f"modelpar {name}", *words]
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)()
    except SystemExit:
        if failure:
            raise failure[0] from None
        raise


def _simulate(words: list[str]) -> None:
    config = configs.load("simulate", _overrides("simulate", words))
    from modelpar.simulate import simulate

    simulate(config, Console())


def _compare(words: list[str]) -> None:
    overrides = _overrides("compare", words)
    from modelpar.compare import compare

    compare(overrides, Console())


def _profile(words: list[str]) -> None:
    config = configs.load("profile", _overrides("profile", words))
    from modelpar.profile import profile

    profile(config, Console())


def _verify(words: list[str]) -> None:
    config = configs.load("verify", _overrides("verify", words))
    from modelpar.verify_command import verify_command

    if not verify_command(config, Console()).passed:
        sys.exit(1)


def _parser_of_runs(command: str, description: str) -> argparse.ArgumentParser:
    """Returns the parser of a command that takes runs and options of its own, not overrides."""
    parser = argparse.ArgumentParser(
        prog=f"modelpar {command}",
        description=description,
        epilog=_examples(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="RUN", help="the folder of a run, or a folder of runs")
    return parser


def _view(words: list[str]) -> None:
    parser = _parser_of_runs("view", "Shows runs in TensorBoard, on this machine only, until Ctrl-C.")
    parser.add_argument("--port", type=int, default=6006, help="0 picks a free one (default: %(default)s)")
    options = parser.parse_args(words)
    from modelpar.report.tensorboard.view import view

    view(options.paths, options.port)


def _explain(words: list[str]) -> None:
    parser = _parser_of_runs(
        "explain", "Says where the time of a run's steps went, why, and which one change would help most."
    )
    options = parser.parse_args(words)
    from modelpar.explain_command import explain_runs

    explain_runs(options.paths, Console())


def _report(words: list[str]) -> None:
    parser = _parser_of_runs(
        "report",
        "Writes runs as one HTML file that needs no network: strategies, timelines, plans. An output that\n"
        "ends in .json or .json.gz is the last traced step of one run, for Perfetto or chrome://tracing.",
    )
    parser.add_argument("--output", default="report.html", metavar="FILE", help="(default: %(default)s)")
    options = parser.parse_args(words)
    from modelpar.report_command import report

    print(report(options.paths, options.output))


def _overrides(command: str, words: list[str]) -> list[str]:
    """Returns the words, which must all be Hydra overrides."""
    for word in words:
        if word in ("-m", "--multirun") and command == "compare":
            raise ConfigError("compare takes lists as they are, partition=uniform,optimal; expected no -m")
        if word.startswith("-"):
            raise ConfigError(
                f"{word} is not an option of {command}; expected --config-dir or overrides such as "
                f"{configs.GROUPS[0]}=mlp"
            )
    return words


def _help() -> str:
    lines = "\n".join(f"  {name:<9} {text}" for name, text in _COMMANDS.items())
    return f"usage: modelpar COMMAND …\n\n{lines}\n\nmodelpar COMMAND --help says more."


def _command_help(command: str, words: list[str]) -> str:
    """Returns a command's groups with their choices, its options with their defaults, and examples."""
    folders = own_folders(words)
    names = {group: group for group in configs.GROUPS} | {f"+{group}": group for group in own_groups(folders)}
    groups = "\n".join(f"  {name:<12} {', '.join(choices(group, folders))}" for name, group in names.items())
    options = "\n".join(f"  {line}" for line in configs.options_text(command))
    example = config_dir() / "model" / "gpt.yaml"
    return (
        f"modelpar {command}: {_COMMANDS[command]}\n\nusage: modelpar {command} [group=choice] [option=value] …\n\n"
        f"groups and their choices:\n{groups}\n\n"
        f"options and their defaults (training.steps=300 changes one):\n{options}\n\n"
        f"A group's own options are in its file, such as {example}.\n"
        f"--config-dir DIR adds groups and choices of your own: DIR/model/mine.yaml is model=mine.\n\n"
        f"{_examples(command)}"
    )


def _examples(command: str) -> str:
    return "examples:\n" + "\n".join(f"  {example}" for example in _EXAMPLES[command])


if __name__ == "__main__":
    main()
