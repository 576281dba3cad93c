"""What a label column holds -> class numbers or scores."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LabelReader:
    """Called with a file's `Encoded`; returns class numbers int64 [N] or scores float32 [N], and entries for the
    report.

    problem_type None: scores where all labels are numbers and one has a decimal point, else classes. classes None:
    the labels define them, sorted; otherwise a label that is not among them is a ValueError.
    """

    problem_type: str | None
    classes: tuple[str, ...] | None

    def __call__(self, encoded):
        problem_type = self.problem_type or ("regression" if _are_scores(encoded.labels) else "classification")
        if problem_type == "regression":
            scores = [_score(label, where) for label, where in zip(encoded.labels, encoded.wheres, strict=True)]
            return np.array(scores, np.float32), {"labels": f"scores from {min(scores):g} to {max(scores):g}"}
        names = [str(label).strip() for label in encoded.labels]
        classes = self.classes or _sorted_classes(names)
        if len(classes) < 2:
            raise ValueError(f"{encoded.wheres[0]}: all labels are {classes[0]!r}; there must be two classes or more")
        numbers = {name: number for number, name in enumerate(classes)}
        for name, where in zip(names, encoded.wheres, strict=True):
            if name not in numbers:
                more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
                raise ValueError(
                    f"{where}: label {name!r} does not occur in the training data; must be one of "
                    f"{', '.join(classes[:20])}{more}"
                )
        labels = np.array([numbers[name] for name in names], np.int64)
        return labels, {"labels": f"{len(classes)} classes", "classes": list(classes)}


def _sorted_classes(names):
    """Distinct names, in the order of their values where all are whole numbers."""
    distinct = sorted(set(names))
    return tuple(sorted(distinct, key=int) if all(map(_is_whole, distinct)) else distinct)


def _are_scores(labels):
    return all(math.isfinite(_number(label)) for label in labels) and not all(map(_is_whole, labels))


def _score(label, where):
    score = _number(label)
    if not math.isfinite(score):
        raise ValueError(f"{where}: label {label!r} must be a finite number, as the task is regression")
    return score


def _number(label):
    """The label as a float; NaN where it is none."""
    try:
        return float(label)
    except ValueError:
        return math.nan


def _is_whole(label):
    """Whether it is written as a whole number: 3 and "3" are, 3.0 and "3.0" are not."""
    return isinstance(label, int) or (isinstance(label, str) and label.strip().lstrip("+-").isdecimal())
