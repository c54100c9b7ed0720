"""What if processes of a group have different values in leaves that each has for itself?

NumPy arrays, Python numbers and arrays on a process's own devices are in every process's tree, and mostly equal: a step
counter, a learning rate. Process 0 writes them, as the one copy of the checkpoint. But some differ on purpose, such as
a random key for each process. Saving one and giving it back to all would be a silent loss. So:

1. `OwnLeaves` takes the values on the caller's thread: small copies, since the tree may change afterwards.
2. Digests of them travel. Where all are equal, which is nearly always, nothing more happens.
3. A process whose leaf has another value than process 0's keeps its own, in an object of its own, ``own/<process>``.
4. A restore in a process with that index gives it back; everybody else gets the value of process 0.

Copies are bounded. A leaf beyond the bound is compared, for which the caller waits, but not kept: if it differs, the
save fails and says so.

Deliberately not here: arrays that span processes, of which there is one value by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import jax
import msgpack
import numpy as np
import xxhash

from ._errors import CorruptError, Problem, UnsupportedLeafError
from ._leaves import Kinds, Leaves, StreamedArray
from ._manifest import Manifest
from ._values import decode_value, unpack

# Bytes of copies that a process takes, over all its own leaves: enough for keys, counters and tables.
OWN_BYTES_MAX = 32 << 20

_DIGEST_BYTES = 16


@final
class OwnLeaves:
    """The leaves that this process has for itself, with their values of this moment."""

    def __init__(self, keys: Sequence[str], leaves: Leaves) -> None:
        self._keys = keys
        self._numbers: list[int] = []
        # Records of values, copies of arrays, or the digest of what is too large to copy.
        self._values: list[Any] = []
        kept = _smallest_leaves(leaves.kinds)
        on_devices: list[tuple[int, jax.Array]] = []
        for number, (extent, data) in enumerate(zip(leaves.kinds.extents, leaves.arrays, strict=True)):
            if extent is not None and extent.shards is not None:
                continue
            self._numbers.append(number)
            if data is None:
                self._values.append(leaves.values[number])
                continue
            assert not isinstance(data, StreamedArray)  # a conversion is the work of one process
            is_kept = number in kept
            if isinstance(data, np.ndarray):
                self._values.append(_stored_bytes(data) if is_kept else _digest_of(data))
            elif is_kept:
                on_devices.append((len(self._values), data))
                self._values.append(None)
            else:
                self._values.append(_digest_on_device(data))
        arrays = [array for _, array in on_devices]
        # Disposable copies, made by one call that waits for nothing; their values are read in the background.
        copies = (
            jax.device_put(arrays, [array.sharding for array in arrays], may_alias=False) if arrays else []
        )
        for (place, _), copy in zip(on_devices, copies, strict=True):
            self._values[place] = copy

    def digests(self) -> bytes:
        """A digest of each value, side by side; waits for those on devices."""
        self._values = [
            _stored_bytes(value) if isinstance(value, jax.Array) else value for value in self._values
        ]
        return b"".join(map(_digest_of, self._values))

    def encode_different(self, theirs: bytes) -> bytes | None:
        """The bytes that hold the values which differ from process 0's, or None.

        Args:
          theirs: What `digests` says there.

        Raises:
          UnsupportedLeafError: Some of them are too large to be kept.
        """
        mine = self.digests()
        different = [
            at // _DIGEST_BYTES
            for at in range(0, len(mine), _DIGEST_BYTES)
            if mine[at : at + _DIGEST_BYTES] != theirs[at : at + _DIGEST_BYTES]
        ]
        problems = [
            Problem(
                self._keys[self._numbers[place]],
                "leaf",
                "has another value here than in process 0, and is too large: what a process has for itself is kept, the"
                f" smallest leaves first, up to {OWN_BYTES_MAX} bytes; make it an array that spans the processes",
            )
            for place in different
            if isinstance(self._values[place], _Digest)
        ]
        if problems:
            raise UnsupportedLeafError(str(problems[0]), problems)
        if not different:
            return None
        entries = [[self._numbers[place], self._values[place]] for place in different]
        return bytes(msgpack.packb(entries, unicode_errors="surrogatepass") or b"")


def _smallest_leaves(kinds: Kinds) -> set[int]:
    """Numbers of the own leaves whose bytes can be copied within the bound: a large one takes no room from others."""
    sizes: list[tuple[int, int]] = []
    for number, template in enumerate(kinds.templates):
        if template.extent is not None and template.extent.shards is None:
            sizes.append((template.spec.nbytes, number))
    kept: set[int] = set()
    room = OWN_BYTES_MAX
    for nbytes, number in sorted(sizes):
        room -= nbytes
        if room < 0:
            break
        kept.add(number)
    return kept


class _Digest(bytes):
    """Stands for a value that was not copied."""


def _stored_bytes(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def _digest_of(value: Any) -> _Digest:
    if isinstance(value, _Digest):
        return value
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    elif not isinstance(value, bytes):
        value = bytes(msgpack.packb(value, unicode_errors="surrogatepass") or b"")
    return _Digest(xxhash.xxh3_128_digest(value))


def _digest_on_device(array: jax.Array) -> _Digest:
    """Of copies of some rows at a time, for jax keeps whatever it has once shown of an array. Waits for its values."""
    rows = max(1, array.shape[0] * OWN_BYTES_MAX // array.nbytes)
    digest = xxhash.xxh3_128()
    for start in range(0, array.shape[0], rows):
        # Near the end it takes some rows twice, rather than being compiled for fewer.
        digest.update(_stored_bytes(jax.lax.dynamic_slice_in_dim(array, start, rows)))
    return _Digest(digest.digest())


def decode_own_leaves(data: bytes, manifest: Manifest, name: str) -> dict[int, Any]:
    """By the number of the leaf: the record of a value, or the bytes of an array.

    Raises:
      CorruptError: They are not what the leaves need.
    """
    own: dict[int, Any] = {}
    try:
        for leaf, value in unpack(data):
            spec = manifest.spec(leaf)
            if type(leaf) is not int or leaf < 0:
                raise ValueError("a bad number of a leaf")
            if spec.kind == "value":
                decode_value(value)
            elif not isinstance(value, bytes) or len(value) != spec.nbytes:
                raise ValueError("a leaf of the wrong length")
            own[leaf] = value
    except Exception as error:  # hostile data can make Python raise almost anything
        message = f"object {name}: it is malformed: {type(error).__name__}: {str(error)[:200]}"
        problem = Problem(None, "object", message)
        raise CorruptError(f"cannot read the checkpoint: {problem}", [problem]) from error
    return own
