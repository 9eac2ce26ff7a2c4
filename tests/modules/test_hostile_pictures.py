"""Pictures that were made to do harm, opened in a process of its own (tests/modules/hostile.py)."""

import io

import numpy as np
import pytest
from PIL import Image

from segattn_ops.visualize.images import as_image

from . import hostile
from .hostile_process import opened


def test_hostile_pictures(tmp_path, record_property) -> None:
    found = opened("pictures", 0, 150, tmp_path)
    record_property("files opened", found["tried"])
    record_property("inputs tried", found["tried"])
    assert not found["faults"]
    assert found["tried"] > 600 and found["refused"] > 200 and found["opened"] > 50


@pytest.mark.parametrize("name", hostile.pictures())
def test_pictures_of_every_kind(name, tmp_path) -> None:
    path = tmp_path / "picture.dat"  # the content says what it is
    path.write_bytes(hostile.pictures()[name])
    size = Image.open(path).size
    pixels = as_image(path)
    assert pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.float32


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(hostile.png(12_000, 12_000, b""))
    with pytest.raises(ValueError, match=r"it has 12000 x 12000 pixels, and PIL\.Image\.MAX_IMAGE_PIXELS is"):
        as_image(path)


def test_postscript_starts_no_program(tmp_path) -> None:
    path = tmp_path / "picture.png"
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    path.write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="is not an image that PIL can read"):
        as_image(path)
