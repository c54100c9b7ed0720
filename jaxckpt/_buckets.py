"""How do objects get to an object store and back?"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Generator
from typing import Any, final

import numpy as np

from ._errors import CheckpointError
from ._storage import Buffer, ObjectWriter, Store

# The first bytes of a manifest tell it from every other one, for its checksum is among them.
_FINGERPRINT_BYTES = 64


@functools.cache
def memory_context() -> Any:
    """TensorStore keeps ``memory://`` objects in a context; one for the process, so that they outlive a call."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


@final
class BucketStore(Store):
    """A prefix of an object store, through TensorStore's key-value interface."""

    def __init__(self, url: str) -> None:
        import tensorstore as ts

        self.path = url.rstrip("/")
        # A context of its own for each store: a shared one pins what was written through it.
        context = (
            memory_context()
            if url.startswith("memory://")
            else ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        )
        try:
            self._store = ts.KvStore.open(self.path + "/", context=context).result()
        except ValueError as error:
            raise CheckpointError(f"{url!r} is no place that TensorStore can reach: {error}") from error

    def create(self, name: str, length: int) -> ObjectWriter:
        return _BucketWriter(self, name, length)

    def put(self, name: str, data: bytes) -> None:
        with self._plain_errors(name):
            self._store.write(name, data).result()

    def sync(self) -> None:
        """Nothing to do: an object store acknowledges a write when it is durable."""

    def publish(self, name: str, data: bytes) -> None:
        self.put(name, data)

    def has_length(self, name: str, length: int) -> bool:
        # The interface has no "stat": the last byte must be there, and none after it.
        has_last = length == 0 or self._value(name, slice(length - 1, length)) is not None
        return has_last and self._value(name, slice(length, length + 1)) is None

    def read(self, name: str, bytes_max: int) -> bytes:
        value = self._value(name, None)
        assert value is not None
        return value

    def exists(self, name: str) -> bool:
        try:
            self.read(name, 0)
        except FileNotFoundError:
            return False
        return True

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        value = self._value(name, slice(offset, offset + len(buffer)))
        if value is None:
            return 0
        buffer[: len(value)] = np.frombuffer(value, np.uint8)
        return len(value)

    def delete_tree(self, name: str) -> None:
        import tensorstore as ts

        with self._plain_errors(name):
            self._store.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result()

    def names(self) -> list[str]:
        with self._plain_errors(""):
            keys = self._store.list().result()
        return sorted({key.decode(errors="surrogateescape").partition("/")[0] for key in keys})

    def delete(self, name: str) -> None:
        with self._plain_errors(name):
            self._store.write(name, None).result()

    def child(self, name: str) -> BucketStore:
        return BucketStore(f"{self.path}/{name}")

    def fingerprint(self, name: str) -> Any:
        try:
            return self._value(name, slice(0, _FINGERPRINT_BYTES))
        except FileNotFoundError:
            return None

    def confirm(self) -> None:
        """Nothing to do: what can be read is durable."""

    def remove_if_empty(self) -> None:
        """Nothing to do: a prefix without objects is not there."""

    def make_directory(self, name: str) -> None:
        """Nothing to do: a prefix is there when an object is."""

    def _value(self, name: str, byte_range: slice | None) -> bytes | None:
        """Bytes of an object, or None when it does not have that range."""
        try:
            with self._plain_errors(name):
                result = self._store.read(name, byte_range=byte_range).result()
        except OSError as error:
            if "OUT_OF_RANGE" in str(error):
                return None
            raise
        if result.state != "value":
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self.path}/{name}")
        return bytes(result.value)

    @contextlib.contextmanager
    def _plain_errors(self, name: str) -> Generator[None]:
        """TensorStore reports everything as ValueError; callers know OSError."""
        try:
            yield
        except ValueError as error:
            raise OSError(errno.EIO, str(error), f"{self.path}/{name}") from error


@final
class _BucketWriter(ObjectWriter):
    """Collects an object, which object stores take in one request."""

    def __init__(self, store: BucketStore, name: str, length: int) -> None:
        self._store = store
        self._name = name
        self._buffer = np.empty(length, np.uint8)

    def write(self, offset: int, data: Buffer) -> None:
        self._buffer[offset : offset + len(data)] = data

    def finish(self) -> None:
        self._store.put(self._name, self._buffer.tobytes())
        self.abandon()

    def abandon(self) -> None:
        self._buffer = np.empty(0, np.uint8)
