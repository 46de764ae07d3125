"""The installed command: `yolov5-backbones train --cfg ...` is `python train.py --cfg ...` in any folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

PROG = "yolov5-backbones"
COMMANDS = {
    **{name: name for name in ("train", "val", "detect", "export", "compare")},
    "check": "data.check",
    "convert": "data.convert",
    "backbones": "models.backbones",
}
HELP = f"""usage: {PROG} COMMAND [options]; {PROG} COMMAND --help lists the options

train, val, detect, export, compare  the scripts of these names
check, convert                       python -m data.check, data.convert
backbones                            python -m models.backbones"""


def main() -> int:
    """Run the command that the first argument names."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # before any other `utils` or `models`
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(HELP)
        return 0
    if name not in COMMANDS:
        from utils.errors import did_you_mean, shown
        from utils.log import MISTAKE, print_error

        allowed = f"allowed: {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        print_error(PROG, f"unknown command {shown(name)}; {allowed}")
        return MISTAKE
    del sys.argv[1]
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)
    return 0
