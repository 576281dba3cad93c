"""A result made readable: `python -m benchmarks.report [result.json]`.

The newest result goes as Markdown into benchmarks/README.md, and as report.html with its plots as PNG files into
benchmarks/results/<machine>-<date>/.
"""

import argparse
import html
import json
import statistics
from pathlib import Path

from benchmarks._harness import RESULTS, ROOT, machine_line, speedup

README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def render(result):
    """Markdown of one result: each job's table, the ops, then where and how it was measured."""
    parts = []
    for kind, job in result["jobs"].items():
        parts.append({"sentiment": _sentiment, "lora": _lora}[kind](job, result["machine"]))
    parts += [_ablation(name, runs) for name, runs in result.get("ablations", {}).items()]
    if result.get("scaling"):
        parts.append(_scaling(result["scaling"]))
    if result.get("ops"):
        parts.append(_ops(result["ops"]))
    load = result["machine"]["load"]
    busy = "" if load is None else f", when the load average was {load:.1f}"
    parts.append(f"`{result['command']}` on {result['date'][:10]}{busy}.\n{machine_line(result['machine'])}.")
    if result.get("ceilings"):
        parts[-1] += f"\n{_ceilings(result['ceilings'])}"
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


def _lora(job, machine):
    sides, ours = job["sides"], job["sides"]["fastft"]
    absolute = machine["gpu"] is not None
    rows = [
        f"{job['job']['name']}: {job['job']['batch_size']} x {job['job']['length']} tokens a step in {job['dtype']}, "
        f"{len(ours['wall'])} rounds. Memory: the most that a step held above what it held before.",
        "",
        "| loop | speed-up of fastft | by CPU time | memory over fastft's | mean loss |"
        + (" tokens/s | peak MB |" if absolute else ""),
        "|---|---|---|---|---|" + ("---|---|" if absolute else ""),
    ]
    for name, side in sides.items():
        cells = [name]
        cells += ["1", "1"] if side is ours else [_interval(side, ours, "wall"), _interval(side, ours, "cpu")]
        cells.append(f"{side['peak_bytes'] / ours['peak_bytes']:.2f}" if side["peak_bytes"] else "")
        cells.append(f"{statistics.mean(side['values']):.4f}")
        if absolute:
            cells += [f"{job['tokens'] / statistics.median(side['wall']):.0f}", f"{side['peak_bytes'] / 1e6:.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    loss = job["check"]["fastft"]["loss"]
    rows += ["", f"Before timing, in fp32, both loops gave the loss {loss:.6f} and the same gradient norm, to 1e-4."]
    return "\n".join(rows)


def _ablation(name, runs):
    first = runs["careful"]
    rows = [
        f"What each part brings: {name}. Each stage on top of the one before; speed-up over the careful loop, over the "
        "stage before, and the most memory that a step held above what it held before, over the careful loop's.",
        "",
        "| stage | over careful | over the stage before | memory |",
        "|---|---|---|---|",
        "| careful | 1 | | 1 |",
    ]
    stages = list(runs.items())
    for (_, before), (stage, run) in zip(stages, stages[1:], strict=False):
        memory = f"{run['peak_bytes'] / first['peak_bytes']:.2f}" if first["peak_bytes"] else ""
        rows.append(f"| {stage} | {_interval(first, run, 'wall')} | {_interval(before, run, 'wall')} | {memory} |")
    return "\n".join(rows)


def _scaling(curves):
    """One row for each point: speed and memory relative to the careful loop, tokens per second to the curve's first point."""
    rows = [
        "Scaling of the LoRA job (2 x 256 tokens, 4 layers, but for the size that changes): speed-up over the careful loop, "
        "memory of a step over the careful loop's, and fastft's tokens per second over those at the first point.",
        "",
        "| size | value | speed-up | memory | tokens/s |",
        "|---|---|---|---|---|",
    ]
    for size, points in curves.items():
        rates = [_rate(point) for point in points]
        for point, rate in zip(points, rates, strict=True):
            cells = ["", ""]
            if "careful" in point.get("sides", {}):
                theirs, ours = point["sides"]["careful"], point["sides"]["fastft"]
                memory = f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}" if theirs["peak_bytes"] else ""
                cells = [_interval(theirs, ours, "wall"), memory]
            elif "sides" in point:
                cells = ["the careful loop has no room", ""]
            rows.append(f"| {size} | {point['value']} | {' | '.join(cells)} | {rate / rates[0]:.2f} |")
    return "\n".join(rows)


def _rate(point):
    """fastft's tokens per second at a point of a curve."""
    if "tokens_per_second" in point:
        return statistics.median(point["tokens_per_second"])
    return point["tokens"] / statistics.median(point["sides"]["fastft"]["wall"])


def _ops(groups):
    rivals = sorted({side for sides in groups.values() for side in sides} - {"fastft"})
    rows = [
        "Single ops: the rival's time over fastft's. A `copy` moves as many bytes as the forward pass must and computes "
        "nothing, so its ratio, at most 1, is the share of the floor.",
        "",
        f"| op | {' | '.join(rivals)} |",
        f"|---|{'---|' * len(rivals)}",
    ]
    for group, sides in groups.items():
        cells = [_interval(sides[rival], sides["fastft"], "wall") if rival in sides else "" for rival in rivals]
        rows.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _ceilings(found):
    rates = ", ".join(
        f"{name.removesuffix('_flop_per_s')} products {rate / 1e12:.2f} TFLOP/s"
        for name, rate in found.items()
        if name.endswith("_flop_per_s")
    )
    return f"Ceilings measured in the same run: copy {found['copy_bytes_per_s'] / 1e9:.1f} GB/s, {rates}."


def _interval(theirs, ours, clock):
    ratio, low, high = speedup(theirs[clock], ours[clock])
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def plot(result, folder):
    """PNG plots: bars of every ratio with its interval, for jobs and ops; the stages of the ablations; the scaling curves.

    Returns [(title, path)].
    """
    charts = []
    jobs = {job["job"]["name"]: job["sides"] for job in result["jobs"].values()}
    for title, name, groups in (
        ("A step of training: how many times as long the rival takes", "jobs.png", jobs),
        ("Single ops: how many times as long the rival takes", "ops.png", result.get("ops", {})),
    ):
        if groups:
            charts.append((title, _bars(title, groups, folder / name)))
    if result.get("ablations"):
        title = "What each part brings: a step's time over the careful loop's"
        charts.insert(1, (title, _stairs(title, result["ablations"], folder / "ablation.png")))
    if result.get("scaling"):
        title = "Scaling: tokens per second, relative to the careful loop at the first point"
        charts.insert(2, (title, _curves(title, result["scaling"], folder / "scaling.png")))
    return charts


def _stairs(title, ablations, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.8 + 2.6 * len(ablations)), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(len(ablations), squeeze=False)[:, 0], ablations.items(), strict=True):
        first = runs["careful"]
        times = [1 / speedup(first["wall"], run["wall"])[0] for run in runs.values()]
        axes.barh(range(len(runs)), times, color=["#888888"] + ["#2a7f62"] * (len(runs) - 1), label="time")
        if first["peak_bytes"]:
            memory = [run["peak_bytes"] / first["peak_bytes"] for run in runs.values()]
            axes.plot(memory, range(len(runs)), "D", color="#c08a2b", label="memory")
        axes.set_yticks(range(len(runs)), list(runs), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9)
        axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def _curves(title, curves, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 * ((len(curves) + 2) // 3)), layout="constrained")
    grid = figure.subplots((len(curves) + 2) // 3, 3, squeeze=False).flatten()
    for axes, (size, points) in zip(grid, curves.items(), strict=False):
        values = [point["value"] for point in points]
        if "sides" in points[0]:
            base = points[0]["tokens"] / statistics.median(points[0]["sides"]["careful"]["wall"])
            for side, colour in (("careful", "#888888"), ("fastft", "#2a7f62")):
                known = [point for point in points if side in point["sides"]]
                rates = [p["tokens"] / statistics.median(p["sides"][side]["wall"]) / base for p in known]
                axes.plot([p["value"] for p in known], rates, "o-", color=colour, label=side)
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=8)
        else:
            rates = [_rate(point) for point in points]
            axes.bar([str(value) for value in values], [rate / rates[0] for rate in rates], color="#2a7f62")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(size, fontsize=9)
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def _bars(title, groups, path):
    from matplotlib.figure import Figure

    rows = [
        (f"{group}: {side}", *speedup(runs["wall"], sides["fastft"]["wall"]))
        for group, sides in groups.items()
        for side, runs in sides.items()
        if side != "fastft"
    ]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (name, ratio, low, high) in enumerate(rows):
        colour = "#2a7f62" if low > 1 else "#b3423a" if high < 1 else "#888888"
        colour = "#9fb8d0" if name.endswith(": copy") else colour  # no rival: the floor
        axes.barh(y, ratio, color=colour, xerr=[[ratio - low], [high - ratio]], error_kw={"ecolor": "#333333"})
        axes.text(high, y, f"  {ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "the rival's time over fastft's; right of 1 fastft is faster\nlines are 95 % intervals; pale blue is the floor"
    )
    axes.set_title(title, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def page(result, charts):
    """One HTML page of a result; the plots lie beside it."""
    figures = "".join(f'<img src="{path.name}" alt="{html.escape(title)}">' for title, path in charts)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>fastft: benchmarks of {result["date"][:10]}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} img {{ max-width: 100%; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left }} th {{ border-color: #888 }}
code {{ background: #f4f4f4; padding: .1rem .3rem }}
</style>
<h1>fastft against its rivals</h1>
<p>Rival and fastft take turns in one process on the same inputs, and their answers are compared before anything is timed.
A ratio above 1 means that fastft is faster; in brackets is its 95 % interval. Ratios below 1 stay in.</p>
{figures}
{_as_html(render(result))}
</html>
"""


def _as_html(markdown):
    """The little Markdown that `render` writes: paragraphs, tables, `code`."""
    blocks = []
    for block in markdown.split("\n\n"):
        lines = block.split("\n")
        if not lines[0].startswith("|"):
            blocks.append(f"<p>{_inline(block)}</p>")
            continue
        header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in cells) + "</tr>"
        blocks.append(f"<table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in body)}</table>")
    return "\n".join(blocks)


def _inline(text):
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


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
    parser.add_argument(
        "--html", type=Path, metavar="FOLDER", help="where report.html goes (default: beside the result)"
    )
    args = parser.parse_args(argv)
    paths = [args.result] if args.result else list(RESULTS.glob("*.json"))
    if not paths:
        parser.exit(
            2,
            f"{parser.prog}: no result in {RESULTS}; pytest benchmarks/ --benchmark-only --results {RESULTS} makes one\n",
        )
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    path, result = max(read.items(), key=lambda item: item[1]["date"])
    update(args.readme, result)
    folder = args.html or path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(result, plot(result, folder)), encoding="utf-8")
    print(f"{args.readme} and {folder / 'report.html'} show {path.name}")


if __name__ == "__main__":
    main()
