#!/usr/bin/env python3
"""dqt-submit in a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dqt_dist.commands.submit import main

if __name__ == "__main__":
    sys.exit(main())
