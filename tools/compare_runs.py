#!/usr/bin/env python3
"""dqt-compare in a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dqt_dist.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
