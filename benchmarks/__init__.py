"""Compares segattn_ops with the alternatives in PyTorch, on the features of a real photograph.

``python -m benchmarks`` is the main job; ``python -m benchmarks.gpu_suite`` runs on a machine with a GPU;
``python -m benchmarks papers`` reproduces the published tables. docs/benchmarks.md describes the method.
"""
