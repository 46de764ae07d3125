"""Check a dataset: `python -m data.check my.yaml`."""

import sys

from data.check.check import main

sys.exit(main())
