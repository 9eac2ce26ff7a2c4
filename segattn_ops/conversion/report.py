"""The report of a conversion."""

from dataclasses import dataclass, field

from torch import nn

from .suspects import LOOKED_FOR


@dataclass(frozen=True)
class Entry:
    """One block of the model.

    Attributes:
        name: its name in the model ("" for the model itself).
        class_name: of the original.
        action: "converted" ("would convert" in a dry run), "already" or "left".
        kind: of the replacement, for a converted block.
        detail: how it was verified, or why it was left alone.
    """

    name: str
    class_name: str
    action: str
    kind: str = ""
    detail: str = ""


@dataclass(repr=False)
class ConversionReport:
    """Result of :func:`segattn_ops.convert`.

    Attributes:
        model: the model given; its blocks are converted in place.
        entries: one for every attention block that was found, in the model's order.
        difference: largest difference between the model's outputs before and after, relative to the largest output;
            None if no sample input was given, or nothing was converted.
        dry_run: whether nothing was changed.
        notes: on that comparison.
    """

    model: nn.Module
    entries: list[Entry] = field(default_factory=list)
    difference: float | None = None
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[str]:
        """Names of the blocks that were (or in a dry run would be) converted."""
        return [e.name for e in self.entries if e.action in ("converted", "would convert")]

    @property
    def left(self) -> dict[str, str]:
        """Names of the blocks that were left alone, and why."""
        return {e.name: e.detail for e in self.entries if e.action == "left"}

    @property
    def already(self) -> list[str]:
        """Names of the blocks that run on the fused ops already."""
        return [e.name for e in self.entries if e.action == "already"]

    def __repr__(self) -> str:
        """One line; ``print`` shows the whole report."""
        verb = "would convert" if self.dry_run else "converted"
        counts = [f"{len(self.converted)} {verb}", f"{len(self.left)} left", f"{len(self.already)} already"]
        if self.difference is not None:
            counts.append(f"outputs differ by {self.difference:.1e}")
        return f"<ConversionReport: {', '.join(counts)}>"

    def __str__(self) -> str:
        lines = []
        for e in self.entries:
            kind = f" -> {e.kind}" if e.kind else ""
            detail = f" ({e.detail})" if e.detail else ""
            lines.append(f"{e.action:>13}  {e.name or 'the model itself'}: {e.class_name}{kind}{detail}")
        if self.difference is not None:
            lines.append(f"outputs on the sample input differ by {self.difference:.1e} of the largest")
        lines += self.notes
        if not self.entries:
            lines.append(f"no attention block was found; {LOOKED_FOR}")
        return "\n".join(lines)
