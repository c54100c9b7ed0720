"""Which boxes of an array does basic indexing ask for, and how do they become its result?

Integers, slices and ``...`` index an array that is in storage as they index one of NumPy. Places along an axis are
read as one range, or, where a step passes over much that would be read for nothing, one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._shardings import Box


def read_indexed(
    index: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    is_split: Callable[[int, int], bool],
    read_boxes: Callable[[Sequence[Box]], Sequence[np.ndarray[Any, Any]]],
) -> Any:
    """What basic indexing of an array in storage gives.

    Args:
      index: What is between the brackets.
      shape: Shape of the array.
      dtype: Type of its elements.
      is_split: Whether places along an axis with this distance between them are read one by one.
      read_boxes: Reads boxes.

    Raises:
      IndexError: As in NumPy, and for all other kinds of indices.
    """
    axes, squeeze = _parse_index(index, shape)
    runs_of_axes = [
        _runs_of(places, is_split=is_split(axis, abs(places.step))) for axis, places in enumerate(axes)
    ]
    picks = list(itertools.product(*runs_of_axes))
    boxes = [(tuple(run.lo for run in pick), tuple(run.hi for run in pick)) for pick in picks]
    parts = read_boxes(boxes)
    steps = [(*(slice(None, None, run.step) for run in pick), Ellipsis) for pick in picks]
    if len(picks) == 1:
        return parts[0][steps[0]][squeeze]
    whole = np.empty(tuple(map(len, axes)), dtype)
    for pick, part, step in zip(picks, parts, steps, strict=True):
        whole[tuple(run.out for run in pick)] = part[step]
    return whole[squeeze]


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """Places along one axis that are read as one range.

    Attributes:
      lo, hi: The range.
      step: Which of its places are wanted, beginning at the end when negative.
      out: Where they go in the result.
    """

    lo: int
    hi: int
    step: int
    out: slice


def _runs_of(places: range, *, is_split: bool) -> list[_Run]:
    """One run for all places, or one for each."""
    if is_split:
        return [_Run(place, place + 1, 1, slice(at, at + 1)) for at, place in enumerate(places)]
    if not places:
        return [_Run(0, 0, 1, slice(0, 0))]
    lo, last = min(places[0], places[-1]), max(places[0], places[-1])
    return [_Run(lo, last + 1, places.step, slice(0, len(places)))]


def _parse_index(index: Any, shape: tuple[int, ...]) -> tuple[list[range], tuple[Any, ...]]:
    """The places that basic indexing asks for along each axis, and the index that drops axes of integers."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    at = [number for number, part in enumerate(parts) if part is Ellipsis]
    if len(at) > 1:
        raise IndexError("only one ellipsis is allowed")
    split = at[0] if at else len(parts)
    before, after = parts[:split], parts[split + 1 :]
    fill = len(shape) - len(before) - len(after)
    if fill < 0:
        raise IndexError(f"{len(before) + len(after)} indices for an array of rank {len(shape)}")
    axes: list[range] = []
    squeeze: list[Any] = []
    for axis, part in enumerate((*before, *(slice(None),) * fill, *after)):
        if isinstance(part, slice):
            axes.append(range(shape[axis])[part])
            squeeze.append(slice(None))
        else:
            place = _integer(part)
            if not -shape[axis] <= place < shape[axis]:
                raise IndexError(f"index {place} is out of bounds for axis {axis} with size {shape[axis]}")
            axes.append(range(shape[axis])[place : place + 1 or None])
            squeeze.append(0)
    # As in NumPy, an ellipsis makes the difference between an array without axes and a scalar.
    return axes, (*squeeze, Ellipsis) if at else tuple(squeeze)


def _integer(part: Any) -> int:
    if not isinstance(part, (bool, np.bool_)):
        with contextlib.suppress(TypeError):
            return operator.index(part)
    raise IndexError(f"only integers, slices and ... index a stored leaf, not {type(part).__name__}")
