"""The results of a run: JSON with every raw figure, Markdown, and tables in the terminal."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from tools.compilers import files

from . import command_line, rivals, statistics, validate, workloads

MIB = 2**20
SCHEMA = 2
NOTES = f"""\
Milliseconds are medians of interleaved rounds within one run, with their interval in brackets ({statistics.METHOD});
*forward* runs under no_grad, *forward + backward* includes the gradients of all inputs. *segattn_ops is* gives the
rival's time over that of segattn_ops, the median of the rounds' ratios with its interval, and a verdict: faster or
slower where the interval excludes 1, level where it is within {statistics.LEVEL:.0%} of 1, else unclear. GFLOP/s counts
the definition's FLOPs over forward + backward (over the forward, of a rival that has no more), the same for every
rival. *Extra memory* is the peak over forward + backward in a separate process, minus inputs, output and gradients; in
brackets the rival's over that of segattn_ops. *error* is the largest relative L2 error of output and gradients against
float64. ONNX Runtime's operators take and return tokens; the conversions from and to feature maps are not in their
time. All other rivals take and return feature maps."""


def machine(device: str, threads: int) -> dict:
    """The machine and the versions."""
    info = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _total_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "device": device,
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return info


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _total_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def commit() -> str | None:
    """The commit, with "+" if the working copy differs from it; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def sources() -> str:
    """A fingerprint of what the figures depend on: the Python sources of benchmarks and package, and the build."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in ("benchmarks", "segattn_ops"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    build_info = root / "segattn_ops" / "_build_info.json"
    digest.update(build_info.read_bytes() if build_info.exists() else b"")
    return digest.hexdigest()[:16]


def build(command: str, device: str, threads: int, records: list[dict], kind: str = "ops", **extra) -> dict:
    """The content of report.json."""
    import segattn_ops

    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "sources": sources(),
        "segattn_ops": segattn_ops.build_config(),
        "machine": machine(device, threads),
        **extra,
        "cells": records,
    }


def write_json(report: dict, path: Path) -> None:
    """Writes the file whole or not at all: an interrupt or a full disk leaves the earlier one."""
    files.write_text(path, json.dumps(report, indent=1, default=str) + "\n")


def groups(records: list[dict]) -> dict[tuple, list[dict]]:
    """Records by (op, dtype, batch), in order."""
    found: dict[tuple, list[dict]] = {}
    for entry in records:
        found.setdefault((entry["op"], entry["dtype"], entry["batch"]), []).append(entry)
    return found


def size_of(entry: dict) -> str:
    return f"{entry['height']}x{entry['width']}"


def title(op: str, dtype: str, batch: int) -> str:
    return f"{workloads.TITLES[op]}, {dtype}" + (f", batch {batch}" if batch > 1 else "")


COLUMNS = (
    *("size", "N", "", "forward ms", "segattn_ops is", "forward + backward ms", "segattn_ops is"),
    *("GFLOP/s", "extra memory MiB", "error"),
)
PASSES = ("forward", "forward_backward")


def rows(records: list[dict]) -> list[list[str]]:
    """Table rows of one group, one per cell; see :data:`COLUMNS`. A cell that did not run has its status instead."""
    fused = {size_of(e): e for e in records if e["rival"] == "fused" and e["status"] == "measured"}
    table = []
    for entry in records:
        size = size_of(entry)
        row = [size, str(entry["positions"]), rivals.TITLES[entry["rival"]]]
        if entry["status"] != "measured":
            table.append([*row, entry["status"], *[""] * 6])
            continue
        ours = fused.get(size) if entry["rival"] != "fused" else None
        for kind in PASSES:
            row += [_time(entry.get(kind)), verdict(entry["ratio"].get(kind))]
        longest = PASSES["forward_backward" in entry]
        row.append(f"{entry['flop'][longest] / entry[longest]['median'] / 1e9:.0f}")
        row.append(_memory(entry, ours))
        row.append(f"{validate.worst(entry['errors']):.0e}")
        table.append(row)
    return table


def _time(found: dict | None) -> str:
    if found is None:
        return "-"
    text = _milliseconds(found["median"])
    if found["low"] is None:
        return text
    return f"{text} ({_milliseconds(found['low'])}-{_milliseconds(found['high'])})"


def verdict(ratio: dict | None) -> str:
    """Such as ``3.86 (3.80-3.92), faster``: the rival's time over that of segattn_ops."""
    if ratio is None:
        return ""
    if ratio["low"] is None:
        return f"{_factor(ratio['median'])}, unclear: one pass"
    ends = f"{_factor(ratio['low'])}-{_factor(ratio['high'])}"
    return f"{_factor(ratio['median'])} ({ends}), {ratio['verdict']}"


def _memory(entry: dict, ours: dict | None) -> str:
    if not entry["memory"]:
        return "not measured"
    kind = PASSES["forward_backward" in entry]
    theirs = entry["memory"][kind]
    mine = ours["memory"][kind] if ours and ours["memory"] else 0
    factor = f" ({_factor(theirs / mine)}x)" if mine >= MIB else ""
    return f"{theirs / MIB:.1f}{factor}" + (", forward" if kind == "forward" else "")


def remarks(records: list[dict]) -> list[str]:
    """A line for every cell that did not run, with the reason, and for every figure with a note."""
    lines = []
    reasons: dict[tuple[str, str], list[str]] = {}
    notes: dict[tuple[str, str], list[str]] = {}
    for entry in records:
        name = rivals.TITLES[entry["rival"]]
        if entry["status"] != "measured":
            reasons.setdefault((name, entry["reason"] or entry["status"]), []).append(size_of(entry))
        if entry.get("note"):
            notes.setdefault((name, entry["note"]), []).append(size_of(entry))
        for kind, found in entry.get("drift", {}).items():
            if found and found["noted"]:
                ends = f"{found['change']:+.0%} ({found['low']:+.0%} to {found['high']:+.0%})"
                which = kind.replace("_", " + ")
                lines.append(f"{size_of(entry)} {name}: {which} drifted by {ends} from the first round to the last")
    refused = [f"{', '.join(sizes)} {name}: not run, {reason}" for (name, reason), sizes in reasons.items()]
    lines = [*refused, *(f"{', '.join(sizes)} {name}: {note}" for (name, note), sizes in notes.items()), *lines]
    once = dict.fromkeys(size_of(e) for e in records if e["status"] == "measured" and e.get("rounds") == 0)
    if once:
        lines.append(f"{', '.join(once)}: one pass each, not repeated")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def _factor(value: float) -> str:
    return f"{value:.0f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def _others(records: list[dict]) -> list[str]:
    """The rivals with a column in the summary: those of plain PyTorch."""
    return [name for name in ("eager", "sdpa") if any(e["rival"] == name for e in records)]


def summary_columns(records: list[dict]) -> list[str]:
    ratios = [*(f"x {rivals.TITLES[name]}" for name in _others(records)), "x fastest rival"]
    return ["op", "size", "forward ms", *ratios, "forward + backward ms", *ratios, "extra memory MiB", "x eager"]


def summary_size(entries: list[dict]) -> str | None:
    """Of one group: the largest of the sizes at which this package and most rivals of :func:`_others` ran, repeatedly
    if that is so anywhere; None without this package."""
    ran: dict[str, set[str]] = {}
    for entry in entries:
        if entry["status"] == "measured":
            ran.setdefault(size_of(entry), set()).add(entry["rival"])
    plain = set(_others(entries))
    positions = {size_of(entry): entry["positions"] for entry in entries}
    repeated = {size_of(entry) for entry in entries if entry.get("rounds")}
    return max(
        (size for size, names in ran.items() if "fused" in names),
        key=lambda size: (len(ran[size] & plain), size in repeated, positions[size]),
        default=None,
    )


def summary(records: list[dict]) -> list[list[str]]:
    """One line per op and dtype, at :func:`summary_size`. A ratio whose interval does not exclude 1 has a question
    mark, or "=" where it is level."""
    lines = []
    for (op, dtype, batch), entries in groups(records).items():
        size = summary_size(entries)
        if size is None:
            continue
        others = {e["rival"]: e for e in entries if e["status"] == "measured" and size_of(e) == size}
        ours = others.pop("fused")
        several = len({entry["dtype"] for entry in records}) > 1
        line = [op + (f" {dtype}" if several else "") + (f" B={batch}" if batch > 1 else ""), size]
        for kind in PASSES:
            ratios = {name: entry["ratio"][kind] for name, entry in others.items() if kind in entry["ratio"]}
            line.append(_milliseconds(ours[kind]["median"]))
            line += [_short(ratios[name]) if name in ratios else "-" for name in _others(records)]
            fastest = min(ratios, key=lambda name, of=ratios: of[name]["median"], default=None)
            line.append(f"{_short(ratios[fastest])} ({rivals.TITLES[fastest]})" if fastest else "-")
        memory, theirs = ours["memory"], others.get("eager", {}).get("memory")
        line.append(f"{memory['forward_backward'] / MIB:.1f}" if memory else "-")
        usable = memory and theirs and memory["forward_backward"] >= MIB
        line.append(_factor(theirs["forward_backward"] / memory["forward_backward"]) if usable else "-")
        lines.append(line)
    return lines


def _short(ratio: dict) -> str:
    return _factor(ratio["median"]) + {"level": "=", "unclear": "?"}.get(ratio["verdict"], "")


def markdown_table(columns: list[str] | tuple[str, ...], table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table])


def where(report: dict) -> str:
    """The machine in one line."""
    facts = report["machine"]
    threads = f"{facts['threads']} thread" + ("s" if facts["threads"] != 1 else "")
    if facts.get("cpus"):
        threads += f" on processor{'s' * (len(facts['cpus']) > 1)} {', '.join(map(str, facts['cpus']))}"
    place = f"{facts['processor']}, {threads}, {facts['memory_bytes'] / 2**30:.0f} GiB"
    if "gpu" in facts:
        place = f"{facts['gpu']}, CUDA {facts['cuda']}"
    return f"{place}; torch {facts['torch']}, Python {facts['python']}"


def markdown(report: dict) -> str:
    """The report as Markdown, with pictures by file name."""
    records = report["cells"]
    parts = [
        "# segattn_ops against the alternatives",
        f"`{report['command']}`, {report['date']}, commit {report['commit'] or 'unknown'}, {where(report)}.",
    ]
    if report.get("features"):
        parts.append(f"Features: {report['features']}.")
    parts += [NOTES, "## In short", markdown_table(summary_columns(records), summary(records))]
    parts += [f"![{Path(name).stem}]({name})" for name in report.get("pictures", [])]
    for key, entries in groups(records).items():
        parts += [f"## {title(*key)}", markdown_table(COLUMNS, rows(entries))]
        op, dtype, batch = key
        again = command_line.reproduce(report["command"], ops=op, dtypes=dtype, batch=str(batch))
        parts.append(f"`{again}`")
        if remarks(entries):
            parts.append("\n".join(f"- {line}" for line in remarks(entries)))
    return "\n\n".join(parts) + "\n"


def print_tables(report: dict, console) -> None:
    """Prints a table per op and dtype, then the summary."""
    from rich import box
    from rich.table import Table

    records = report["cells"]
    style = {"title_justify": "left", "title_style": "bold", "header_style": "bold", "box": box.SIMPLE_HEAD}
    for key, entries in groups(records).items():
        table = Table(title=title(*key), pad_edge=False, **style)
        for index, column in enumerate(COLUMNS):
            table.add_column(
                column.replace(" ms", "\nms").replace(" MiB", "\nMiB").replace("forward + backward", "fwd + bwd"),
                justify="left" if index in (0, 2) else "right",
            )
        last = None
        for row in rows([entry for entry in entries if entry["status"] == "measured"]):
            if last is not None and last != row[0]:
                table.add_section()
            shown = ["", "", *row[2:]] if row[0] == last else row
            last = row[0]
            shown = [re.sub(r" \([^)]*-[^)]*\)", "", text) for text in shown]  # intervals are in report.md
            table.add_row(*shown, style="bold green" if row[2] == rivals.TITLES["fused"] else None)
        console.print(table)
        for line in remarks(entries):
            console.print(f"  {line}", style="dim", highlight=False)
        console.print()
    table = Table(title="In short: times of segattn_ops, and the rivals' over them", pad_edge=False, **style)
    for index, column in enumerate(summary_columns(records)):
        header = (
            column.replace("forward + backward", "fwd+bwd").replace("forward", "fwd").replace("extra memory", "extra")
        )
        table.add_column(header.replace(" ", "\n"), justify="left" if index < 2 else "right", no_wrap=True)
    for line in summary(records):
        table.add_row(*line)
    console.print(table)
