"""Which csrc/ the extension was built from: setup.py writes it into the extension, extension.py compares where it can.

An extension that is older than the Python beside it would take pointers that mean something else to it, and crash.
"""

import hashlib
from pathlib import Path

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SUFFIXES = (".cpp", ".cu", ".h")


def digest():
    """A hash of the names and contents of all sources; None where no csrc/ lies beside: a wheel is from one build."""
    if not CSRC.is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES):
        content = path.read_bytes()
        found.update(f"{path.relative_to(CSRC).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]
