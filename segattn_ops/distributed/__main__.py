"""`python -m segattn_ops.distributed plan`: what attention of a sharded feature map costs, before one runs it."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from .plan import DEVICES, DTYPES, LINKS, OPS, Estimate, Plan, plan

PROG = "python -m segattn_ops.distributed"
ROWS = 8  # layouts of an op in the table
NAMES = {"position": "position", "criss_cross": "criss-cross", "channel": "channel"}
GIB = 2**30


class _Parser(argparse.ArgumentParser):
    """Errors are one line; the usage is what --help prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _mesh(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ROWS or ROWSxCOLUMNS, such as 4x2 (got {text!r})") from None


def _link(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, required=True, help="of the feature map")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--channels", type=int, required=True, help="C, of the values")
    parser.add_argument("--key-channels", type=int, help="E, of query and key (default C / 8)")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1, help="samples of each rank (default 1)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default float32)")
    parser.add_argument("--device", default="h100", help=f"{', '.join(DEVICES)}; cpu is a core (default h100)")
    parser.add_argument("--op", default="all", help=f"{', '.join(OPS)} or all (default)")
    parser.add_argument("--mesh", type=_mesh, help="one mesh alone, as 8 or 4x2 (default: all of so many ranks)")
    parser.add_argument(
        "--link",
        type=_link,
        help=f"GB/s in one direction, or {', '.join(LINKS)} (default: gloo for cpu, NVLink up to 8 ranks, "
        "infiniband400 beyond)",
    )
    parser.add_argument("--flops", type=float, help="TFLOP/s (default: the peak of the device for the dtype)")
    parser.add_argument("--memory", type=float, help="GiB of a rank (default: that of the device; cpu: no limit)")
    parser.add_argument("--json", action="store_true", help="all figures, in bytes and seconds")


def page(found: Plan) -> str:
    """The plan for a person: what to take first, then a table of the layouts."""
    on = found.machine
    limit = "no limit of memory" if on.memory is None else f"{_number(on.memory / GIB)} GiB"
    size = f"{found.height} x {found.width}, C = {found.channels}, E = {found.key_channels}"
    lines = [
        f"{size}, batch {found.batch}, {found.dtype}, on {found.ranks} rank{'s' * (found.ranks > 1)}",
        f"{on.device}: {on.flops[found.dtype] / 1e12:g} TFLOP/s, {limit}, {on.link / 1e9:g} GB/s ({on.link_name})",
        "",
        "Take",
    ]
    for op in found.ops:
        best = found.best(op)
        method = f', method="{best.method}"' if best.method else ""
        lines.append(f"  {NAMES[op]:<11} mesh {_shape(best)}{method}: {found.reason(op)}")
    lines += ["", *_table(found), "", "Memory of a rank at its peak, GiB", *_memory(found), ""]
    lines += [
        "Each figure is of the rank that has most of it. Sent forward: also the description of the call.",
        "saved: for the backward pass, besides operands and results. gradient: of the output.",
        "messages: buffers of what is sent and received. work: what is being computed.",
    ]
    return "\n".join(lines)


def _table(found: Plan) -> list[str]:
    groups = f"{'':<18} {'memory':>9} {'sent, GB':^19} {'FLOP':>9} {'time at least, ms':^19}"
    columns = ("GiB", "forward", "backward", "1e12", "forward", "backward")
    lines = [groups.rstrip(), f"{'op':<11} {'method':<6} " + " ".join(f"{name:>9}" for name in columns) + "  mesh"]
    for op in found.ops:
        rows = _rows([e for e in found.estimates if e.op == op])
        lines += [_line(estimate, names) for estimate, names in rows[:ROWS]]
        if len(rows) > ROWS:
            lines.append(f"{'':<11} and {len(rows) - ROWS} more (--json has all)")
    return lines


def _memory(found: Plan) -> list[str]:
    columns = ("operands", "results", "saved", "gradient", "messages", "work")
    lines = [f"{'op':<11} {'method':<6} " + " ".join(f"{name:>9}" for name in columns) + "  in"]
    for op in found.ops:
        best = found.best(op)
        memory = best.memory
        if memory.forward > memory.backward:
            parts = [memory.operands, 0, 0, 0, memory.forward_messages, memory.forward_work]
        else:
            parts = [memory.operands, memory.results, memory.saved, memory.grad_output]
            parts += [memory.backward_messages, memory.backward_work]
        figures = " ".join(f"{_number(size / GIB):>9}" for size in parts)
        of_pass = "forward" if memory.forward > memory.backward else "backward"
        lines.append(f"{NAMES[op]:<11} {best.method:<6} {figures}  {of_pass}")
    return lines


def _rows(estimates: Sequence[Estimate]) -> list[tuple[Estimate, list[str]]]:
    """One for all meshes of the same costs, with their names."""
    rows: dict[tuple[object, ...], tuple[Estimate, list[str]]] = {}
    for estimate in estimates:
        rows.setdefault(estimate.costs(), (estimate, []))[1].append(_shape(estimate))
    return list(rows.values())


def _line(estimate: Estimate, meshes: Sequence[str]) -> str:
    sent, seconds = estimate.sent, estimate.seconds
    figures = [
        estimate.memory.peak / GIB,
        (sent.agreement + sent.forward) / 1e9,
        sent.backward / 1e9,
        estimate.flop.total / 1e12,
        seconds.forward * 1e3,
        seconds.backward * 1e3,
    ]
    names = " ".join(meshes[:3]) + (f" and {len(meshes) - 3} more" if len(meshes) > 3 else "")
    fits = "" if estimate.fits else ", does not fit"
    auto = ", auto" if estimate.is_auto else ""
    numbers = " ".join(f"{_number(figure):>9}" for figure in figures)
    return f"{NAMES[estimate.op]:<11} {estimate.method:<6} {numbers}  {names}{auto}{fits}"


def _shape(estimate: Estimate) -> str:
    return "x".join(map(str, estimate.mesh))


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.0001 or value == 0 else f"{value:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2, with a line on stderr, for wrong arguments."""
    parser = _Parser(prog=PROG, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    description = (
        "Memory of a rank, bytes that it sends, FLOP and time of the ops of segattn_ops.distributed, for each mesh and "
        "method. Time is a lower bound, from peak rates."
    )
    _add_options(commands.add_parser("plan", help="the costs of each layout", description=description))
    options = vars(parser.parse_args(argv))
    del options["command"]
    as_json = options.pop("json")
    try:
        found = plan(**options)
    except (TypeError, ValueError) as error:
        print(f"{PROG} {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.as_dict(), indent=1) if as_json else page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
