"""The plots of a report, PNG files: bars of ratios, stages of an ablation, scaling curves, shares of a floor, a roofline."""

import statistics

from matplotlib.figure import Figure

from benchmarks._harness import speedup

OURS, THEIRS, WORSE, FLOOR, KIN = "#2a7f62", "#888888", "#b3423a", "#9fb8d0", "#a9cfc0"
FLOORS = ("copy", "copy in memory", "frozen", "products")
"""sides that are no rivals"""


def bars(groups, path):
    """Ratios with their intervals. groups: {name: {side: runs}}."""
    rows = [
        (group, side, *speedup(runs["wall"], sides["fastft"]["wall"]))
        for group, sides in groups.items()
        for side, runs in sides.items()
        if side not in ("fastft", *FLOORS)
    ]
    figure, axes = _figure(len(rows))
    for y, (_, side, ratio, low, high) in enumerate(rows):
        colour = OURS if low > 1 else WORSE if high < 1 else THEIRS
        colour = KIN if side.startswith("fastft") else colour  # another way that fastft has
        axes.barh(y, ratio, color=colour, xerr=[[ratio - low], [high - ratio]], error_kw={"ecolor": "#333333"})
        axes.text(high, y, f"  {ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.1)  # for the numbers
    _rows(axes, [f"{group}: {side}" if group else side for group, side, *_ in rows])
    axes.set_xlabel("the rival's time over fastft's", fontsize=9)
    figure.savefig(path, dpi=110)


def shares(found, path):
    """The floor's time over fastft's. found: {name: share}."""
    figure, axes = _figure(len(found))
    for y, share in enumerate(found.values()):
        axes.barh(y, share, color=FLOOR)
        axes.text(share, y, f"  {share:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    _rows(axes, list(found))
    axes.set_xlabel("the floor's time over fastft's: 1 is the limit of this machine", fontsize=9)
    figure.savefig(path, dpi=110)


def roofline(points, path):
    """Share of the matrix rate over FLOPs per byte, under the roofs. points: {name: (FLOPs per byte, _, share, ridge)}."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [point[0] for point in points.values()]
    low, high = min(intensities) / 2, 2 * max(*intensities, *(point[3] for point in points.values()))
    for ridge in sorted({point[3] for point in points.values()}):
        axes.plot([low, ridge, high], [low / ridge, 1, 1], color="black", linewidth=0.8)
    kinds = list(dict.fromkeys(name.split(" ")[0] for name in points))
    for number, kind in enumerate(kinds):
        members = [point for name, point in points.items() if name.split(" ")[0] == kind]
        style = {"marker": "osD^vP*X"[number // 10 % 8], "color": f"C{number % 10}"}
        axes.scatter([m[0] for m in members], [m[2] for m in members], label=kind, s=22, **style)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="share of the rate of a large matrix product")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)


def stairs(stages, path):
    """Time and memory of each stage over those of the first. stages: {name: runs with peak_bytes}."""
    figure, axes = _figure(len(stages))
    first = stages["careful"]
    times = [1 / speedup(first["wall"], run["wall"])[0] for run in stages.values()]
    axes.barh(range(len(stages)), times, color=[THEIRS] + [OURS] * (len(stages) - 1), label="time")
    if first["peak_bytes"]:
        memory = [run["peak_bytes"] / first["peak_bytes"] for run in stages.values()]
        axes.plot(memory, range(len(stages)), "D", color="#c08a2b", label="memory")
    _rows(axes, list(stages))
    axes.set_xlabel(
        "a step's time and memory over the careful loop's; each stage is on top of those above it", fontsize=9
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def curves(found, path):
    """Tokens per second over those of the careful loop, or of one rank, at the first point. found: {size: points}."""
    columns = 3
    figure = Figure(figsize=(10, 3 * ((len(found) + columns - 1) // columns)), layout="constrained")
    grid = figure.subplots((len(found) + columns - 1) // columns, columns, squeeze=False).flatten()
    for axes, (size, points) in zip(grid, found.items(), strict=False):
        if "sides" in points[0]:
            base = points[0]["tokens"] / statistics.median(points[0]["sides"]["careful"]["wall"])
            for side, colour in (("careful", THEIRS), ("fastft", OURS)):
                known = [point for point in points if side in point["sides"]]
                rates = [p["tokens"] / statistics.median(p["sides"][side]["wall"]) / base for p in known]
                axes.plot([p["value"] for p in known], rates, "o-", color=colour, label=side)
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=8)
        else:
            rates = [statistics.median(point["tokens_per_second"]) for point in points]
            axes.bar([str(point["value"]) for point in points], [rate / rates[0] for rate in rates], color=OURS)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second, relative", fontsize=8)
        axes.set_xlabel(size, fontsize=9)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


def _figure(rows):
    figure = Figure(figsize=(10, 1.2 + 0.3 * rows), layout="constrained")
    return figure, figure.subplots()


def _rows(axes, names):
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
