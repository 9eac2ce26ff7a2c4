"""What the server of cell processes imports before it forks. Imports only: a thread started here would not survive."""

import os

# The compiler must not start worker processes from a server that forks.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401

import segattn_ops  # noqa: F401
from benchmarks import cell  # noqa: F401
