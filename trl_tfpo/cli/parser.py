# SPDX-License-Identifier: Apache-2.0

"""Options of a verb: TRL's parser, with errors of one line, and those of `accelerate launch`."""

import contextlib
import os
import signal
import subprocess  # nosec B404
from argparse import Action, Namespace
from collections.abc import Sequence
from pathlib import Path

import yaml
from trl import TrlParser

from ..common.arguments import INSTEAD, OF_TRAINER, check_types
from . import LAUNCHED, did_you_mean


ACCELERATE_CONFIGS = Path(__file__).parents[1] / "training" / "accelerate_configs"
DTYPES = ("auto", "bfloat16", "float16", "float32")
DTYPE_HELP = {
    "help": "Dtype of the models: 'bfloat16', 'float16', 'float32', or 'auto', that of each checkpoint, but float32 on a CPU "
    "without bfloat16 instructions."
}


class Repeated(Action):
    """A list, in one go (`--doctor a b`) or word by word (`--doctor a --doctor b`), in place of that of a config."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


class ConfigParser(TrlParser):
    """TRL's parser; a configuration file may use every name of an option, and one value where a list belongs."""

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
                raise ValueError(f"`{dest}` has two names in the configuration, {name!r} among them. Leave one out")
            if action is not None and action.nargs in ("+", "*") and value is not None:
                values = value if isinstance(value, list) else [value]
                value = [self._get_value(action, one) if isinstance(one, str) else one for one in values]
            defaults[dest] = value
        return super().set_defaults_with_config(**defaults)


class Parser(ConfigParser):
    """An error raises `ValueError` instead of printing hundreds of options."""

    def __init__(self, dataclass_types, verb: str, description: str):
        super().__init__(dataclass_types, prog=f"trl-tfpo {verb}", description=description, allow_abbrev=False)

    def error(self, message: str):
        raise ValueError(message)

    def parse(self, arguments: Sequence[str]) -> tuple:
        """
        Instances of the dataclasses.

        Raises:
            `ValueError`: on an unknown option, with the nearest one there is.
        """
        *parsed, from_config, from_line = self._parse(arguments)
        self._refuse(from_config + from_line, ())
        return self._checked(parsed)

    def parse_or_launch(self, arguments: Sequence[str], verb: str) -> tuple | int:
        """
        The same where no option of `accelerate launch` is given, or in a process that was launched by them; else the exit
        status of the launched processes.

        `--accelerate_config` is a file, or the name of a config of this package or of TRL.
        """
        *parsed, from_config, from_line = self._parse(arguments)
        if not from_config + from_line:
            return self._checked(parsed)
        from accelerate.commands.launch import launch_command_parser

        launcher = launch_command_parser()
        launcher.error = self.error
        options = {name: action.nargs for action in launcher._actions for name in action.option_strings}
        launch = []
        for name, value in zip(from_config[::2], from_config[1::2], strict=True):
            if options.get(name) != 0:
                launch += [name, value]
            elif value == "True":  # a switch, which is followed by nothing
                launch.append(name)
        launch += from_line
        self._refuse(launch, {"--accelerate_config", *options})
        if LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
            return self._checked(parsed)
        rest, remaining = [], list(from_line)
        for argument in split_names(arguments):  # `from_line` is a part of them, in order
            if remaining and argument == remaining[0]:
                remaining.pop(0)
            else:
                rest.append(argument)
        launch_args = launcher.parse_args([*with_config_file(launch), "--module", "trl_tfpo", verb, *rest])
        if launch_args.training_script != "trl_tfpo":
            raise ValueError(f"unexpected argument {launch_args.training_script!r}. Options begin with `--`")
        os.environ[LAUNCHED] = "1"
        try:
            return exit_status(launch_args)
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

    def _checked(self, parsed: Sequence) -> tuple:
        """The instances; a value of a configuration file comes in any type."""
        for instance in parsed:
            check_types(instance)
        return tuple(parsed)

    def _refuse(self, remaining: Sequence[str], known: Sequence[str]) -> None:
        """Complain of the first option that nobody knows."""
        for argument in remaining:
            name = argument.split("=")[0]
            if name.startswith("--") and name not in known:
                names = [*self._option_string_actions, *known]
                plain = name.lstrip("-").replace("-", "_")
                if INSTEAD.get(plain, OF_TRAINER) not in (OF_TRAINER, INSTEAD["tokenizer"]):  # these are of Python
                    raise ValueError(f"unknown option {name!r}. Instead: {INSTEAD[plain]}")
                raise ValueError(f"unknown option {name!r}{did_you_mean(name, names)}")
        if remaining and not remaining[0].startswith("--"):
            raise ValueError(f"unexpected argument {remaining[0]!r}. Options begin with `--`")


def old_name(name: str) -> list[str]:
    """Option strings of a name that an option had before, for the `aliases` of its field."""
    return [f"--{name}", f"--{name.replace('_', '-')}"]


def split_names(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--config=FILE` as two words, as those who look for the option expect it."""
    names = ("--config=", "--accelerate_config=")
    return [part for x in arguments for part in (x.split("=", 1) if x.startswith(names) else [x])]


def exit_status(launch_args: Namespace) -> int:
    """Launch, and the status of the first process that failed, which has said why; 0 if none did."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_args)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)  # the process was interrupted as well, and ends in a moment
        raise
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval
    return 0


def with_config_file(launch: Sequence[str]) -> list[str]:
    """Launch options with `--accelerate_config NAME` replaced by `--config_file PATH`."""
    launch = list(launch)
    if "--accelerate_config" not in launch:
        return launch
    index = launch.index("--accelerate_config")
    name = launch[index + 1] if index + 1 < len(launch) else ""
    path = Path(name) if Path(name).is_file() else ACCELERATE_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        import trl

        path = Path(trl.__file__).parent / "accelerate_configs" / f"{name}.yaml"
    if not path.is_file():
        ours = sorted(file.stem for file in ACCELERATE_CONFIGS.glob("*.yaml"))
        raise ValueError(
            f"`--accelerate_config` must be a file or a name. Got {name!r}{did_you_mean(name, ours)}; there are {ours}, "
            "and those of TRL."
        )
    return ["--config_file", str(path), *launch[:index], *launch[index + 2 :]]
