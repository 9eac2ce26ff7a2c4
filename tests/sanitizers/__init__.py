"""Builds of the CPU libraries for sanitizers and Valgrind, and the processes that run under them (docs/sanitizers.md)."""
