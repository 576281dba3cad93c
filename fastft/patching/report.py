"""What `fastft.patch` did."""

from dataclasses import asdict, dataclass


@dataclass
class PatchReport:
    """Printed, it is a few readable lines."""

    model: str
    """class of the model"""
    replaced: dict[str, int]
    """role -> how many layers of the model"""
    kept: dict[str, str]
    """role -> why its layers stay as they are"""
    packing: str | None
    """None: the model takes packed rows; else why not"""

    def as_dict(self):
        """For JSON."""
        return asdict(self)

    def __str__(self):
        replaced = ", ".join(f"{role} ({count})" for role, count in self.replaced.items())
        lines = [f"fastft patched {self.model}: {replaced or 'nothing'}"]
        lines += [f"  kept {role}: {reason}" for role, reason in self.kept.items()]
        lines.append("  packed rows: yes" if self.packing is None else f"  packed rows: no, {self.packing}")
        return "\n".join(lines)
