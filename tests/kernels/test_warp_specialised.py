"""The warps of Hopper's forward wait for each other as a ring of tiles demands, read in what Triton's compiler leaves of it.

The interpreter runs a program's warps as one, so it cannot prove this. One region of the code copies tiles, two compute
with them. A tile has a barrier that says it is there and, for each of the two, one that says it is done with it.
"""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")

LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
EVENT = re.compile(
    r"(?:(wait|arrive)_barrier|barrier_(expect)) (%\w+), (%?\w+)|(copy)_global_to_local .*?\] %\w+, (%\w+)|warp_group_(dot) "
)


def test_ring(compile_ahead):
    spec = importlib.util.spec_from_file_location("aot_attention", Path(__file__).with_name("aot") / "attention.py")
    aot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(aot)
    chosen = [v for v in list(aot.hopper_variants()) if "forward" in v["kernel"] and v["constants"]["D"] in (64, 128)][
        :2
    ]
    variants = [{k: x for k, x in v.items() if k not in ("archs", "expect")} | {"arch": 90} for v in chosen]
    for code in compile_ahead(variants, "--ttgir"):
        check_ring(code)
    # What this test is for: code in which a consumer's tile may be overwritten, or is read before it is there.
    lines = code.splitlines()
    for kind in ("wait_barrier", "arrive_barrier"):
        for number in (i for i, line in enumerate(lines) if kind in line and line.startswith(" " * 8)):
            with pytest.raises(AssertionError):
                check_ring("\n".join(lines[:number] + lines[number + 1 :]))


def check_ring(code):
    arrivals, producer, *consumers = loops_of(code)
    assert len(consumers) == 2
    waited = []
    tiles = []  # (its own barrier, those of its consumers)
    for kind, barrier, value in producer:
        if kind == "wait":
            assert "xori" in value, "the first round finds the tiles free: the other parity"
            waited.append(barrier)
        elif kind == "expect":
            expected = barrier
        else:
            assert kind == "copy" and barrier == expected and arrivals[barrier] == {1}
            tiles.append((barrier, set(waited)))
            waited = []
    assert len(tiles) == 2 and not waited, "keys and values"
    freed = [set() for _ in tiles]
    for events in consumers:
        assert [kind for kind, _, _ in events] == ["wait", "dot", "arrive"] * len(tiles)
        for (there, _), free, step in zip(tiles, freed, (events[:3], events[3:]), strict=True):
            (_, waits_for, parity), _, (_, frees, count) = step
            assert waits_for == there and "xori" not in parity
            assert arrivals[frees] == {int(count)}, "all of a consumer's threads"
            free.add(frees)
    assert [free for _, free in tiles] == freed, "the copy waits for both"


def loops_of(code):
    """({barriers: their arrivals}, the events of the loop that copies, of those that compute).

    An event is (kind, the barriers, how the parity is computed, or the count); barriers bear their names before the regions.
    """
    lines = LOCATION.sub("", code).splitlines()
    start = next(i for i, line in enumerate(lines) if "ttg.warp_specialize(" in line)
    outside = re.search(r"warp_specialize\((.*?)\)", lines[start])[1].split(", ")
    arrivals, arrays, regions = {}, {}, []
    for line in lines[:start]:
        if found := re.search(r"(%\w+) = ttg.memdesc_index (%\w+)\[", line):
            arrays[found[1]] = found[2]
        if found := re.search(r"init_barrier (%\w+), (\d+)", line):
            arrivals.setdefault(arrays[found[1]], set()).add(int(found[2]))
    for line in lines[start + 1 :]:
        if re.match(r"    (default|partition\d+\()", line):
            names = dict(zip(re.findall(r"(%\w+): ", line), outside, strict="partition" in line))
            regions.append(([], names))
        elif regions:
            regions[-1][0].append(line)
    return arrivals, *(events_of(*region) for region in regions)


def events_of(lines, names):
    """Those of a region's innermost loop."""
    depth, loops, values = 0, {}, {}
    for line in lines:
        depth += "scf.for" in line
        if found := re.match(r" *(%\w+) = (.*)", line):
            values[found[1]] = found[2]
        if found := EVENT.search(line):
            kind = next(filter(None, (found[1], found[2], found[5], found[7])))
            assert kind != "dot" or "isAsync = true" not in line, "a product has read its tile when it is freed"
            index = values.get(found[3] or found[6], "")
            barrier = re.search(r"memdesc_index (%\w+)|$", index)[1]
            value = behind(found[4], values) if kind == "wait" else found[4]
            loops.setdefault(depth, []).append((kind, names.get(barrier, barrier), value))
        depth -= "scf.yield" in line
    return loops[max(loops)]


def behind(name, values):
    """The operations that a value is computed with, as text."""
    operation = values.get(name, "")
    operands = re.findall(r"%\w+", operation.split(" : ")[0])
    return " ".join([operation.split(" ")[0], *(behind(x, values) for x in operands[:1] if x != name)])
