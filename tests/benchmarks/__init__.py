"""The benchmarks are scripts: their folder is where they find each other, in rank processes too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
