"""Developer tools that build or read compiled code. Tests and benchmarks import them; segattn_ops does not."""
