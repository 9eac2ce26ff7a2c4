"""The GPU suite, ``python -m benchmarks.gpu_suite``: builds, checks, benchmarks, tests, profiles and sanitizes.

``suite`` is the command. Each piece is a module with ``steps(selection)`` and ``run(state, clock, selection, device)``:
``build``, ``smoke``, ``ceilings``, ``bench``, ``tests``, ``profile``, ``sanitize``. ``run`` returns True (passed),
False (failed) or None (out of time). A step that passed is not run again. ``report`` writes the results as Markdown,
``plots`` draws them, and ``plan`` prints the calls for a machine lent for half an hour.
"""
