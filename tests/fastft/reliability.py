"""What `make reliability` runs, and its record: `python reliability.py [matrix] [soak]`, by default both.

    matrix   test_kills.py with FASTFT_MATRIX=full: every point, rank, layout and optimizer
    soak     soak.py: one run, killed 200 times at random instants

Writes docs/reliability.json and the table in docs/reliability.md; exit code 1 where one of them failed.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCS = ROOT / "docs"
BEGIN, END = "<!-- record: begin -->\n", "<!-- record: end -->"


def matrix(folder):
    """Runs the full matrix."""
    began, report = time.monotonic(), folder / "kills.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_kills.py")]
    environment = {**os.environ, "FASTFT_MATRIX": "full"}
    subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=environment)
    return matrix_record(report, time.monotonic() - began)


def matrix_record(report, seconds):
    """The entry of a matrix from pytest's XML report."""
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    kills = [case for case in cases if case.get("name").startswith("test_a_killed_run_is_the_run")]
    return {
        **stamp(),
        "kill cases": len(kills),
        "other checks": len(cases) - len(kills),
        "failed": failed,
        "seconds": round(seconds),
    }


def soak(folder):
    """Runs the soak."""
    out = folder / "soak"
    subprocess.run([sys.executable, str(HERE / "soak.py"), "--kills", "200", "--out", str(out)], cwd=ROOT)
    record = json.loads((out / "soak.json").read_text())
    return {**stamp(), **record}


def stamp():
    """Commit, day and processor."""
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": git.stdout.strip() or None,
        "date": datetime.date.today().isoformat(),
        "machine": f"{model[1].strip() if model else 'unknown'}, {len(os.sched_getaffinity(0))} cores",
    }


def is_good(name, record):
    """Whether a part of the record is what was promised."""
    if name == "matrix":
        return record["kill cases"] > 250 and not record["failed"]
    return record["kills"] >= 200 and record["same weights and metrics"] and not record["broken checkpoints met"]


def table(record):
    """The record as Markdown."""
    lines = ["| run | result | time | where |", "|---|---|---|---|"]
    if "matrix" in record:
        m = record["matrix"]
        passed = f"{m['kill cases']} kill cases and {m['other checks']} checks around them, {len(m['failed'])} failed"
        lines.append(f"| matrix | {passed} | {m['seconds'] // 60} min | {m['machine']}, {m['date']}, {m['commit']} |")
    if "soak" in record:
        s = record["soak"]
        same = "the same weights and metrics" if s["same weights and metrics"] else "OTHER weights or metrics"
        places = ", ".join(f"{count} {place}" for place, count in sorted(s["places"].items()))
        told = f"{s['kills']} kills ({places}) in {s['steps']:,} steps: {same}; {s['broken checkpoints met']} broken ones met"
        lines.append(f"| soak | {told} | {s['seconds'] // 60} min | {s['machine']}, {s['date']}, {s['commit']} |")
    return "\n".join(lines) + "\n"


def write(record):
    """Keeps the record and shows it in the page."""
    (DOCS / "reliability.json").write_text(json.dumps(record, indent=2) + "\n")
    page = DOCS / "reliability.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + table(record) + END + rest.partition(END)[2], encoding="utf-8")


def main(parts):
    path = DOCS / "reliability.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in parts or ("matrix", "soak"):
            record[name] = {"matrix": matrix, "soak": soak}[name](Path(folder))
            write(record)
    return 0 if all(is_good(name, record[name]) for name in parts or record) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
