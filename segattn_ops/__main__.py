"""`python -m segattn_ops`: describes this installation."""

from typing import Any

from ._build_config import build_config


def _print(values: dict[str, Any], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name}: {', '.join(map(str, value)) or 'none'}")
        else:
            print(f"{indent}{name}: {value}")


if __name__ == "__main__":
    _print(build_config())
