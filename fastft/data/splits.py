"""The training, validation and test data that the arguments name."""

from fastft.data.columns import named_columns
from fastft.data.errors import DataError
from fastft.data.files import open_file
from fastft.data.hub import open_hub


def open_splits(args):
    """{"train": Source, "validation": ..., "test": ...}, those that are given; a file replaces the hub dataset's
    split.
    """
    sources = open_hub(args.dataset_name, args.dataset_config_name) if args.dataset_name else {}
    for split in ("train", "validation", "test"):
        path = getattr(args, f"{split}_file")
        if path is not None:
            sources[split] = open_file(path, f"--{split}_file", named_columns=named_columns(args))
    if not sources:
        raise DataError("no data: give --train_file or --dataset_name")
    return {split: sources[split] for split in ("train", "validation", "test") if split in sources}
