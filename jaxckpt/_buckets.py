"""How do objects get to an object store and back?

`BucketStore` is a prefix of a bucket (``s3://bucket/prefix``, ``gs://bucket/prefix``) or of this process's memory
(``memory://prefix``), through TensorStore's drivers. Beside this module only
`interop._zarrays`, which reads the arrays of others, imports tensorstore.

An object store takes an object in one request, which either happens or does not: an object is seen whole or not at
all, it is durable when the request is answered, and a request that was sent twice has the effect of one. So there is
nothing to sync, and writing again what failed is harmless. The other side of it: an object is in memory from its first
byte until it was sent (`_BucketWriter`), and a request for which no answer came may still be carried out.

There are no directories. What is asked of a directory is answered by one listing of all objects below it, which takes
a request for each thousand of them, and none for each step.

How to reach the store is in the URL, behind ``?``, under the names that TensorStore's drivers have for it, else in the
environment (`parse_url`). A request that fails is sent again a bounded number of times; then it is an `OSError` that
names the object. A connection on which nothing moves counts as failed.

Deliberately not here: locks. Object stores have none, so that nothing keeps one program from deleting what another one
reads or writes; what was deleted is missing for whoever reads it, never wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from typing import Any, final

import numpy as np

from ._errors import CheckpointError
from ._storage import Buffer, ObjectWriter, Store

# The first bytes of a manifest tell it from every other one, for its checksum is among them.
_FINGERPRINT_BYTES = 64
# Ten attempts after the first, a minute in all: longer than object stores ask to slow down, short enough to be noticed.
_RETRIES = {"max_retries": 10, "initial_delay": "250ms", "max_delay": "10s"}
# For one request with its retries, and what a slow connection takes on top of that.
_TIMEOUT_S = 300.0
# What one connection carries in the time that a store takes to answer, some 10 ms at 25 MB/s.
_GAP_BYTES_MAX = 256 << 10
_SLOWEST_BYTES_PER_S = 256 << 10
# A listing and the deletion of a prefix are many requests.
_REQUESTS_OF_A_LISTING = 20
# Seconds without a byte after which libcurl, which sends TensorStore's requests, gives a connection up. It waits for
# ever otherwise. TensorStore reads this when it sends its first request.
_STALLED_S = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "30", "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1"}

_DRIVERS = {"s3": "s3", "gs": "gcs", "memory": "memory"}
# Of each scheme: members of the driver's specification, with the types of their values.
_MEMBERS: dict[str, dict[str, type]] = {
    "s3": {
        "endpoint": str,
        "aws_region": str,
        "host_header": str,
        "requester_pays": bool,
        "use_conditional_write": bool,
    },
    "gs": {"user_project": str},
    "memory": {},
}
# Variables of the environment that the AWS tools know and TensorStore does not.
_VARIABLES = {
    "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
# Of files with credentials: members of the driver's specification; the variable that names it, and where it is else.
_CREDENTIALS_FILES = {
    "credentials_file": ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
    "config_file": ("AWS_CONFIG_FILE", "~/.aws/config"),
}
_COMMON = ("max_retries", "initial_delay", "max_delay", "request_concurrency", "timeout_s")

# What absl's status codes, with which TensorStore's messages begin, are to somebody who knows files. Only EIO means
# that bytes are lost: what could not be asked for may well be there.
_ERRNO_OF_CODE = {
    "ALREADY_EXISTS": errno.EEXIST,
    "DATA_LOSS": errno.EIO,
    "DEADLINE_EXCEEDED": errno.ETIMEDOUT,
    "NOT_FOUND": errno.ENXIO,
    "PERMISSION_DENIED": errno.EACCES,
    "RESOURCE_EXHAUSTED": errno.ENOSPC,
    "UNAUTHENTICATED": errno.EACCES,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a prefix is and how it is reached.

    Attributes:
      scheme: ``"s3"``, ``"gs"`` or ``"memory"``.
      bucket: Its name; empty in memory.
      prefix: Without a slash at its end.
      query: What stands behind ``?`` in the URL.
    """

    scheme: str
    bucket: str
    prefix: str
    query: str

    @property
    def url(self) -> str:
        """The URL that names this place."""
        prefix = re.sub("[%?#]", lambda match: urllib.parse.quote(match[0]), self.prefix)
        location = "/".join(part for part in (self.bucket, prefix) if part)
        return f"{self.scheme}://{location}" + (f"?{self.query}" if self.query else "")

    def below(self, name: str) -> Place:
        """The place below this one."""
        return dataclasses.replace(self, prefix=f"{self.prefix}/{name}" if self.prefix else name)


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """How requests are made.

    Attributes:
      members: Of the driver's specification.
      context: Resources of TensorStore's context, as pairs of name and value.
      timeout_s: Most seconds for one request with its retries, as long as it is small.
    """

    members: dict[str, Any]
    context: dict[str, Any]
    timeout_s: float


def parse_url(url: str) -> tuple[Place, Access]:
    """Takes a URL apart.

    Args:
      url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``memory://prefix``, and then, as ``?name=value&...``:
        ``endpoint``, ``aws_region``, ``host_header``, ``requester_pays``, ``use_conditional_write`` (S3) and
        ``user_project`` (Google) as members of TensorStore's drivers; ``credentials`` (``default``, ``anonymous``,
        ``environment``, ``profile``, ``imds`` or ``ecs``) and ``profile`` (S3); ``max_retries``, ``initial_delay``,
        ``max_delay`` (such as ``250ms``), ``request_concurrency``, ``timeout_s``.

    Raises:
      CheckpointError: It names no such place.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _DRIVERS:
        known = ", ".join(f"{each}://" for each in _DRIVERS)
        raise CheckpointError(f"{url!r} is no place that can be reached: URLs begin with file://, {known}")
    location, _, query = rest.partition("?")
    bucket, _, prefix = ("", "", location) if scheme == "memory" else location.partition("/")
    if not bucket and scheme != "memory":
        raise CheckpointError(f"{url!r} names no bucket: {scheme}://bucket/prefix")
    try:
        prefix = urllib.parse.unquote(prefix.strip("/"), errors="strict")
        prefix.encode()
    except UnicodeError as error:  # to be taken for another prefix, or for no text at all
        raise CheckpointError(f"{url!r}: a prefix must be UTF-8, also where % stands for bytes") from error
    place = Place(scheme, bucket, prefix, query)
    odd = [part for part in place.prefix.split("/") if part in ("", ".", "..")]
    if odd and place.prefix and scheme != "memory":
        # In the path of a request they name another object, for the client or for some servers.
        raise CheckpointError(f"{url!r}: a prefix with {odd[0]!r} between slashes cannot be reached")
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    return place, _parse_access(url, scheme, given)


def _parse_access(url: str, scheme: str, given: dict[str, str]) -> Access:
    members: dict[str, Any] = {}
    for name, kind in _MEMBERS[scheme].items():
        text = given.pop(name, None) or _from_environment(name)
        if text is not None:
            members[name] = text if kind is str else text.lower() in ("1", "true", "yes")
    context: dict[str, Any] = {"cache_pool": {"total_bytes_limit": 0}}
    try:
        timeout_s = float(given.pop("timeout_s", _TIMEOUT_S))
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a number of seconds, not {timeout_s}")
        retries = {name: given.pop(name, default) for name, default in _RETRIES.items()}
        retries["max_retries"] = int(retries["max_retries"])
        concurrency = given.pop("request_concurrency", None)
        driver = _DRIVERS[scheme]
        if driver != "memory":
            context[f"{driver}_request_retries"] = retries
        if driver != "memory" and concurrency is not None:
            context[f"{driver}_request_concurrency"] = {"limit": int(concurrency)}
    except ValueError as error:
        raise CheckpointError(f"{url!r}: {error}") from error
    if scheme == "s3":
        # The default asks one source after the other, and complains of each that is not there.
        usual = "environment" if os.environ.get("AWS_ACCESS_KEY_ID") else "default"
        profile = given.pop("profile", None)
        credentials = {"type": given.pop("credentials", "profile" if profile else usual)}
        if credentials["type"] == "profile":
            # TensorStore does not look for them where the AWS tools do.
            credentials |= {member: _credentials_file(*entry) for member, entry in _CREDENTIALS_FILES.items()}
        context["aws_credentials"] = credentials | ({"profile": profile} if profile else {})
    if scheme == "gs" and "user_project" in members:
        context["gcs_user_project"] = {"project_id": members.pop("user_project")}
    if given:
        names = [*_MEMBERS[scheme], *(("credentials", "profile") if scheme == "s3" else ()), *_COMMON]
        unknown = ", ".join(map(repr, given))
        raise CheckpointError(f"{url!r}: {unknown} is no option of {scheme}://, which has {', '.join(names)}")
    return Access(members, context, timeout_s)


def _credentials_file(variable: str, usual: str) -> str:
    return os.environ.get(variable) or os.path.expanduser(usual)


def _from_environment(member: str) -> str | None:
    return next((os.environ[name] for name in _VARIABLES.get(member, ()) if os.environ.get(name)), None)


def describe_url(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What TensorStore must be told to open arrays below a URL: a specification, and the resources of a context.

    Raises:
      CheckpointError: It names no place that can be reached.
    """
    place, access = parse_url(url)
    _bound_stalls()
    spec = {
        "driver": _DRIVERS[place.scheme],
        "path": f"{place.prefix}/" if place.prefix else "",
        **access.members,
    }
    return {**spec, **({"bucket": place.bucket} if place.bucket else {})}, access.context


def _bound_stalls() -> None:
    for name, value in _STALLED_S.items():
        os.environ.setdefault(name, value)


def _open_root(place: Place, access: Access) -> Any:
    """TensorStore's view of a bucket."""
    _bound_stalls()
    variables = tuple(sorted(entry for entry in os.environ.items() if entry[0].startswith("AWS_")))
    description = json.dumps([_DRIVERS[place.scheme], place.bucket, access.members, access.context])
    try:
        return _open_described_root(description, variables)
    except ValueError as error:
        raise CheckpointError(f"{place.url!r} is no place that can be reached: {error}") from error


@functools.lru_cache(maxsize=64)
def _open_described_root(description: str, variables: tuple[tuple[str, str], ...]) -> Any:
    """As `_open_root`. One for all stores of a bucket, which share its connections and credentials."""
    import tensorstore as ts

    del variables  # they only tell one from another
    driver, bucket, members, context = json.loads(description)
    spec = {"driver": driver, "path": "", **members, **({"bucket": bucket} if bucket else {})}
    return ts.KvStore.open(
        spec, context=memory_context() if driver == "memory" else ts.Context(context)
    ).result()


@functools.cache
def memory_context() -> Any:
    """TensorStore keeps ``memory://`` objects in a context; one for the process, so that they outlive a call."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": 0}})


def open_bucket(url: str) -> BucketStore:
    """The store at a URL; see `parse_url`. Sends no request.

    Raises:
      CheckpointError: It names no place that can be reached.
    """
    place, access = parse_url(url)
    return BucketStore(place, _open_root(place, access), access.timeout_s)


@final
class BucketStore(Store):
    """A prefix of an object store."""

    is_remote = True
    gap_bytes_max = _GAP_BYTES_MAX

    def __init__(self, place: Place, root: Any, timeout_s: float) -> None:
        """The store of a place; see `open_bucket`.

        Args:
          place: Where.
          root: TensorStore's view of the bucket.
          timeout_s: As in `Access`.
        """
        self._root = root
        self._place = place
        self._timeout_s = timeout_s
        self._prefix = f"{place.prefix}/" if place.prefix else ""
        self.path = place.url

    @property
    def name(self) -> str:
        return self._place.prefix.rpartition("/")[2]

    def create(self, name: str, length: int) -> ObjectWriter:
        return _BucketWriter(self, name, length)

    def put(self, name: str, data: bytes) -> None:
        with self._plain_errors(name):
            done = self._root.write(self._prefix + name, data).result(timeout=self._patience_s(len(data)))
        if not done.generation:  # 412, which is for requests with a condition, is no error to TensorStore
            raise OSError(errno.ECONNABORTED, "the store has not taken the object", self._name_of(name))

    def sync(self) -> None:
        """Nothing to do: an object store acknowledges a write when it is durable."""

    def publish(self, name: str, data: bytes) -> None:
        self.put(name, data)

    def publish_next(self, name: str, data: bytes, *, may_replace: bool = True) -> None:
        key, patience_s = self._prefix + name, self._patience_s(len(data))
        with self._plain_errors(name):
            # Only in the place of what is there at this moment: so the store refuses a request that comes too late.
            before = self._root.read(key, byte_range=slice(0, 0)).result(timeout=self._timeout_s)
            if before.state == "value" and not may_replace:
                raise FileExistsError(errno.EEXIST, "it is there already", self._name_of(name))
            after = self._root.write(key, data, if_equal=before.stamp.generation).result(timeout=patience_s)
        # A request that was sent again, for want of an answer, may have been refused for its own success.
        if not after.generation and self._value(name, None) != data:
            raise OSError(errno.EBUSY, "somebody else has committed here meanwhile", self._name_of(name))

    def has_length(self, name: str, length: int) -> bool:
        if length == 0:
            return self._value(name, slice(0, 1)) is None
        # Two bytes where only one should be: the answer says how many there are, or one more request does.
        beyond, size = self._answer(name, slice(length - 1, length + 1))
        if beyond is not None:
            return False
        return (
            size == length if size is not None else self._value(name, slice(length - 1, length)) is not None
        )

    def read(self, name: str, bytes_max: int) -> bytes:
        value = self._value(name, None)
        assert value is not None
        return value

    def exists(self, name: str) -> bool:
        try:
            return self._value(name, slice(0, 0)) is not None
        except FileNotFoundError:
            return False

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        value = self._value(name, slice(offset, offset + len(buffer)))
        if value is None:
            return 0
        buffer[: len(value)] = np.frombuffer(value, np.uint8)
        return len(value)

    def delete_tree(self, name: str) -> None:
        import tensorstore as ts

        first, last = self._prefix + f"{name}/", self._prefix + f"{name}0"
        with self._plain_errors(name):
            deleted = self._root.delete_range(ts.KvStore.KeyRange(first, last))
            deleted.result(timeout=_REQUESTS_OF_A_LISTING * self._timeout_s)

    def _listing(self) -> list[str]:
        """The names of all objects, however deep."""
        import tensorstore as ts

        last = self._prefix[:-1] + "0" if self._prefix else ""
        with self._plain_errors(""):
            listed = self._root.list(
                ts.KvStore.KeyRange(self._prefix, last), strip_prefix_length=len(self._prefix.encode())
            )
            keys = listed.result(timeout=_REQUESTS_OF_A_LISTING * self._timeout_s)
        return [key.decode(errors="surrogateescape") for key in keys]

    def names(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._listing()})

    def names_below(self) -> dict[str, list[str]]:
        below: dict[str, set[str]] = {}
        for name in self._listing():
            child, separator, rest = name.partition("/")
            inside = below.setdefault(child, set())
            if separator:
                inside.add(rest.partition("/")[0])
        return {child: sorted(names) for child, names in sorted(below.items())}

    def fingerprints(self, name: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
        # Whoever replaces a checkpoint gives it a new directory of data, so that the names of a child's directories
        # tell its manifests from one another, but for the moment in which the old data are still there.
        directories: dict[str, set[str]] = {}
        found: set[str] = set()
        for path in self._listing():
            child, _, rest = path.partition("/")
            if not is_wanted(child):
                continue
            inside, separator, _ = rest.partition("/")
            directories.setdefault(child, set())
            if separator:
                directories[child].add(inside)
            elif inside == name:
                found.add(child)
        for child, inside in sorted(directories.items()):
            yield child, self._listed_fingerprint(f"{child}/{name}", inside) if child in found else None

    def _listed_fingerprint(self, name: str, directories: set[str]) -> Any:
        """The name of the one directory beside an object, or more than a listing says."""
        return next(iter(directories)) if len(directories) == 1 else (*directories, self.fingerprint(name))

    def delete(self, name: str) -> None:
        with self._plain_errors(name):
            self._root.write(self._prefix + name, None).result(timeout=self._timeout_s)

    def child(self, name: str) -> BucketStore:
        return BucketStore(self._place.below(name), self._root, self._timeout_s)

    def fingerprint(self, name: str) -> Any:
        try:
            return self._value(name, slice(0, _FINGERPRINT_BYTES)) or b"shorter than that"
        except FileNotFoundError:
            return None

    def confirm(self) -> None:
        """Nothing to do: what can be read is durable."""

    def remove_if_empty(self) -> None:
        """Nothing to do: a prefix without objects is not there."""

    def make_directory(self, name: str) -> None:
        """Nothing to do: a prefix is there when an object is."""

    def _patience_s(self, nbytes: int) -> float:
        return self._timeout_s + nbytes / _SLOWEST_BYTES_PER_S

    def _value(self, name: str, byte_range: slice | None) -> bytes | None:
        """Bytes of an object, or None when it does not have that range."""
        return self._answer(name, byte_range)[0]

    def _answer(self, name: str, byte_range: slice | None) -> tuple[bytes | None, int | None]:
        """As `_value`, and how long the object is, where the answer says that instead."""
        nbytes = 0 if byte_range is None else byte_range.stop - byte_range.start
        try:
            with self._plain_errors(name):
                reading = self._root.read(self._prefix + name, byte_range=byte_range)
                result = reading.result(timeout=self._patience_s(nbytes))
        except OSError as error:
            if byte_range is None or not str(error.strerror).startswith("OUT_OF_RANGE"):
                raise
            size = re.search(r"total size (\d+)", str(error.strerror))
            return None, int(size[1]) if size else None
        if result.state == "missing":
            raise FileNotFoundError(errno.ENOENT, "no such object", self._name_of(name))
        if result.state != "value":
            what = "the answer says that nothing has changed, which was not asked"
            raise OSError(errno.ECONNABORTED, what, self._name_of(name))
        return result.value, None

    def _name_of(self, name: str) -> str:
        return self._place.below(name).url if name else self.path

    @contextlib.contextmanager
    def _plain_errors(self, name: str) -> Generator[None]:
        """TensorStore reports everything as ValueError, but for what a server does not do; callers know OSError."""
        try:
            yield
        except (ValueError, NotImplementedError) as error:
            code = re.match("[A-Z_]+(?=: )", str(error))
            number = _ERRNO_OF_CODE.get(code[0] if code else "", errno.ECONNABORTED)
            reason = _first_line(str(error))
            if number == errno.ENXIO:  # of an object that is missing TensorStore says so without an error
                reason = f"there is no such bucket ({reason})"
            raise OSError(number, reason, self._name_of(name)) from error
        except TimeoutError as error:
            what = "there was no answer in time (timeout_s= in the URL says how long that is)"
            raise OSError(errno.ETIMEDOUT, what, self._name_of(name)) from error


def _first_line(message: str) -> str:
    """A message without the answer's whole text and the specifications that TensorStore adds in brackets."""
    return re.sub(r"\s*\[[a-z_-]+='.*", "", message, flags=re.DOTALL)


@final
class _BucketWriter(ObjectWriter):
    """Collects an object, which object stores take in one request."""

    def __init__(self, store: BucketStore, name: str, length: int) -> None:
        self._store = store
        self._name = name
        self._length = length
        # Takes memory only where it is written.
        self._buffer: Buffer = np.empty(length, np.uint8)
        self._whole: bytes | None = None

    def write(self, offset: int, data: Buffer) -> None:
        if len(data) == self._length:  # nothing to collect
            self._whole = data.tobytes()
        else:
            self._buffer[offset : offset + len(data)] = data

    def finish(self) -> None:
        data = self._buffer.tobytes() if self._whole is None else self._whole
        self.abandon()  # what is sent is enough to be in memory
        self._store.put(self._name, data)

    def abandon(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self._whole = None
