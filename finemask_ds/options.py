"""Command lines from typed configurations: documented by their fields, unknown options answered with the valid ones."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from finemask_ds.errors import UserError

C = TypeVar("C")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are sentences that name what could be typed."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message as a UserError.

        Raises:
            UserError: always.
        """
        raise UserError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; an unknown option is answered with the nearest valid one of its (sub)command, or with all of them."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            valid = sorted(name for action in shown for name in action.option_strings if name.startswith("--"))
            option = unknown[0].split("=")[0]
            near = difflib.get_close_matches(option, valid, n=1)
            hint = f"did you mean {near[0]}? --help tells them all" if near else f"valid are {' '.join(valid)}"
            raise UserError(f"unknown option {option}; {hint}")
        return parsed, unknown


def parser_for(config_class: type[Any]) -> Parser:
    """A parser with one option for each field of a configuration, documented from the field itself."""
    summary = (config_class.__doc__ or "").split("\n")[0]
    parser = Parser(description=summary, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # The launcher adds it.
    add_options(parser, config_class)
    return parser


def add_options(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """Add a configuration's fields to a parser, in a group for each class that they come from, its own first."""
    owners = [owner for owner in config_class.__mro__ if dataclasses.is_dataclass(owner)]
    groups = {owner: parser.add_argument_group((owner.__doc__ or "").split("\n")[0].rstrip(".")) for owner in owners}
    for field in dataclasses.fields(config_class):
        owner = next(owner for owner in owners if field.name in inspect.get_annotations(owner))
        help_text = field.metadata["help"]
        unit, source = field.metadata["unit"], field.metadata["source"]
        many = isinstance(field.default, tuple)
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shown = "" if default in (None, "") else f" [{default}]"
        details = f"{help_text}{f' ({unit})' if unit else ''}{shown}{f' - {source}' if source else ''}"
        groups[owner].add_argument(
            f"--{field.name}", type=_type(config_class, field.name), default=field.default,
            nargs="+" if many else None, metavar="|".join(field.metadata["choices"]) or field.name.upper(),
            help=_wrapped(details).replace("%", "%%"),
        )  # fmt: skip


def from_options(config_class: type[C], options: Mapping[str, Any]) -> C:
    """The configuration of parsed options; others beside its fields are left alone.

    Raises:
        UserError: for a value that cannot be.
    """
    fields = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    chosen = {name: value for name, value in options.items() if name in fields}
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


def parse(config_class: type[C], argv: Sequence[str]) -> C:
    """The configuration that a command line asks for.

    Raises:
        UserError: for an unknown option or a value that cannot be.
    """
    return from_options(config_class, vars(parser_for(config_class).parse_args(list(argv))))


def _type(config_class: type[Any], name: str) -> type:
    hint = typing.get_type_hints(config_class)[name]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType):
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    return hint


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 88))
