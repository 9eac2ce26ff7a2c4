"""Everything to run on a machine with a GPU: ``python -m benchmarks.gpu_suite --help`` (see benchmarks/gpu)."""

import sys

from .gpu.suite import main

if __name__ == "__main__":
    sys.exit(main())
