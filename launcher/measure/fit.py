"""Constants from measurements: least squares of relative errors, no constant below zero."""

from collections.abc import Sequence
from itertools import combinations

Point = tuple[tuple[float, ...], float]
"""(the terms, the seconds that were measured)."""


def fit(points: Sequence[Point]) -> tuple[float, ...]:
    """One constant for each term, such that their sum is what was measured. Raises ValueError without points.

    Of all choices of terms whose constants are not negative the best one: with three terms there are seven.
    """
    if not points:
        raise ValueError("nothing was measured")
    terms = len(points[0][0])
    best: tuple[float, tuple[float, ...]] | None = None
    for size in range(1, terms + 1):
        for chosen in combinations(range(terms), size):
            constants = _solved(points, chosen, terms)
            if constants is not None and min(constants) >= 0:
                off = sum(error**2 for error in errors(points, constants))
                if best is None or off < best[0] * 0.999:
                    best = off, constants
    if best is None:
        raise ValueError("what was measured cannot be fitted")
    return best[1]


def errors(points: Sequence[Point], constants: Sequence[float]) -> list[float]:
    """Of each point, (predicted - measured) / measured."""
    return [
        (sum(c * term for c, term in zip(constants, terms, strict=True)) - seconds) / seconds
        for terms, seconds in points
    ]


def _solved(points: Sequence[Point], chosen: Sequence[int], terms: int) -> tuple[float, ...] | None:
    """The normal equations of the chosen terms, by elimination; None when they say too little."""
    rows = [[values[place] / seconds for place in chosen] for values, seconds in points]
    scale = [max(abs(row[n]) for row in rows) or 1.0 for n in range(len(chosen))]
    rows = [[value / by for value, by in zip(row, scale, strict=True)] for row in rows]
    size = len(chosen)
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(size)] + [sum(row[i] for row in rows)] for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(matrix[k][i]))
        if abs(matrix[pivot][i]) < 1e-9:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for k in range(size):
            if k != i:
                factor = matrix[k][i] / matrix[i][i]
                matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    found = [0.0] * terms
    for i, place in enumerate(chosen):
        found[place] = matrix[i][size] / matrix[i][i] / scale[i]
    return tuple(found)
