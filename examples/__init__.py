"""Examples: run each as ``python -m examples.NAME`` from the source tree. They need requirements/dev.txt."""
