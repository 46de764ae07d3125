"""Parsers generated from the option dataclasses; user errors become one line and exit status 2.

Imports no torch, so `--help` is instant.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine.cli.config import FLAG, MANY, OPTIONAL, Options, TrainConfig
from utils.errors import ConfigError, UserError, did_you_mean, hide_passwords
from utils.log import (
    MISTAKE,
    configure_logging,
    end_silently,
    is_main_process,
    print_error,
    run_command,
    set_error_folder,
    world_size,
)

T = TypeVar("T", bound=Options)


DEBUG_HELP = "print the traceback of an internal error instead of writing it to error.log"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors that suggest the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            names = [s for a in self._actions for s in a.option_strings]
            message += did_you_mean(unknown.split()[0].split("=")[0], names) + " (--help lists all options)"
        if not is_main_process():
            end_silently(2)  # rank zero reports the same error
        print_error(self.prog, message)
        self.exit(MISTAKE)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "(default: " in (action.help or "") else super()._get_help_string(action)


# YOLOv5 writes these with underscores, all others with dashes; both spellings of every option are accepted.
_UNDERSCORED = ("evolve_population", "resume_evolve", "local_rank", "upload_dataset", "bbox_interval")


def _spelling(name: str) -> str:
    return "--" + (name if name in _UNDERSCORED else name.replace("_", "-"))


def _respelled(config: type[Options], argv: Sequence[str]) -> list[str]:
    """Return the arguments with each option name, or its unique prefix, in the parser's spelling."""
    known = {_spelling(f.name).replace("_", "-"): _spelling(f.name) for f in fields(config)}  # type: ignore[arg-type]
    out = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            dashed = name.replace("_", "-")
            longer = [known[key] for key in known if key.startswith(dashed)]
            unique = longer[0] if len(longer) == 1 and "_" in longer[0] else dashed
            name = known.get(dashed, unique)
        out.append(name + equals + value)
    return out


def build_parser(config: type[Options], prog: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command; options may be shortened to a unique prefix."""
    parser = Parser(prog=prog, description=description, formatter_class=_HelpFormatter)
    for f in fields(config):  # type: ignore[arg-type]
        m = f.metadata
        names = [_spelling(f.name), *m.get("aliases", ())]
        default = f.default_factory() if callable(f.default_factory) else f.default
        text = m["help"].replace("%", "%%")
        if "resolved" in m:
            text += f" (default: {m['resolved']})"
        common: dict[str, Any] = {"dest": f.name, "default": default, "help": text}
        form = m.get("form")
        if form == FLAG:
            parser.add_argument(*names, action="store_true", **common)
            continue
        common["type"] = m["kind"]
        if "choices" in m:
            common["choices"] = [c for c in m["choices"] if c is not None]
        if form == OPTIONAL:
            common.update(nargs="?", const=m["const"])
        elif form == MANY:
            common["nargs"] = "+"
        parser.add_argument(*names, **common)
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    return parser


def _check_together(prog: str, options: Options) -> None:
    """Refuse, under torchrun, commands that do not run in several processes.

    Raises:
        ConfigError: the command or task runs in a single process.
    """
    if world_size() == 1:
        return
    if not isinstance(options, TrainConfig):
        raise ConfigError(f"{prog}: does not run under torchrun; start python {prog} (only train.py shares its work)")
    if options.evolve is not None or options.resume_evolve is not None:
        raise ConfigError(
            "--evolve: does not run under torchrun; start python train.py --evolve once, then the same command with "
            "--resume_evolve FOLDER and another --device for each further process"
        )


def resume_collection() -> None:
    """Resume garbage collection where a command paused it for its imports.

    During imports, collections take an eighth of the start-up time and find nothing: the objects of modules live as
    long as the process. They are therefore excluded from later collections as well.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_main(
    config: type[T], prog: str, description: str, work: Callable[[T], int | None], argv: Sequence[str] | None = None
) -> int:
    """Parse and check the options, and run the command.

    Args:
        config: option dataclass of the command.
        prog, description: shown by `--help`.
        work: runs the command; imports the engine itself, so that `--help` is instant; may return an exit status.
        argv: arguments; None = those of the process.

    Returns:
        Exit status: 0 or what `work` returned, or that of its exception, see `utils.log.run_command`.
    """
    parser = build_parser(config, prog, description)
    absent = object()
    values = argparse.Namespace(**{f.name: absent for f in fields(config)})  # type: ignore[arg-type]
    argv = sys.argv[1:] if argv is None else argv
    sys.argv = [hide_passwords(word) for word in sys.argv]  # which reports and trackers record
    parser.parse_args(_respelled(config, argv), values)
    configure_logging()
    debug = vars(values).pop("debug", False)
    try:
        options = config.from_given({name: value for name, value in vars(values).items() if value is not absent})
        options.check()
        _check_together(prog, options)
    except UserError as error:
        if not is_main_process():
            end_silently(MISTAKE)
        print_error(prog, error)
        return MISTAKE
    set_error_folder(Path(getattr(options, "project", "runs")))
    return run_command(prog, lambda: work(options), debug)
