"""What `fastft.patch` did."""

from dataclasses import asdict, dataclass, field


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
    lora_kept: dict[str, str] = field(default_factory=dict)
    """name of a layer with a LoRA adapter -> why it computes as PEFT does"""

    def as_dict(self):
        """For JSON."""
        return asdict(self)

    def __str__(self):
        replaced = ", ".join(f"{role} ({count})" for role, count in self.replaced.items())
        lines = [f"fastft patched {self.model}: {replaced or 'nothing'}"]
        for reason in dict.fromkeys(self.kept.values()):
            lines.append(f"  kept {', '.join(role for role, its in self.kept.items() if its == reason)}: {reason}")
        for reason in dict.fromkeys(self.lora_kept.values()):
            names = [name for name, its in self.lora_kept.items() if its == reason]
            lines.append(f"  kept lora in {len(names)} layers ({names[0]}{' ...' * (len(names) > 1)}): {reason}")
        lines.append("  packed rows: yes" if self.packing is None else f"  packed rows: no, {self.packing}")
        return "\n".join(lines)
