"""The picture of the memory in README.md, small enough to commit, from a report of the benchmark:

python -m benchmarks.readme_pictures report     # writes docs/images/memory.png

That of the attention is drawn by ``python -m examples.draw_attention --out docs/images``.
"""

import json
import sys
import tempfile
from pathlib import Path

from . import command_line, plots
from .command_line import Refused

PROG = "python -m benchmarks.readme_pictures"
FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"


def save(image, path: Path, width: int) -> None:
    from PIL import Image

    scaled = image.convert("RGB").resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    scaled.quantize(256).save(path, optimize=True)


def draw_memory(cells: list[dict]) -> None:
    """The panel of position attention in float32."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = plots.draw_memory(cells, Path(folder) / "memory.png", heading="")
        save(Image.open(path), FOLDER / "memory.png", 520)


def _run(report: Path) -> int:
    command_line.require("matplotlib", "PIL")
    try:
        cells = json.loads((report / "report.json").read_text())["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{report} is no folder that `python -m benchmarks` has written ({error!r})") from error
    chosen = [cell for cell in cells if cell["op"] == "position" and cell["dtype"] == "float32"]
    if not any(cell.get("memory") for cell in chosen):
        raise Refused(f"{report} has no memory of position attention in float32, which the picture shows")
    command_line.writable_folder(FOLDER)
    draw_memory(chosen)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(prog=PROG, description="Draws the memory's picture of README.md into docs/images.")
    parser.add_argument("report", type=Path, help="a folder that `python -m benchmarks` has written")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(arguments.report))


if __name__ == "__main__":
    sys.exit(main())
