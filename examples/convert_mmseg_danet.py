"""Converts a DANet of mmsegmentation to the fused ops and times both on a photograph.

    pip install --no-deps -r requirements/interop.txt
    python -m examples.convert_mmseg_danet

The model is mmsegmentation's own: DAHead on a ResNetV1c-50 at output stride 8. With --checkpoint it has the weights of
a file of mmsegmentation's model zoo; without one they are random, with the gammas set to 0.5, because gammas of zero
would remove attention from the output.
"""

import argparse
import copy
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage import data, transform
from torch import Tensor, nn

import segattn_ops
from benchmarks import command_line

PROG = "python -m examples.convert_mmseg_danet"


class NoExtension(types.ModuleType):
    """Stands in for the extension that mmcv-lite lacks: mmsegmentation imports it, DANet never calls it."""

    __all__: list[str] = []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def build(depth: int, classes: int, checkpoint: Path | None) -> nn.Module:
    """mmsegmentation's configuration danet_r50-d8, in evaluation mode."""
    try:
        import mmcv._ext  # noqa: F401
    except ImportError:
        sys.modules["mmcv._ext"] = NoExtension("mmcv._ext")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.models  # noqa: F401
        from mmseg.registry import MODELS

        norm = {"type": "BN"}
        model = MODELS.build(
            {
                "type": "EncoderDecoder",
                "backbone": {
                    "type": "ResNetV1c",
                    "depth": depth,
                    "num_stages": 4,
                    "out_indices": (0, 1, 2, 3),
                    "dilations": (1, 1, 2, 4),
                    "strides": (1, 2, 1, 1),
                    "norm_cfg": norm,
                    "style": "pytorch",
                    "contract_dilation": True,
                },
                "decode_head": {
                    "type": "DAHead",
                    "in_channels": 2048 if depth >= 50 else 512,
                    "in_index": 3,
                    "channels": 512,
                    "pam_channels": 64,
                    "dropout_ratio": 0.1,
                    "num_classes": classes,
                    "norm_cfg": norm,
                    "align_corners": False,
                },
                "train_cfg": {},
                "test_cfg": {"mode": "whole"},
            }
        )
    if checkpoint is not None:
        saved = segattn_ops.checkpoints.read(checkpoint)
        missing, unexpected = model.load_state_dict(saved.get("state_dict", saved), strict=False)
        unknown = [name for name in unexpected if not name.startswith("auxiliary_head.")]  # only for training
        if missing or unknown:
            raise SystemExit(
                f"{checkpoint} is not of a danet_r{depth}-d8: missing {', '.join(missing[:5]) or 'nothing'}, unknown "
                f"{', '.join(unknown[:5]) or 'nothing'}"
            )
    else:
        for name, parameter in model.named_parameters():
            if name.endswith("gamma.scale"):
                nn.init.constant_(parameter, 0.5)
    return model.eval()


def seconds(before: nn.Module, after: nn.Module, image: Tensor, repeats: int) -> tuple[float, float]:
    """The shortest forward pass of each after a warm-up. They alternate, so that other load on the machine affects
    both."""
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for index, model in enumerate((before, after)):
                begin = time.perf_counter()
                model(image)
                if image.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat > 0:
                    best[index] = min(best[index], time.perf_counter() - begin)
    return best[0], best[1]


def main(argv: list[str] | None = None) -> segattn_ops.ConversionReport:
    formatter = argparse.RawDescriptionHelpFormatter
    whole = command_line.whole
    parser = command_line.Parser(prog=PROG, description=__doc__, formatter_class=formatter)
    parser.add_argument("--checkpoint", type=Path, help="of mmsegmentation's model zoo")
    parser.add_argument("--image", type=Path, help="scikit-image's astronaut if not given")
    parser.add_argument("--size", type=whole(), default=512, help="side the image is stretched to (default 512)")
    parser.add_argument("--depth", type=int, default=50, choices=(18, 50, 101))
    parser.add_argument("--classes", type=whole(), default=19)
    parser.add_argument("--repeats", type=whole(), default=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=command_line.device, default=device)
    options = parser.parse_args(argv)
    command_line.visible(options.device)
    console = Console()
    torch.manual_seed(0)
    picture = data.astronaut() if options.image is None else np.asarray(Image.open(options.image).convert("RGB"))
    picture = transform.resize(picture, (options.size, options.size, 3), anti_aliasing=True)
    image = segattn_ops.checkpoints.MMSEGMENTATION(picture).to(options.device)
    model = build(options.depth, options.classes, options.checkpoint).to(options.device)
    original = copy.deepcopy(model)

    report = segattn_ops.convert(model, sample_input=image)

    console.print(str(report), soft_wrap=True)
    table = Table(title=f"DANet of mmsegmentation, {options.size} x {options.size}, {options.device}")
    for column in ("part", "original, s", "converted, s", "speed-up"):
        table.add_column(column, justify="left" if column == "part" else "right")
    with torch.inference_mode():
        features = original.extract_feat(image)
        attended = original.decode_head.pam_in_conv(features[-1])
    parts = {
        "whole network": (original, model, image),
        "position attention": (original.decode_head.pam, model.decode_head.pam, attended),
        "channel attention": (original.decode_head.cam, model.decode_head.cam, attended),
    }
    for name, (before, after, x) in parts.items():
        old, new = seconds(before, after, x, options.repeats)
        table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{old / new:.2f}x")
    console.print(table)
    return report


if __name__ == "__main__":
    sys.exit(command_line.example(PROG, main))
