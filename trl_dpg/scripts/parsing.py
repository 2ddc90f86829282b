"""Parsing of the commands, without PyTorch: flags, YAML, help, and messages about bad arguments."""

import argparse
import difflib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser


LONG_TEXT = 110  # of help texts with more characters, `--help` shows only the first sentence


class HelpFormatter(argparse.HelpFormatter):
    """Shows each flag with its text, its choices and its default. Of a long text, only the first sentence, unless `whole_texts`."""

    def __init__(self, prog: str, whole_texts: bool = False):
        super().__init__(prog, max_help_position=38, width=shutil.get_terminal_size((118, 24)).columns)
        self.whole_texts = whole_texts

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if len(text) > LONG_TEXT and not self.whole_texts:
            text = re.split(r"(?<=\.) (?=[A-Z`])", text)[0]
        choices = list(map(str, action.choices or []))
        if not all(choice in text for choice in choices) and (len(choices) < 8 or self.whole_texts):
            text += f" One of {', '.join(choices)}."
        default = getattr(action.default, "value", action.default)  # an enumeration has its value there
        if default not in (None, argparse.SUPPRESS, "", []):
            text += f" [{default}]".replace("%", "%%")
        return text


class HelpAll(argparse._HelpAction):
    """Shows all flags. `--help` only shows those in groups."""

    def __call__(self, parser: Any, *args: Any) -> None:
        parser.shows_all = True
        super().__call__(parser, *args)


class Parser(TrlParser):
    """
    TRL's parser with three changes: errors are `ValueError`s, negative numbers are values, and YAML is checked as strictly as flags.

    `groups` maps headings to names of fields. With it, `--help` shows only these fields, and `--help-all` shows all.
    """

    def __init__(self, *args: Any, groups: dict[str, list[str]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # Python's own pattern reads -1e-3 as a flag
        self.check_rest: Callable[..., None] = self.refuse
        self.groups, self.shows_all = groups or {}, groups is None
        if groups is not None:
            self.add_argument("--help-all", action=HelpAll, help="Show all flags, with their whole texts, and exit.")

    def format_help(self) -> str:
        """The help page: groups of flags. A flag with several names is shown under one of them."""
        formatter = HelpFormatter(self.prog, self.shows_all)
        words = [action.dest.upper() for action in self._actions if not action.option_strings]
        config = ["[--config YAML]"] * bool(self.dataclass_types)
        formatter.add_text(" ".join(["usage:", self.prog, *config, *words, "[--flag value ...]"]))
        formatter.add_text(self.description)
        actions = {action.dest: action for action in reversed(self._actions)}  # leaves `--no_...` out
        actions |= {action.option_strings[0]: action for action in self._actions if action.dest == argparse.SUPPRESS}
        actions.pop(argparse.SUPPRESS, None)
        groups, grouped = dict(self.groups), {name for names in self.groups.values() for name in names}
        others = [name for name in reversed(actions) if name not in grouped]
        if self.shows_all:
            groups["further flags" if grouped else "flags"] = others
        for title, names in groups.items():
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def error(self, message: str):
        """Raises a [`ValueError`]. Without this method, argparse would print all flags."""
        raise ValueError(f"{message}. `{self.prog} --help` lists the flags and their values.")

    def refuse(self, unknown: list[str], where: str = "", flags: Iterable[str] = (), remedy: str = "") -> None:
        """Raises a [`ValueError`] for unknown arguments. It names the flag that was probably meant, of this parser or of `flags`."""
        if not unknown:
            return
        known = [*self._option_string_actions, *flags]
        names = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
        meant = [match for name in names for match in difflib.get_close_matches(name, known, 1, 0.75)]
        hint = f" Did you mean {' and '.join(f'`{name}`' for name in meant)}?" if meant else ""
        raise ValueError(
            f"Unknown arguments{where}: {' '.join(unknown)}.{hint} `{self.prog} --help` lists the arguments{remedy}."
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in [`~argparse.ArgumentParser`], but unknown arguments are checked before values are."""
        parsed, rest = super().parse_known_args(args, namespace)
        self.check_rest(rest)
        return parsed, rest

    def parse_args_and_config(  # type: ignore[override]
        self, args: Iterable[str] | None = None, check_rest: Callable[..., None] | None = None
    ) -> Any:
        """
        As in [`~trl.TrlParser`], but `--config=FILE` also works.

        With `check_rest`, unknown arguments are returned, too. It is called with these arguments and with where they come from.
        """
        self.check_rest = check_rest or self.refuse
        flags: list[str] = []
        for flag in sys.argv[1:] if args is None else args:
            flags += flag.split("=", 1) if flag.startswith("--config=") else [flag]
        positions = [index for index, flag in enumerate(flags) if flag == "--config"]
        if len(positions) > 1:
            raise ValueError("`--config` was given twice. Put all settings into one file.")
        if positions and positions[0] + 1 == len(flags):
            raise ValueError("`--config` has no value. Pass the path of a YAML file.")
        try:
            parsed = super().parse_args_and_config(flags, return_remaining_strings=True)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"`--config` {flags[positions[0] + 1]!r} is no YAML: {error}") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.doc!r} was given as JSON, but is none: {error}. Correct the value.") from error
        return parsed if check_rest is not None else parsed[:-1]

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """As in [`~trl.TrlParser`], but converts and checks each value as if it were on the command line."""
        for action in self._actions:
            value = kwargs.get(action.dest)
            values = value if isinstance(value, list) else [value]
            if action.type is None or not all(isinstance(item, (str, int, float)) for item in values):
                continue  # there is no value, or no flag could have it
            try:
                values = [self._get_value(action, str(item)) for item in values]
                for item in values:
                    self._check_value(action, item)
            except argparse.ArgumentError as error:
                quotes = " (YAML reads yes, no, on and off as true and false: put them in quotes)"
                self.error(f"{error}{quotes if isinstance(value, bool) else ''}")
            kwargs[action.dest] = values if isinstance(value, list) or action.nargs == "+" else values[0]
        rest = super().set_defaults_with_config(**kwargs)
        self.check_rest(rest, " from config file")
        return rest


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments, with its default and its help text."""
    return field(default=default, metadata={"help": help})


def at_least_one(args: Any, *names: str) -> None:
    """Raises a [`ValueError`] if one of these arguments is below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def make_folder_for(path: str | None, argument: str) -> None:
    """Makes the folder of a file that is written later. So an error shows before the work begins."""
    try:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`{argument}` {path!r} cannot be written: {error}. Name another place.") from error


def run_script(main: Callable[[list[str] | None], int], argv: list[str] | None, prog: str) -> int:
    """
    Runs a script and returns its exit code. Bad input prints one line and returns 2.

    Other errors, and errors with a note, keep their traceback. `argv=None` means the arguments of the process.
    """
    try:
        return main(argv)
    except (ValueError, ImportError, OSError) as error:
        if hasattr(error, "__notes__"):  # added by `running`
            raise
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            error = ValueError(f"{str(error.filename)!r} does not exist.")
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
