"""Builds of the CPU libraries for sanitizers, and the processes that run under them (docs/emulator.md)."""
