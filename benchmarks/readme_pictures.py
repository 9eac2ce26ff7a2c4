"""The two pictures of README.md, small enough to commit, from a report of the benchmark:

python -m benchmarks.readme_pictures report     # writes docs/images/memory.png and attention.png
"""

import json
import sys
import tempfile
from pathlib import Path

from . import command_line, features, picture, plots
from .command_line import Refused

PROG = "python -m benchmarks.readme_pictures"
FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
PHOTOGRAPH, FEATURES, SIZE = "coffee", (128, 256), (97, 194)  # the defaults of `python -m benchmarks`


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


def draw_attention() -> None:
    """The first point of the photograph: the point and position attention above, criss-cross attention below."""
    from PIL import Image, ImageOps

    extractor = features.Extractor(512, None, 0)
    source = features.FeatureSource(features.load_photograph(PHOTOGRAPH), [FEATURES], extractor)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.png"
        picture.draw(source, SIZE, picture.POINTS[PHOTOGRAPH][:1], path, caption="")
        row = Image.open(path).convert("RGB")
    _, top, _, bottom = ImageOps.invert(row.convert("L")).getbbox()
    half, height = row.width // 2, bottom - top + 12
    square = Image.new("RGB", (half, 2 * height), "white")
    square.paste(row.crop((0, top, half, bottom)), (0, 0))
    square.paste(row.crop((half, top, 2 * half, bottom)), (0, height))
    save(square, FOLDER / "attention.png", 720)


def _run(report: Path) -> int:
    command_line.require("matplotlib", "PIL", "torchvision", "skimage")
    try:
        cells = json.loads((report / "report.json").read_text())["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{report} is no folder that `python -m benchmarks` has written ({error!r})") from error
    chosen = [cell for cell in cells if cell["op"] == "position" and cell["dtype"] == "float32"]
    if not any(cell.get("memory") for cell in chosen):
        raise Refused(f"{report} has no memory of position attention in float32, which the picture shows")
    command_line.writable_folder(FOLDER)
    draw_memory(chosen)
    draw_attention()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = command_line.Parser(prog=PROG, description="Draws the two pictures of README.md into docs/images.")
    parser.add_argument("report", type=Path, help="a folder that `python -m benchmarks` has written")
    arguments = parser.parse_args(argv)
    return command_line.run(PROG, lambda: _run(arguments.report))


if __name__ == "__main__":
    sys.exit(main())
