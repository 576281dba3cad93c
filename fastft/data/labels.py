"""What a label column holds -> class numbers or scores."""

import math
import re
from dataclasses import dataclass

import numpy as np

from fastft.data.errors import DataError, brief

LARGEST = float(np.finfo(np.float32).max)  # scores are kept in float32
_WHOLE = re.compile(r"[+-]?\d{1,4000}")  # Python refuses to convert more digits


@dataclass(frozen=True)
class LabelReader:
    """Called with a file's `Encoded`; returns class numbers int64 [N] or scores float32 [N], and entries for the
    report.

    problem_type None: scores where all labels are numbers and one has a decimal point, else classes. classes None:
    the labels define them, sorted; otherwise a label that is not among them is a ValueError.
    """

    problem_type: str | None
    classes: tuple[str, ...] | None

    def problems(self, encoded):
        """{index: why} of the examples whose labels `__call__` refuses one by one."""
        if self._problem_type(encoded) == "regression":
            bad = {i: _score_problem(label) for i, label in enumerate(encoded.labels)}
        elif self.classes is None:
            return {}
        else:
            known = set(self.classes)
            names = (str(label).strip() for label in encoded.labels)
            bad = {i: None if name in known else self._class_problem(name) for i, name in enumerate(names)}
        return {i: f"{encoded.wheres[i]}: {why}" for i, why in bad.items() if why is not None}

    def _problem_type(self, encoded):
        return self.problem_type or ("regression" if _are_scores(encoded.labels) else "classification")

    def _class_problem(self, name):
        more = f" and {len(self.classes) - 20} more" if len(self.classes) > 20 else ""
        known = f"{', '.join(self.classes[:20])}{more}"
        return f"label {brief(name)} does not occur in the training data; must be one of {known}"

    def __call__(self, encoded):
        for problem in self.problems(encoded).values():
            raise DataError(problem)
        if self._problem_type(encoded) == "regression":
            scores = [_number(label) for label in encoded.labels]
            return np.array(scores, np.float32), {"labels": f"scores from {min(scores):g} to {max(scores):g}"}
        names = [str(label).strip() for label in encoded.labels]
        classes = self.classes or _sorted_classes(names)
        if len(classes) < 2:
            raise DataError(
                f"{encoded.wheres[0]}: all labels are {brief(classes[0])}; there must be two classes or more"
            )
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[name] for name in names], np.int64)
        return labels, {"labels": f"{len(classes)} classes", "classes": list(classes)}


def _sorted_classes(names):
    """Distinct names, in the order of their values where all are whole numbers."""
    distinct = sorted(set(names))
    return tuple(sorted(distinct, key=int) if all(map(_is_whole, distinct)) else distinct)


def _are_scores(labels):
    return all(_is_score(label) for label in labels) and not all(map(_is_whole, labels))


def _score_problem(label):
    if _is_score(label):
        return None
    return f"label {brief(label)} must be a finite number, as the task is regression"


def _is_score(label):
    return abs(_number(label)) <= LARGEST  # NaN is not


def _number(label):
    """The label as a float; NaN where it is none."""
    try:
        return float(label)
    except (ValueError, OverflowError):
        return math.nan


def _is_whole(label):
    """Whether it is written as a whole number: 3 and "3" are, 3.0 and "3.0" are not."""
    return isinstance(label, int) or (isinstance(label, str) and _WHOLE.fullmatch(label.strip()) is not None)
