"""Which rows of saved leaves is a wanted leaf made of, where it is not one saved leaf as it is?

A model that changes may want in one leaf what was saved in pieces, or in pieces what was saved in one, or a table
whose rows stand for the words of another vocabulary. All of it is the same: saved leaves are laid end to end along an
axis, and for each *row* (place along that axis) of the wanted leaf there is the number of the row that it becomes, or
-1 where the leaf of ``like`` keeps its own:

    saved                      rows                  wanted
    emb/0: a b c               range(0, 5)           emb: a b c d e              `Pieces` are joined
    emb/1: d e                 range(3, 5)           emb/1: d e                  or cut
                               4, 0, -1, 1           emb: e a . b                `Vocabulary`

1. `Pieces` and `Vocabulary` are what a caller writes in ``rename=``. `_naming` makes a `Source` of them for each key
   that they give.
2. `derive` finds the rows when it knows the shapes that ``like`` has: a `Derivation`, or what is wrong.

Rows are taken whole: the other axes are as they were saved, and nothing but the dtype can be converted.

Deliberately not here: which rule fits which key (`_naming`), reading (`_gathering`).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import os
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
import xxhash

from ._errors import MismatchError, Problem
from ._manifest import LeafSpec, Manifest

Words = Sequence[Hashable] | str | os.PathLike[str]

_MIXED_UP = "its pieces lie along axis {}, but it is wanted along axis {}"


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """Leaves that lie end to end along an axis and make up one; for ``rename=`` of `restore`.

    As what a rule renames *to*, these leaves of ``like`` get what was saved as one; their shapes say where it is cut,
    and each reads its own part. As what a rule renames *from*, these saved leaves become one, which is
    of the first one's kind and sharding where nobody says more. Both together cut anew.

    Attributes:
      names: Keys of the pieces, from first to last.
      axis: The axis along which they lie; counted from the end when negative.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"emb": jnp.arange(5.0)})
      >>> like = {"emb": [jnp.zeros(3), jnp.zeros(2)]}
      >>> tree = jaxckpt.restore(tmp / "a", like, rename={"emb": jaxckpt.Pieces(("emb/0", "emb/1"))})
      >>> tree["emb"][1].tolist()
      [3.0, 4.0]
      >>> _ = jaxckpt.save(tmp / "b", tree)
      >>> jaxckpt.restore(tmp / "b", rename={jaxckpt.Pieces(("emb/0", "emb/1")): "emb"})["emb"].tolist()
      [0.0, 1.0, 2.0, 3.0, 4.0]

    Source: partitioned variables of TensorFlow.
    """

    names: Sequence[str]
    axis: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise TypeError(f"Pieces takes several names, not {self.names!r}")
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"Pieces takes names that are all different, not {self.names!r}")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A leaf whose rows stand for words, where the words changed; for ``rename=`` of `restore`.

    Each row goes where its word stands in the new vocabulary. Words that the old one lacks keep the row of ``like``, as
    do rows of ``like`` beyond the vocabulary (buckets for unknown words, padding). Saved rows beyond the old vocabulary
    are left out.

    Attributes:
      name: New key of the leaf; often the old one.
      old: The words of the saved rows in their order: anything hashable, or the path of a text file (UTF-8) with one
        word a line. Give the first words only where no more of them count.
      new: The same for the wanted rows.
      axis: The axis of the rows; counted from the end when negative.

    Raises:
      ValueError: A word is in a vocabulary twice.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"emb": jnp.array([1.0, 2.0])})
      >>> vocabulary = jaxckpt.Vocabulary("emb", old=["cat", "dog"], new=["dog", "owl", "cat"])
      >>> jaxckpt.restore(tmp / "a", {"emb": jnp.zeros(3)}, rename={"emb": vocabulary})["emb"].tolist()
      [2.0, 0.0, 1.0]

    Source: ``tf.train.VocabInfo`` and ``tf.train.warm_start``.
    """

    name: str
    old: Words = dataclasses.field(repr=False)
    new: Words = dataclasses.field(repr=False)
    axis: int = 0

    def __post_init__(self) -> None:
        for field, which in (("old", self.old), ("new", self.new)):
            words = _read_words(which)
            if len(set(words)) != len(words):
                seen: set[Hashable] = set()
                twice = next(word for word in words if word in seen or seen.add(word))
                raise ValueError(f"{twice!r} is in the {field} vocabulary of {self.name!r} twice")
            object.__setattr__(self, field, words)

    def rows(self) -> np.ndarray[Any, Any]:
        """``int64[len(new)]``: the old row of each new word, or -1."""
        assert isinstance(self.old, tuple)
        assert isinstance(self.new, tuple)
        place = {word: row for row, word in enumerate(self.old)}
        return np.fromiter((place.get(word, -1) for word in self.new), np.int64, len(self.new))


def _read_words(words: Words) -> tuple[Hashable, ...]:
    if isinstance(words, collections.abc.Set):
        raise TypeError("a vocabulary has its words in the order of the rows, which a set does not have")
    if not isinstance(words, (str, os.PathLike)):
        return tuple(words)
    lines = pathlib.Path(words).read_text(encoding="utf-8").split("\n")
    return tuple(lines if lines[-1] else lines[:-1])


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What the rules say of a new key that does not get one saved leaf as it is.

    Attributes:
      leaves: Numbers of the saved leaves.
      joined: How they lie end to end, where they are pieces.
      wanted: The pieces that they become, of which the key is one, or the vocabulary that the key gets.
    """

    leaves: tuple[int, ...]
    joined: Pieces | None = None
    wanted: Pieces | Vocabulary | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Derivation:
    """Of which rows a wanted leaf is made.

    Attributes:
      leaves: Numbers of the saved leaves, which lie end to end.
      axis: Along which axis.
      rows: For each row of the wanted leaf that of the saved leaves, or -1.
      base: The leaf of ``like`` whose rows are kept where that is -1; None where it never is.
      spec: What would be said of the wanted leaf if it had been saved.
    """

    leaves: tuple[int, ...]
    axis: int
    rows: range | np.ndarray[Any, Any]
    base: Any
    spec: LeafSpec

    def describe(self) -> str:
        """Words that are equal where the rows are."""
        rows = self.rows if isinstance(self.rows, range) else xxhash.xxh3_128_hexdigest(self.rows.tobytes())
        return f"rows {rows} along axis {self.axis} of leaves {self.leaves}"


def derive(manifest: Manifest, key: str, source: Source, like: Mapping[str, Any] | None) -> Derivation:
    """Finds the rows of a wanted leaf.

    Args:
      manifest: What is saved.
      key: Key of the wanted leaf.
      source: What the rules say of it.
      like: The leaves of the wanted tree by key; None where there is no ``like``.

    Raises:
      MismatchError: They cannot be found; with one problem.
    """
    first = manifest.spec(source.leaves[0])
    for leaf in source.leaves:
        if manifest.spec(leaf).kind not in ("array", "numpy"):
            _refuse(
                key,
                "kind",
                f"{manifest.keys[leaf]!r} on disk is no array of numbers, whose rows can be taken",
            )
    axis = _find_axis(key, source, first)
    for leaf in source.leaves[1:]:
        spec = manifest.spec(leaf)
        if _across(spec, axis) != _across(first, axis):
            one, other = (f"{manifest.keys[each]!r}" for each in (source.leaves[0], leaf))
            what = f"{_form(first)} and {_form(spec)} do not fit together along axis {axis}"
            _refuse(key, "shape", f"{one} and {other} on disk: {what}")
    count = sum(manifest.spec(leaf).shape[axis] for leaf in source.leaves)
    rows: range | np.ndarray[Any, Any] = range(count)
    base = None
    if isinstance(source.wanted, Pieces):
        rows = _rows_of_piece(key, source.wanted, axis, count, like)
    elif source.wanted is not None:
        rows = _rows_of_words(key, source.wanted, axis, count, like)
        if np.any(rows < 0):
            base = None if like is None else like[key]
            if not isinstance(base, (jax.Array, np.ndarray)):
                message = (
                    f"{np.sum(rows < 0)} of its rows are not on disk, and `like` has no values to keep there"
                )
                _refuse(key, "missing", message)
    shape = (*first.shape[:axis], len(rows), *first.shape[axis + 1 :])
    spec = dataclasses.replace(first, shape=shape, chunk_shape=(), order="C")
    return Derivation(source.leaves, axis, rows, base, spec)


def _find_axis(key: str, source: Source, first: LeafSpec) -> int:
    """The axis of the rows, counted from the front."""
    rank = len(first.shape)
    axes: list[int] = []
    for asked in (source.joined, source.wanted):
        if asked is None:
            continue
        if not -rank <= asked.axis < rank:
            _refuse(key, "shape", f"shape {first.shape} on disk has no axis {asked.axis}")
        axes.append(asked.axis % rank)
    if len(set(axes)) > 1:
        _refuse(key, "shape", _MIXED_UP.format(*axes))
    return axes[0]


def _across(spec: LeafSpec, axis: int) -> Any:
    """What must be equal in leaves that lie end to end."""
    return spec.np_dtype, spec.shape[:axis], spec.shape[axis + 1 :]


def _form(spec: LeafSpec) -> str:
    return f"{spec.np_dtype} {spec.shape}"


def _rows_of_piece(key: str, pieces: Pieces, axis: int, count: int, like: Mapping[str, Any] | None) -> range:
    if len(pieces.names) == 1:
        return range(count)
    if like is None:
        _refuse(key, "shape", "is a piece, and without `like` nothing says how large")
    sizes = [_size_along(key, axis, name, like) for name in pieces.names]
    if sum(sizes) != count:
        added = " + ".join(map(str, sizes))
        _refuse(key, "shape", f"{count} rows along axis {axis} on disk, {added} = {sum(sizes)} in `like`")
    place = pieces.names.index(key)
    return range(sum(sizes[:place]), sum(sizes[: place + 1]))


def _rows_of_words(
    key: str, vocabulary: Vocabulary, axis: int, count: int, like: Mapping[str, Any] | None
) -> np.ndarray[Any, Any]:
    assert isinstance(vocabulary.old, tuple)
    if count < len(vocabulary.old):
        words = f"its old vocabulary has {len(vocabulary.old)} words"
        _refuse(key, "shape", f"{count} rows along axis {axis} on disk, but {words}")
    rows = vocabulary.rows()
    size = len(rows) if like is None else _size_along(key, axis, key, like)
    if size < len(rows):
        words = f"its new vocabulary has {len(rows)} words"
        _refuse(key, "shape", f"{size} rows along axis {axis} in `like`, but {words}")
    return np.concatenate([rows, np.full(size - len(rows), -1, np.int64)])


def _size_along(key: str, axis: int, name: str, like: Mapping[str, Any]) -> int:
    """Number of rows that a leaf of ``like`` has."""
    if name not in like:
        _refuse(key, "missing", f"the piece {name!r} is not in `like`, and nothing else says how large it is")
    shape = getattr(like[name], "shape", ())
    if len(shape) <= axis:
        _refuse(key, "shape", f"{name!r} in `like` has no axis {axis}")
    return int(shape[axis])


def _refuse(key: str, kind: str, message: str) -> NoReturn:
    raise MismatchError(message, [Problem(key, kind, message)])
