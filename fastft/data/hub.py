"""Hub datasets -> rows, through the `datasets` library, which caches the download."""

import logging

from fastft.data.errors import DataError
from fastft.data.files import Source

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
log = logging.getLogger(__name__)


def open_hub(name, config=None):
    """{"train": Source, "validation": ..., "test": ...}: the splits that the dataset has.

    Class labels that the dataset stores as numbers become their names. A split whose labels are all hidden (-1, as in
    GLUE's test sets) is left out, and the log says so.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        given = f"--dataset_name {name}" + (f" --dataset_config_name {config}" if config else "")
        raise DataError(f"{given}: {' '.join(str(error).split())}") from None
    sources = {}
    for split, names in SPLITS.items():
        present = next((n for n in names if n in found), None)
        if present is None:
            continue
        if _labels_hidden(found[present]):
            log.warning("%s: the labels of its split %s are hidden, so it is not used", name, present)
            continue
        sources[split] = _source(f"{name}/{present}", found[present])
    if not sources:
        raise DataError(
            f"--dataset_name {name}: has the splits {', '.join(found)}; fastft uses train, validation, test"
        )
    return sources


def _class_names(dataset):
    """{column: names of its classes} of the columns that hold class numbers."""
    from datasets import ClassLabel

    return {column: f.names for column, f in dataset.features.items() if isinstance(f, ClassLabel)}


def _labels_hidden(dataset):
    return any(dataset.unique(column) == [-1] for column in _class_names(dataset))


def _source(name, dataset):
    classes = _class_names(dataset)

    def read():
        for number, row in enumerate(dataset, 1):
            for column, names in classes.items():
                row[column] = names[row[column]] if row[column] is not None and row[column] >= 0 else None
            yield f"{name}, row {number}", row

    return Source(name, read, lambda: dataset._fingerprint, dataset.data.nbytes)
