"""Shared by the data commands (`python -m data.convert`, `data.check`): one-line errors and exit statuses."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from utils.errors import did_you_mean
from utils.log import MISTAKE, configure_logging, print_error, run_command


class DataParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            names = [text for action in self._actions for text in action.option_strings]
            message += did_you_mean(unknown.split()[0].split("=")[0], names)
        print_error(self.prog, f"{message} (--help lists all options)")
        self.exit(MISTAKE)


def run(parser: DataParser, work: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run.

    Returns:
        Exit status: 0, or that of an exception, see `utils.log.run_command`.
    """
    parser.add_argument("--debug", action="store_true", help="print the traceback of an internal error")
    arguments = parser.parse_args(argv)
    configure_logging()
    return run_command(parser.prog, lambda: work(arguments), arguments.debug)
