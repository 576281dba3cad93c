"""A result as Markdown: `python -m benchmarks.report [result.json]` puts the newest into benchmarks/README.md."""

import argparse
import json
import statistics
from pathlib import Path

from benchmarks._harness import RESULTS, ROOT, machine_line, speedup

README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def render(result):
    """Markdown of one result: each job's table, then where and how it was measured."""
    parts = [_sentiment(job, result["machine"]) for job in result["jobs"].values()]
    load = result["machine"]["load"]
    busy = "" if load is None else f", when the load average was {load:.1f}"
    parts.append(f"`{result['command']}` on {result['date'][:10]}{busy}.\n{machine_line(result['machine'])}.")
    return "\n\n".join(parts)


def _sentiment(job, machine):
    sides, ours = job["sides"], job["sides"]["fastft"]
    absolute = machine["gpu"] is not None  # on a CPU only ratios carry over to the reader's machine
    rows = [
        f"{job['job']['name']}: {job['job']['batch_size']} sentences ({job['tokens']:.0f} tokens) a step, "
        f"{len(ours['wall'])} rounds. Speed-up: the loop's time over fastft's on the same sentences; median and 95 % "
        "interval.",
        "",
        "| loop | weights | positions computed | speed-up of fastft | by CPU time | mean loss |"
        + (" ms per step | sentences/s |" if absolute else ""),
        "|---|---|---|---|---|---|" + ("---|---|" if absolute else ""),
    ]
    for name, side in sides.items():
        cells = [name, side["dtype"], f"{side['positions']:.0f}"]
        cells += ["1", "1"] if side is ours else [_interval(side, ours, "wall"), _interval(side, ours, "cpu")]
        cells.append(f"{statistics.mean(side['values']):.4f}")
        if absolute:
            seconds = statistics.median(side["wall"])
            cells += [f"{1e3 * seconds:.1f}", f"{job['job']['batch_size'] / seconds:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    fastest = min(job["careful_dtypes"].values())
    tried = ", ".join(f"{name} {seconds / fastest:.1f}" for name, seconds in job["careful_dtypes"].items())
    loss = job["check"]["fastft"]["loss"]
    rows += [
        "",
        f"The careful loop runs in the faster of its dtypes (time of a step, relative: {tried}). Before timing, with dropout "
        f"off, in fp32, all loops gave the loss {loss:.6f} and the same gradient norm, to 1e-4.",
    ]
    return "\n".join(rows)


def _interval(theirs, ours, clock):
    ratio, low, high = speedup(theirs[clock], ours[clock])
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def update(readme, result):
    """Replaces what stands between the two marks in a Markdown file."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{readme}: needs the lines {BEGIN} and {END}, between which the results go")
    readme.write_text(f"{before}{BEGIN}\n{render(result)}\n{END}{after}", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="result file (default: the newest in benchmarks/results)")
    parser.add_argument("--readme", type=Path, default=README, help="file to update (default: benchmarks/README.md)")
    args = parser.parse_args(argv)
    results = [args.result] if args.result else RESULTS.glob("*.json")
    read = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    if not read:
        parser.exit(
            2,
            f"{parser.prog}: no result in {RESULTS}; pytest benchmarks/ --benchmark-only --results {RESULTS} makes one\n",
        )
    update(args.readme, max(read, key=lambda result: result["date"]))


if __name__ == "__main__":
    main()
