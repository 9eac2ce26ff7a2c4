"""Draws the GPU suite's JSON: ``python -m benchmarks.gpu_plots report/gpu/gpu.json`` (see benchmarks/gpu/plots.py)."""

import sys

from .gpu.plots import main

if __name__ == "__main__":
    sys.exit(main())
