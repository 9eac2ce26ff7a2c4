"""The host time of a call on a feature map that is too small to matter: `python -m benchmarks.overhead`.

Every formulation of an op gets the same tensors. Batches of calls alternate between all formulations and modes, round
by round. A figure is the median over the rounds of the CPU time that the calling thread spends for one call, so that
other processes on the machine count as little as possible. The garbage collector is off, as in `timeit`.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import command_line, rivals

PROG = "python -m benchmarks.overhead"
MODES = ("forward", "forward + backward")
Formulation = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An op, the tensors of a call, and the formulations by their titles, this package's first."""

    name: str
    tensors: tuple[Tensor, ...]
    formulations: dict[str, Formulation]


def three_calls(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Position attention on (B, C, N) maps without any change of shape: what eager PyTorch takes at the least."""
    return torch.bmm(value, torch.bmm(query.mT, key).softmax(-1).mT)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same on tokens, (B, 1, N, C), in their own layout."""
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def cases(height: int, width: int, channels: int) -> list[Case]:
    from segattn_ops import position_attention, residual_channel_attention
    from segattn_ops.nn import ChannelAttention, CrissCrossAttention, PositionAttention

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    shape = (1, channels, height, width)
    maps = (draw(*shape), draw(*shape), draw(*shape))
    x, gamma = maps[0], draw(1)
    flat = tuple(t.flatten(2) for t in maps)
    tokens = tuple(t.mT.unsqueeze(1).contiguous() for t in flat)

    def eager_block(block: nn.Module, attend: Formulation) -> Formulation:
        return lambda x: block.gamma * attend(block.query_conv(x), block.key_conv(x), block.value_conv(x)) + x

    position, cross = PositionAttention(channels, channels), CrissCrossAttention(channels, channels)
    channel = ChannelAttention(channels)
    for block in (position, cross, channel):
        nn.init.ones_(block.gamma)
    ours, eager = "segattn_ops", "eager"
    return [
        Case("position_attention", maps, {ours: position_attention, eager: rivals.eager_position}),
        Case("position_attention, (B, C, N)", flat, {ours: position_attention, "eager, three calls": three_calls}),
        Case("scaled_dot_product_attention, tokens", tokens, {"SDPA": sdpa}),
        Case("criss_cross_attention", maps, {ours: rivals.fused_criss_cross, eager: rivals.eager_criss_cross}),
        Case("channel_attention", (x,), {ours: rivals.fused_channel, eager: rivals.eager_channel}),
        Case(
            "residual_channel_attention",
            (x, gamma),
            {ours: residual_channel_attention, eager: lambda x, gamma: gamma * rivals.eager_channel(x) + x},
        ),
        Case("PositionAttention", (x,), {ours: position, eager: eager_block(position, rivals.eager_position)}),
        Case("CrissCrossAttention", (x,), {ours: cross, eager: eager_block(cross, rivals.eager_criss_cross)}),
        Case("ChannelAttention", (x,), {ours: channel, eager: lambda x: channel.gamma * rivals.eager_channel(x) + x}),
    ]


def calls(case: Case, title: str) -> dict[str, Callable[[], object]]:
    """A formulation's call in each of the modes, the first of which is to run without gradients. The parameters of
    modules have gradients too."""
    function = case.formulations[title]
    leaves = tuple(t.detach().clone().requires_grad_() for t in case.tensors)
    module = next((f for f in case.formulations.values() if isinstance(f, nn.Module)), None)
    wanted = (*leaves, *(module.parameters() if module is not None else ()))
    grad_output = torch.ones_like(function(*case.tensors))

    def forward() -> object:
        return function(*case.tensors)

    def both() -> object:
        return torch.autograd.grad(function(*leaves), wanted, grad_output)

    return dict(zip(MODES, (forward, both), strict=True))


def check(case: Case) -> None:
    """Raises :class:`command_line.Refused` if the formulations disagree."""
    results = [calls(case, title) for title in case.formulations]
    for mode in MODES:
        with torch.set_grad_enabled(mode != "forward"):
            first, *others = (result[mode]() for result in results)
        for other in others:
            try:
                torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
            except AssertionError as error:
                raise command_line.Refused(f"{case.name}: the formulations disagree: {error}") from error


def measure(
    run: dict[tuple[str, str, str], Callable[[], object]], rounds: int, batch: int
) -> dict[tuple[str, str, str], float]:
    """Median seconds of one call of each over the rounds. The keys are case, formulation and mode."""
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in run}
    gc.collect()
    gc.disable()
    try:
        for round in range(rounds + 1):
            for key, call in run.items():
                with torch.set_grad_enabled(key[2] != "forward"):
                    start = time.thread_time()
                    for _ in range(batch):
                        call()
                    end = time.thread_time()
                if round > 0:  # the first one warms up
                    seconds[key].append((end - start) / batch)
    finally:
        gc.enable()
    return {key: statistics.median(times) for key, times in seconds.items()}


def table(chosen: list[Case], timings: dict[tuple[str, str, str], float]) -> str:
    lines = ["| op | | " + " | ".join(f"{mode}, us" for mode in MODES) + " |", "|---|---|" + "---|" * len(MODES)]
    for case in chosen:
        for title in case.formulations:
            figures = " | ".join(f"{timings[case.name, title, mode] * 1e6:.1f}" for mode in MODES)
            lines.append(f"| {case.name} | {title} | {figures} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.Parser(prog=PROG, description="The host time of a call on a very small feature map.")
    parser.add_argument("--size", type=command_line.size, default=(2, 2), help="HEIGHTxWIDTH (default 2x2)")
    parser.add_argument("--channels", type=command_line.whole(), default=8, help="E = C (default 8)")
    parser.add_argument("--rounds", type=command_line.whole(), default=50, help="batches of each call (default 50)")
    parser.add_argument("--calls", type=command_line.whole(), default=200, help="calls in a batch (default 200)")
    parser.add_argument("--threads", type=command_line.whole(), default=1, help="of torch (default 1)")
    options = parser.parse_args(arguments)

    def command() -> int:
        torch.set_num_threads(options.threads)
        chosen = cases(*options.size, options.channels)
        for case in chosen:
            check(case)
        run = {
            (case.name, title, mode): call
            for case in chosen
            for title in case.formulations
            for mode, call in calls(case, title).items()
        }
        print(table(chosen, measure(run, options.rounds, options.calls)))
        return 0

    return command_line.run(PROG, command)


if __name__ == "__main__":
    sys.exit(main())
