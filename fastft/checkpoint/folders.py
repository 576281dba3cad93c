"""The folders of checkpoints: made under a hidden name, published by a rename, ordered, and removed again."""

import math
import os
import shutil
from pathlib import Path

from fastft.checkpoint.manifest import problem, read_manifest
from fastft.checkpoint.state import step_folder
from fastft.durable import fault, sync


def create(folder):
    """Makes a folder; False where it exists already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def steps(checkpoints_dir):
    return [path for path in Path(checkpoints_dir).glob("step-*") if path.is_dir()]


def serial(folder, unreadable=math.inf):
    """Its place in the order of writing. What cannot be read counts as newest: it is looked at first, and named."""
    try:
        return read_manifest(folder)["serial"]
    except ValueError:
        return unreadable


def publish(temporary, folder):
    """Gives a finished folder its name. One that a rewound run wrote at the same step makes way."""
    if folder.exists():
        os.replace(folder, temporary.with_name(f"{temporary.name}.old"))
    os.replace(temporary, folder)
    sync(folder.parent)


def rotate(newest, keep, best_step):
    """Removes what interrupted saves left, and all but the `keep` newest good checkpoints; never the best one."""
    for leftover in newest.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    if keep is None:
        return
    good = sorted((f for f in steps(newest.parent) if problem(f, "sizes")[0] is None), key=serial)
    kept = {newest, *good[-keep:], *([] if best_step is None else [step_folder(newest.parent, best_step)])}
    for old in set(steps(newest.parent)) - kept:
        hidden = old.with_name(f".{old.name}.old")  # renamed first: half of a folder must not bear a checkpoint's name
        os.replace(old, hidden)
        fault("during_rotation")
        shutil.rmtree(hidden)
