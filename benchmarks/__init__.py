"""Measures segattn_ops against what a user would write instead, on the features of a real photograph.

``python -m benchmarks`` is the main job; ``python -m benchmarks.gpu_suite`` is what runs on a machine with a GPU;
``python -m benchmarks.papers`` reproduces the published tables. How it measures is told in docs/benchmarks.md.
"""
