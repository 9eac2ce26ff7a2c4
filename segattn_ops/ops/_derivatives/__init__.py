"""Forward-mode and second derivatives of the operators, in plain PyTorch.

``attention.py`` holds the algebra of softmax attention, for any set of pairs of queries and keys; the other files apply
it to the arguments of a family's operators.
"""
