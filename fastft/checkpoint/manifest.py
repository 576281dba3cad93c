"""The manifest: size and SHA-256 of every file of a checkpoint, and whether a folder still fits it."""

import hashlib
import json
import os
from pathlib import Path

from fastft.durable import file_sha256, rank, share, sync, write_hashed, write_json

FORMAT = 2
SHARDS = "deepspeed"
MANIFEST = "manifest.json"
SMALL = 2**20  # bytes: files up to this size are hashed whenever a checkpoint is looked at


def write_manifest(folder, everything, content, serial):
    """Adds state.json and the manifest: what is on this disk, under a digest of what is on all of them."""
    (folder / ".disk").unlink()
    if (folder / SHARDS).is_dir():
        sync(folder / SHARDS)
    entry = write_hashed(folder / "state.json", lambda file: file.write(json.dumps(content, indent=2).encode()))
    here = {name: e for name, e in everything.items() if e["disk"] == rank()}
    manifest = {
        "format": FORMAT,
        "serial": serial,
        "world_size": content["world_size"],
        "all_disks": digest({name: e["sha256"] for name, e in everything.items()}),
        "files": {
            "state.json": entry,
            **{name: {"bytes": e["bytes"], "sha256": e["sha256"]} for name, e in here.items()},
        },
    }
    write_json(folder / MANIFEST, {**manifest, "sha256": digest(manifest)})


def read_manifest(folder):
    """The manifest of a checkpoint; ValueError where there is none, or not the one that was written."""
    try:
        text = (Path(folder) / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        whole = text.endswith("}\n") and manifest.pop("sha256") == digest(manifest)
    except FileNotFoundError:
        raise ValueError(f"no complete checkpoint, {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise ValueError(f"has format {manifest['format']}; this version of fastft reads format {FORMAT}")
    return manifest


def agreed_problem(folder, verify):
    """Why a checkpoint cannot be used, on whichever disk, or None. The same on all ranks."""
    found = share(problem(Path(folder), verify))
    for r, (reason, _) in enumerate(found):
        if reason is not None:
            return reason if r == 0 else f"{reason} (rank {r})"
    if len({disks for _, disks in found}) > 1:
        return "the disks of the ranks hold parts of different checkpoints"
    return None


def problem(folder, verify):
    """(why this disk's part cannot be used or None, digest of all disks' parts)."""
    try:
        if not folder.is_dir():
            raise ValueError("no such folder")
        manifest = read_manifest(folder)
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_SIZE", 1))
        for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
            path, mine = folder / name, i % local_size == local_rank or local_size == 1
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written")
            if (entry["bytes"] <= SMALL or (verify == "full" and mine)) and file_sha256(path) != entry["sha256"]:
                raise ValueError(f"{name} is damaged: its SHA-256 is another than when it was written")
        return None, manifest["all_disks"]
    except (ValueError, OSError) as error:
        return str(error), None
    except (KeyError, TypeError, AttributeError):  # of a manifest that somebody else wrote
        return f"{MANIFEST} is damaged", None


def digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
