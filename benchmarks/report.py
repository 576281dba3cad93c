"""A result made readable: `python -m benchmarks.report [result.json]`.

The newest result goes as Markdown into benchmarks/README.md, and as report.html with its plots as PNG files into
benchmarks/results/<machine>-<date>/. The newest of each machine go as a summary into README.md.
"""

import argparse
import html
import json
import re
import statistics
from pathlib import Path

from benchmarks import _plots
from benchmarks._harness import RESULTS, ROOT, machine_line, speedup

README, SUMMARY = ROOT / "benchmarks" / "README.md", ROOT / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
JOBS = {
    "sentiment": "Fine-tuning for sentiment",
    "sentiment_jemalloc": "Fine-tuning for sentiment, all under jemalloc",
    "lora": "Fine-tuning with LoRA",
    "lora_jemalloc": "Fine-tuning with LoRA, all under jemalloc",
    "whole": "Fine-tuning all weights",
    "qlora": "Fine-tuning with LoRA over weights in 4 bits (QLoRA)",
}
RIVALS = {
    "sentiment": {
        "careful": "sentiment, a careful Hugging Face loop: SDPA, padding to the longest of the batch, fused AdamW",
        "mixed": "sentiment, as careful, with fp32 weights under autocast to bf16, which learn as well as fastft's",
        "trainer": "sentiment, transformers' Trainer, as careful",
        "textbook": "sentiment, the textbook loop: fp32, every sentence padded to 128, eager attention",
    },
    "sentiment_jemalloc": {
        "careful": "sentiment, the careful loop, both under jemalloc",
        "textbook": "sentiment, the textbook loop, both under jemalloc",
    },
    "lora": {
        "careful": "LoRA, transformers and PEFT with SDPA",
        "compiled": "LoRA, the same under torch.compile",
        "liger": "LoRA, the same with Liger's kernels",
        "eager": "LoRA, transformers and PEFT with eager attention",
        "trainer": "LoRA, transformers' Trainer with PEFT and SDPA",
    },
    "lora_jemalloc": {"careful": "LoRA, transformers and PEFT with SDPA, both under jemalloc"},
    "qlora": {
        "bitsandbytes": "QLoRA, transformers, PEFT and bitsandbytes, SDPA",
        "fastft 16-bit": "QLoRA, fastft's LoRA over the same weights in 16 bits",
    },
    "whole": {"careful": "all weights of such a Llama with 4 layers, transformers with SDPA and fused AdamW"},
}
LOOPS = {"mixed": "careful, with fp32 weights under autocast"}
WORDS = {
    "sentiment": {
        "textbook": "pads every sentence to 128 and uses eager attention",
        "careful": "pads to the longest of the batch, with SDPA and fused AdamW",
        "mixed": "does so with fp32 weights under autocast",
        "trainer": "is transformers' Trainer, else as `careful`",
    },
    "llama": {
        "careful": "is transformers with SDPA and fused AdamW (and PEFT, for LoRA)",
        "eager": "has eager attention",
        "trainer": "is transformers' Trainer, else as `careful`",
        "compiled": "is `careful` under torch.compile",
        "liger": "has Liger's kernels",
        "fastft 8-bit": "is fastft with AdamW8bit",
        "bitsandbytes": "is transformers with SDPA, PEFT, bitsandbytes' layers and fused AdamW",
        "fastft 16-bit": "is fastft over the same weights in 16 bits",
    },
}
FLOOR = (
    "A `copy` moves as many bytes as the op must and computes nothing; `frozen` and `products` are its matrix products "
    "alone. Nothing that does the same work takes less time than its floor; what leaves work out, as the loss does with "
    "ignored labels, may."
)


def sections(result):
    """[(title, Markdown, how to plot it: (function, data) or None)] of one result, in the order of the page."""
    parts = []
    for kind, job in result["jobs"].items():
        markdown = (_sentiment if kind.startswith("sentiment") else _llama)(job, result["machine"])
        if kind.endswith("_jemalloc"):
            markdown = f"Under jemalloc, told to keep what is freed. {markdown}"
        parts.append((JOBS[kind], markdown, (_plots.bars, {"": job["sides"]})))
    if result.get("accuracies"):
        parts.append(("What the speed is worth", _accuracies(result["accuracies"]), None))
    for name, runs in result.get("ablations", {}).items():
        parts.append((f"What each part brings: {name.split(' ')[0]}", _ablation(name, runs), (_plots.stairs, runs)))
    if result.get("scaling"):
        parts.append(("Scaling", _scaling(result["scaling"]), (_plots.curves, result["scaling"])))
    for title, groups in _tables(result.get("ops", {})):
        parts.append((title, _ops(groups), (_plots.bars, groups)))
    if floors := _floors(result.get("ops", {})):
        parts.append(("How close to the floor", FLOOR, (_plots.shares, floors)))
    if points := _points(result):
        parts.append(("How close to the machine's ceilings", _rooflines(points), (_plots.roofline, points)))
    parts.append(("Where and how", _where(result), None))
    return parts


def render(result):
    """Markdown of one result: each job's table, the ops, then where and how it was measured."""
    return "\n\n".join(markdown for _, markdown, _ in sections(result))


def _where(result):
    load = result["machine"]["load"]
    busy = "" if load is None else f", when the load average was {load:.1f}"
    text = f"`{result['command']}` on {result['date'][:10]}{busy}.\n{machine_line(result['machine'])}."
    return f"{text}\n{_ceilings(result['ceilings'])}" if result.get("ceilings") else text


def _sentiment(job, machine):
    sides, ours = job["sides"], job["sides"]["fastft"]
    absolute = machine["gpu"] is not None  # on a CPU only ratios carry over to the reader's machine
    rows = [
        f"{job['job']['name']}: {job['job']['batch_size']} sentences ({job['tokens']:.0f} tokens) a step, "
        f"{len(ours['wall'])} rounds. Speed-up: the loop's time over fastft's on the same sentences; median and 95 % "
        f"interval. {_words('sentiment', sides)}",
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


def _llama(job, machine):
    sides, ours = job["sides"], job["sides"]["fastft"]
    absolute = machine["gpu"] is not None
    rows = [
        f"{job['job']['name']}: {job['job']['batch_size']} x {job['job']['length']} tokens a step in {job['dtype']}, "
        f"{len(ours['wall'])} rounds. {_words('llama', sides)} Memory: the most that a step held above what it held before.",
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


def _words(kind, sides):
    """What the loops are that a table shows, in one sentence."""
    return "; ".join(f"`{name}` {words}" for name, words in WORDS[kind].items() if name in sides) + "."


def _accuracies(cases):
    rows = [
        "Accuracy on held-out sentences after one epoch, seeds 1, 2 and 3 or seed 1 alone, each loop with the same schedule.",
        "",
        "| job | loop | accuracy |",
        "|---|---|---|",
    ]
    for case in cases:
        loop = LOOPS.get(case["loop"], case["loop"])
        rows.append(f"| {case['job']} | {loop} | {', '.join(f'{a:.3f}' for a in case['accuracies'])} |")
    return "\n".join(rows)


def _ablation(name, runs):
    first = runs["careful"]
    rows = [
        f"{name}, a part of fastft at a time. Each stage on top of the one before: `loop` is fastft's training loop around the "
        "model as it is. Speed-up over the careful loop, over the stage before, and the most memory that a step held above "
        "what it held before, over the careful loop's.",
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


def summary(results):
    """Markdown: fastft against the loops of both jobs, a column for each machine; then the newest accuracies."""
    results = sorted(results, key=lambda result: result["date"])
    kinds = [_kind(result["machine"]) for result in results]
    rows = ["| job, against |" + "".join(f" {kind} | memory |" for kind in kinds), "|---|" + "---|---|" * len(kinds)]
    for job, rivals in RIVALS.items():
        for rival, words in rivals.items():
            cells = [cell for result in results for cell in _against(result["jobs"].get(job), rival)]
            if any(cells):
                rows.append(f"| {words} | {' | '.join(cells)} |")
    rows += ["", "Speed-up and 95 % interval; `memory`: the most that the rival's step held, over fastft's."]
    for result, kind in zip(results, kinds, strict=True):
        apart = all(job.get("apart") for job in result["jobs"].values())
        shared = "" if apart else " The loops shared one process, and the allocator's settings that fastft chooses."
        rows += [
            "",
            f"{kind}: `{result['command']}`, {result['date'][:10]}; {machine_line(result['machine'])}.{shared}",
        ]
    if with_accuracies := [result for result in results if result.get("accuracies")]:
        newest = with_accuracies[-1]
        rows += ["", f"On {_kind(newest['machine'])}. {_accuracies(newest['accuracies'])}"]
    return "\n".join(rows)


def _kind(machine):
    bf16 = "bf16" if machine["native_bf16"] else "fp32"
    return machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}, {bf16}"


def _against(job, rival):
    """(speed-up, memory) cells of a job."""
    if job is None or rival not in job["sides"]:
        return "", ""
    theirs, ours = job["sides"][rival], job["sides"]["fastft"]
    memory = f"{theirs['peak_bytes'] / ours['peak_bytes']:.1f}" if theirs.get("peak_bytes") else ""
    return _interval(theirs, ours, "wall"), memory


def _tables(groups):
    """[(title, {group: sides})]: ops that have the same rivals share a table."""
    tables = {}
    for group, sides in groups.items():
        tables.setdefault(tuple(sorted(set(sides) - {"fastft"})), {})[group] = sides
    for members in tables.values():
        yield f"Single ops: {', '.join(dict.fromkeys(re.split('[ ,]', group)[0] for group in members))}", members


def _ops(groups):
    rivals = [side for side in next(iter(groups.values())) if side != "fastft"]
    rows = [f"| the rival's time over fastft's | {' | '.join(rivals)} |", f"|---|{'---|' * len(rivals)}"]
    for group, sides in groups.items():
        rows.append(f"| {group} | {' | '.join(_interval(sides[rival], sides['fastft'], 'wall') for rival in rivals)} |")
    return "\n".join(rows)


def _floors(groups):
    """{group: share of the floor that fastft reaches} where a floor was measured."""
    shares = {}
    for group, sides in groups.items():
        for floor in set(sides) & set(_plots.FLOORS):
            shares[f"{group}: {floor}"] = speedup(sides[floor]["wall"], sides["fastft"]["wall"])[0]
    return shares


def _points(result):
    """{group: (FLOPs per byte, share of the copy's bandwidth, share of the matrix rate, its FLOPs per byte of the copy)}.

    Of fastft, where the benchmark counts its work and the matrix rate of its dtype was measured.
    """
    found, points = result.get("ceilings", {}), {}
    for group, sides in result.get("ops", {}).items():
        work = sides["fastft"].get("work")
        rate = work and found.get(f"{work['dtype']}_flop_per_s")
        if rate:
            seconds, bandwidth = statistics.median(sides["fastft"]["wall"]), found["copy_bytes_per_s"]
            shares = work["bytes"] / seconds / bandwidth, work["flops"] / seconds / rate
            points[group] = (work["flops"] / work["bytes"], *shares, rate / bandwidth)
    return points


def _rooflines(points):
    rows = [
        "What fastft reaches of the bandwidth of a large copy and of the rate of a large matrix product, both measured in this "
        "run. Work is the least that the op must do (an exponential counts as one operation); what fits into a cache may "
        "move faster than memory.",
        "",
        "| op | FLOPs per byte | of the copy's bandwidth | of the matrix rate |",
        "|---|---|---|---|",
    ]
    for group, (intensity, bandwidth, rate, _) in points.items():
        rows.append(f"| {group} | {intensity:.1f} | {100 * bandwidth:.0f} % | {100 * rate:.0f} % |")
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


def page(result, folder):
    """One HTML page of a result, written with its plots into `folder`."""
    body = []
    for number, (title, markdown, plot) in enumerate(sections(result)):
        body.append(f"<h2>{html.escape(title)}</h2>")
        if plot is not None:
            function, data = plot
            name = f"{number}-{re.sub('[^a-z]+', '-', title.lower())[:40].strip('-')}.png"
            function(data, folder / name)
            body.append(f'<img src="{name}" alt="{html.escape(title)}">')
        body.append(_as_html(markdown))
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>fastft: benchmarks of {result["date"][:10]}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 14px }} img {{ max-width: 100%; margin: 1rem 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left }} th {{ border-color: #888 }}
td:not(:first-child) {{ white-space: nowrap }}
code {{ background: #f4f4f4; padding: .1rem .3rem }} h2 {{ margin-top: 2.5rem }}
</style>
<h1>fastft against its rivals</h1>
<p>fastft fine-tunes transformers. Here rival and fastft take turns on the same inputs, and their answers are compared before
anything is timed; each loop of a whole training step has a process of its own. A ratio above 1 means that fastft is faster;
in brackets, and as lines in the plots, is its 95 % interval. Green is faster, red slower, grey neither for certain, pale green
another way that fastft itself has.</p>
{"".join(body)}
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


def update(readme, markdown):
    """Replaces what stands between the two marks in a Markdown file."""
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{readme}: needs the lines {BEGIN} and {END}, between which the results go")
    readme.write_text(f"{before}{BEGIN}\n{markdown}\n{END}{after}", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", nargs="?", type=Path, help="result file (default: the newest in benchmarks/results)")
    parser.add_argument(
        "--readme", type=Path, default=README, help="file of all tables (default: benchmarks/README.md)"
    )
    parser.add_argument("--summary", type=Path, default=SUMMARY, help="file of the summary (default: README.md)")
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
    whole = {path: one for path, one in read.items() if {"sentiment", "lora"} <= one["jobs"].keys()} or read
    path, result = max(whole.items(), key=lambda item: item[1]["date"])
    update(args.readme, render(result))
    newest = {}
    for one in sorted(whole.values(), key=lambda one: one["date"]):
        newest[_kind(one["machine"])] = one
    update(args.summary, summary(newest.values()))
    folder = args.html or path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    (folder / "report.html").write_text(page(result, folder), encoding="utf-8")
    print(f"{args.readme}, {args.summary} and {folder / 'report.html'} show {path.name}")


if __name__ == "__main__":
    main()
