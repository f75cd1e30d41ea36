# SPDX-License-Identifier: Apache-2.0

"""Option parser of a verb: TRL's parser with short help, one-line errors and the options of `accelerate launch`."""

import contextlib
import inspect
import os
import shutil
import signal
import subprocess  # nosec B404
import textwrap
from argparse import SUPPRESS, Action, Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..common.arguments import REPLACEMENTS, TRAINER_ARGUMENT, check_types
from . import LAUNCHED, did_you_mean


ACCELERATE_CONFIGS = Path(__file__).parents[1] / "training" / "accelerate_configs"
HELP_COLUMN, HELP_WIDTH = 34, 119
VALUES = {"int": "N", "float": "X", "string_to_bool": "BOOL"}  # placeholders in help, by type


class ConfigParser(TrlParser):
    """TRL's parser. Configuration files may use any alias of an option, and a single value for a list option."""

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        options = {
            name.lstrip("-").replace("-", "_"): action
            for action in self._actions
            for name in action.option_strings
            if action.nargs != 0
        }
        defaults = {}
        for name, value in kwargs.items():
            action = options.get(name.replace("-", "_"))
            dest = name if action is None else action.dest
            if dest in defaults:
                raise ValueError(
                    f"The configuration must set `{dest}` once. Got two names, {name!r} and another; remove one"
                )
            if action is not None and action.nargs in ("+", "*") and value is not None:
                values = value if isinstance(value, list) else [value]
                value = [self._get_value(action, one) if isinstance(one, str) else one for one in values]
            defaults[dest] = value
        return super().set_defaults_with_config(**defaults)


class Parser(ConfigParser):
    """Parser of one verb. Its options are the fields of dataclasses."""

    def __init__(self, dataclass_types: Sequence[type], verb: str, description: str):
        super().__init__(
            dataclass_types,  # type: ignore[arg-type]  # the annotation is a NewType
            prog=f"trl-tfpo {verb}",
            description=description,
            allow_abbrev=False,
        )
        self.verb, self._types = verb, dataclass_types

    def format_help(self) -> str:
        """Format one entry per option, under its first name, grouped by the library that defines the option."""
        titles = {"trl_tfpo": "Options:", "trl": "Options of TRL:", "transformers": "Options of Transformers:"}
        entries: dict[str, list[str]] = {library: [] for library in titles}
        for action in self._actions:
            if action.dest != "help":
                entries[self._library_of(action.dest)].append(help_entry(action))
        width = min(shutil.get_terminal_size().columns, HELP_WIDTH)
        indent = " " * HELP_COLUMN
        wrapper = textwrap.TextWrapper(width, "", indent, break_long_words=False, break_on_hyphens=False)
        lines = [f"usage: {self.prog} [OPTIONS]", "", *textwrap.wrap(self.description or "", width)]
        for library, title in titles.items():
            if entries[library]:
                lines += ["", title, "", *(line for entry in entries[library] for line in wrapper.wrap(entry))]
        return "\n".join(lines) + "\n"

    def _library_of(self, name: str) -> str:
        bases = (base for cls in self._types for base in cls.__mro__ if name in inspect.get_annotations(base))
        return next(bases).__module__.split(".")[0]

    def error(self, message: str) -> NoReturn:
        """Raise `ValueError` instead of printing the usage and exiting."""
        raise ValueError(message)

    def parse(self, arguments: Sequence[str]) -> tuple:
        """Parse options into one instance of each dataclass. Raises `ValueError` on invalid options."""
        *parsed, from_config, from_line = self._parse(arguments)
        self._reject_unknown(from_config + from_line, ())
        return self._checked(parsed)

    def parse_or_launch(self, arguments: Sequence[str]) -> tuple | int:
        """
        Parse options, or launch the verb in several processes if there are options of `accelerate launch`.

        `--accelerate_config` is a file, or the name of a configuration of this package or of TRL.

        Returns:
            `tuple` or `int`: one instance of each dataclass or, after a launch, the exit status of the processes.

        Raises:
            `ValueError`: on invalid options.
        """
        *parsed, from_config, from_line = self._parse(arguments)
        if not from_config + from_line:
            return self._checked(parsed)
        from accelerate.commands.launch import launch_command_parser

        launcher = launch_command_parser()
        launcher.error = self.error
        num_values = {name: action.nargs for action in launcher._actions for name in action.option_strings}
        launch_options = []
        for name, value in zip(from_config[::2], from_config[1::2], strict=True):
            if num_values.get(name) != 0:
                launch_options += [name, value]
            elif value == "True":  # a flag without a value
                launch_options.append(name)
        launch_options += from_line
        self._reject_unknown(launch_options, {"--accelerate_config", *num_values})
        if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
            return self._checked(parsed)
        own_options, remaining = [], list(from_line)
        for argument in split_names(arguments):  # `from_line` is a subsequence of them
            if remaining and argument == remaining[0]:
                remaining.pop(0)
            else:
                own_options.append(argument)
        module = ["--module", "trl_tfpo", self.verb]
        launch_args = launcher.parse_args([*with_config_file(launch_options), *module, *own_options])
        if launch_args.training_script != "trl_tfpo":
            raise ValueError(f"unexpected argument {launch_args.training_script!r}. Options begin with `--`")
        os.environ[LAUNCHED] = "1"
        try:
            return launch(launch_args)
        finally:
            del os.environ[LAUNCHED]

    def _parse(self, arguments: Sequence[str]) -> tuple:
        arguments = split_names(arguments)
        config = None
        if "--config" in arguments:
            config = [*arguments, ""][arguments.index("--config") + 1]
            if not Path(config).is_file():
                raise ValueError(f"`--config` must be followed by a YAML file. Got {config!r}; check the path")
        try:
            return self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`--config` must be a YAML file. Got {config!r}: {error}") from error

    def _checked(self, parsed: Sequence[Any]) -> tuple:
        """Check the types of all values, because a configuration file may contain any type."""
        for instance in parsed:
            check_types(instance)
        return tuple(parsed)

    def _reject_unknown(self, remaining: Sequence[str], known: Collection[str]) -> None:
        """Raise `ValueError` on the first unknown argument, and name the most similar option."""
        for argument in remaining:
            name = argument.split("=")[0]
            if name.startswith("--") and name not in known:
                names = [*self._option_string_actions, *known]
                plain = name.lstrip("-").replace("-", "_")
                python_only = (TRAINER_ARGUMENT, REPLACEMENTS["tokenizer"])
                if REPLACEMENTS.get(plain, TRAINER_ARGUMENT) not in python_only:
                    raise ValueError(f"unknown option {name!r}. Instead: {REPLACEMENTS[plain]}")
                raise ValueError(f"unknown option {name!r}{did_you_mean(name, names)}")
        if remaining and not remaining[0].startswith("--"):
            raise ValueError(f"unexpected argument {remaining[0]!r}. Options begin with `--`")


def help_entry(action: Action) -> str:
    """Format the help of one option: name, placeholder of the value, description and default."""
    name = next(x for x in action.option_strings if x.startswith("--"))
    is_switch = action.nargs == 0 or action.const is True
    kind = "|".join(map(str, action.choices or ())) or VALUES.get(getattr(action.type, "__name__", ""), "TEXT")
    value = "" if is_switch else f" {kind} ..." if action.nargs in ("+", "*") else f" {kind}"
    text = (action.help or "").replace("%%", "%")
    default = action.default
    if action.nargs == 0 and action.const is False:
        text = f"Opposite of `--{action.dest}`."
    elif action.required:
        text += " (required)"
    elif not (default is None or default is False or default == [] or default is SUPPRESS):
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    return f"{f'  {name}{value}':<{HELP_COLUMN - 2}}  {text}"


def split_names(arguments: Sequence[str]) -> list[str]:
    """Split `--config=FILE` and `--accelerate_config=NAME` into two arguments each."""
    names = ("--config=", "--accelerate_config=")
    return [part for x in arguments for part in (x.split("=", 1) if x.startswith(names) else [x])]


def launch(launch_args: Namespace) -> int:
    """Launch processes. Returns 0 or the exit status of the first one to fail. Failed processes print their errors."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_args)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)  # the process received the interrupt too, and is about to exit
        raise
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval
    return 0


def with_config_file(options: Sequence[str]) -> list[str]:
    """Replace `--accelerate_config NAME` by `--config_file PATH` in options of `accelerate launch`."""
    options = list(options)
    if "--accelerate_config" not in options:
        return options
    index = options.index("--accelerate_config")
    name = options[index + 1] if index + 1 < len(options) else ""
    path = Path(name) if Path(name).is_file() else ACCELERATE_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        import trl

        path = Path(trl.__file__).parent / "accelerate_configs" / f"{name}.yaml"
    if not path.is_file():
        ours = sorted(file.stem for file in ACCELERATE_CONFIGS.glob("*.yaml"))
        raise ValueError(
            f"`--accelerate_config` must be a file or a name. Got {name!r}{did_you_mean(name, ours) or '.'} Choose "
            f"from {ours} and the names of TRL."
        )
    return ["--config_file", str(path), *options[:index], *options[index + 2 :]]
