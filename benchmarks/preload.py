"""The imports of the server that forks cell processes. Imports only: threads do not survive the fork."""

import os

# Keeps the compiler from starting worker processes in the forking server.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401

import segattn_ops  # noqa: F401
from benchmarks import cell  # noqa: F401
