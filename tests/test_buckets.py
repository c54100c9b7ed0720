"""Object stores without a server: URLs and their options, what is listed, how large objects get, what errors say."""

from __future__ import annotations

import collections
import errno
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt._buckets import BucketStore, open_bucket, parse_url
from jaxckpt._commit import begin
from jaxckpt._config import MIB
from jaxckpt._encoding import parse_manifest
from jaxckpt._layout import OBJECT_BYTES_MAX, LeafExtent, cut_shard, is_divisible
from jaxckpt._manifest import MANIFEST_NAME
from jaxckpt._store import open_store
from jaxckpt._zarr import METADATA_NAME

from .helpers import assert_same_tree

GIB = 1 << 30


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"memory://test_buckets/{request.node.name}"


def small_tree(value: int = 0) -> dict[str, Any]:
    return {"w": np.full((4, 4), value, np.float32), "n": value}


# --- URLs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
    ):
        monkeypatch.delenv(name, raising=False)


def test_a_url_says_where_and_how(
    no_aws: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/secrets")
    monkeypatch.setenv("HOME", str(tmp_path))
    place, access = parse_url(
        "s3://bucket/a/run?endpoint=http://127.0.0.1:9000&aws_region=eu-west-1&requester_pays=true&max_retries=2"
        "&initial_delay=1ms&max_delay=3ms&request_concurrency=7&timeout_s=9&profile=me"
    )
    assert (place.scheme, place.bucket, place.prefix) == ("s3", "bucket", "a/run")
    assert access.members == {
        "endpoint": "http://127.0.0.1:9000",
        "aws_region": "eu-west-1",
        "requester_pays": True,
    }
    assert access.timeout_s == 9
    assert access.context == {
        "cache_pool": {"total_bytes_limit": 0},
        "s3_request_retries": {"max_retries": 2, "initial_delay": "1ms", "max_delay": "3ms"},
        "s3_request_concurrency": {"limit": 7},
        "aws_credentials": {
            "type": "profile",
            "profile": "me",
            "credentials_file": "/secrets",
            "config_file": str(tmp_path / ".aws" / "config"),
        },
    }


def test_what_a_url_leaves_open_is_in_the_environment(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_url("s3://b/a")[1].members == {}
    monkeypatch.setenv("AWS_DEFAULT_REGION", "r1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
    assert parse_url("s3://b/a")[1].members == {"aws_region": "r1", "endpoint": "http://one"}
    monkeypatch.setenv("AWS_REGION", "r2")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two")
    assert parse_url("s3://b/a")[1].members == {"aws_region": "r2", "endpoint": "http://two"}
    assert parse_url("s3://b/a?endpoint=http://three")[1].members["endpoint"] == "http://three"


def test_credentials_in_the_environment_are_the_first_choice(
    no_aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse_url("s3://b/a")[1].context["aws_credentials"] == {"type": "default"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    assert parse_url("s3://b/a")[1].context["aws_credentials"] == {"type": "environment"}
    assert parse_url("s3://b/a?credentials=anonymous")[1].context["aws_credentials"] == {"type": "anonymous"}


def test_retries_are_bounded_unless_somebody_says_otherwise() -> None:
    assert parse_url("s3://b/a")[1].context["s3_request_retries"]["max_retries"] == 10
    assert parse_url("gs://b/a")[1].context["gcs_request_retries"]["max_retries"] == 10


def test_who_pays_is_a_resource_of_google(no_aws: None) -> None:
    _, access = parse_url("gs://bucket/a?user_project=mine")
    assert access.members == {}
    assert access.context["gcs_user_project"] == {"project_id": "mine"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("s3://bucket/a?aws_regoin=x", "'aws_regoin' is no option of s3://"),
        ("gs://bucket/a?endpoint=http://x", "'endpoint' is no option of gs://"),
        ("memory://a?profile=x", "'profile' is no option of memory://"),
        ("s3://bucket/a?max_retries=many", "many"),
        ("s3:///a", "names no bucket"),
        ("ftp://host/a", "URLs begin with"),
        ("gs://B/a", "no place that can be reached"),
    ],
)
def test_a_wrong_url_is_refused_at_once(wrong: str, says: str) -> None:
    with pytest.raises(jaxckpt.CheckpointError, match=says):
        jaxckpt.open(wrong)


def test_a_url_that_became_a_path_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(jaxckpt.CheckpointError, match=r"pass 's3://\.\.\.' as text"):
        jaxckpt.save(pathlib.Path("s3://bucket/run"), small_tree())


@pytest.mark.parametrize("use", [jaxckpt.open, jaxckpt.restore, jaxckpt.verify, jaxckpt.CheckpointManager])
def test_an_empty_path_is_not_the_working_directory(use: Callable[[str], Any]) -> None:
    with pytest.raises(jaxckpt.CheckpointError, match="is empty"):
        jaxckpt.save("", small_tree())
    with pytest.raises(jaxckpt.CheckpointError, match="is empty"):
        use("")


@pytest.mark.parametrize("name", ["plain", "a b", "100%", "50%25", "q?x=1", "h#1", "é~+'&<>", "run/"])
def test_the_path_of_a_store_leads_to_it_again(name: str) -> None:
    child = open_store("memory://test_buckets/paths").child(name.rstrip("/"))
    child.put("object", b"here")
    again = open_store(child.path)
    assert again.read("object", 10) == b"here"
    assert again.path == child.path
    assert again.name == name.rstrip("/")


def test_a_query_belongs_to_every_path_below(url: str) -> None:
    jaxckpt.save(f"{url}/run/step_5?timeout_s=7", small_tree())
    manager = jaxckpt.CheckpointManager(f"{url}/run?timeout_s=7")
    assert manager.steps() == [5]
    info = manager.save(6, small_tree(6)).wait()
    assert info.path.endswith("/run/step_00000006?timeout_s=7")
    assert_same_tree(jaxckpt.restore(info.path), small_tree(6))


# --- listing --------------------------------------------------------------------------------------------------


class CountingRoot:
    """TensorStore's view of a bucket, which counts what is asked of it."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self.calls: collections.Counter[str] = collections.Counter()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._root, name)


def counting_store(url: str) -> tuple[BucketStore, collections.Counter[str]]:
    store = open_bucket(url)
    root = CountingRoot(store._root)
    return BucketStore(store._place, root, store._timeout_s), root.calls


@pytest.mark.parametrize("count", [1, 7])
def test_steps_are_one_listing(url: str, count: int) -> None:
    for step in range(count):
        jaxckpt.save(f"{url}/step_{step:08d}", small_tree(step))
    store, calls = counting_store(url)
    manager = jaxckpt.CheckpointManager(store)
    assert manager.steps() == list(range(count))
    assert manager.latest_step() == count - 1
    assert calls == {"list": 2}


def test_records_of_a_new_manager_come_from_the_listing_and_one_object(url: str) -> None:
    manager = jaxckpt.CheckpointManager(url, max_to_keep=None)
    for step in range(5):
        manager.save(step, small_tree(step), metrics={"loss": -step})
    manager.close()
    store, calls = counting_store(url)
    assert jaxckpt.CheckpointManager(store, best=jaxckpt.Best("loss")).best_step() == 4
    assert calls == {"list": 1, "read": 1}


def test_a_step_is_deleted_without_a_listing_of_the_others(url: str) -> None:
    with jaxckpt.CheckpointManager(url, max_to_keep=None) as manager:
        for step in range(9):
            manager.save(step, small_tree(step))
    listings: dict[int, int] = {}
    for kept in (8, 2):
        store, calls = counting_store(url)
        deleted = jaxckpt.CheckpointManager(store, max_to_keep=kept).prune()
        # Of each step that is deleted: what else is in it.
        listings[len(deleted)] = calls["list"] - len(deleted)
    assert listings[6] == listings[1]
    jaxckpt.save(f"{url}/step_8", small_tree(9))
    assert jaxckpt.CheckpointManager(url, max_to_keep=1, pinned=[7]).prune() == []
    manager.steps()
    manager.delete(8)  # under both of its names
    assert jaxckpt.CheckpointManager(url).steps() == [7]


def test_a_step_that_was_replaced_is_not_taken_for_the_one_in_the_cache(url: str) -> None:
    manager = jaxckpt.CheckpointManager(url)
    for step, loss in ((1, 0.5), (2, 0.7)):
        manager.save(step, small_tree(step), metrics={"loss": loss})
    manager.close()
    other = jaxckpt.CheckpointManager(f"{url}/elsewhere")
    other.save(1, small_tree(9), metrics={"loss": 0.9})
    other.close()
    # As a program that knows nothing of the cache puts another checkpoint there.
    source, target = open_store(f"{url}/elsewhere/step_00000001"), open_store(f"{url}/step_00000001")
    for name in target.names():
        target.delete_tree(name)
        target.delete(name)
    for name in source._listing():  # type: ignore[attr-defined]
        target.put(name, source.read(name, MIB))
    assert jaxckpt.CheckpointManager(url, best=jaxckpt.Best("loss")).best_step() == 2


def test_only_steps_with_more_than_one_directory_of_data_are_swept(url: str) -> None:
    first = jaxckpt.CheckpointManager(url)
    for step in (1, 2, 3):
        first.save(step, small_tree(step))
    first.close()
    store = open_store(url)
    store.put("step_00000002/data-0123456789abcdef/zarr.json", b"{}")
    store.put("step_00000009/data-0123456789abcdef/zarr.json", b"{}")
    second = jaxckpt.CheckpointManager(url)
    second.save(4, small_tree(4))
    second.close()
    names = store.names_below()
    assert "step_00000009" not in names
    assert sum(name.startswith("data-") for name in names["step_00000002"]) == 1
    assert second.steps() == [1, 2, 3, 4]


def test_a_pin_is_seen_and_kept(url: str) -> None:
    manager = jaxckpt.CheckpointManager(url, max_to_keep=1)
    manager.save(1, small_tree(1)).wait()
    manager.pin(1)
    for step in (2, 3):
        manager.save(step, small_tree(step))
    manager.close()
    assert manager.steps() == [1, 3]


# --- a save that somebody swept -------------------------------------------------------------------------------


def _manifest_of(url: str) -> bytes:
    jaxckpt.save(url, small_tree())
    return open_store(url).read(MANIFEST_NAME, MIB)


def test_a_save_whose_data_were_swept_commits_nothing(url: str) -> None:
    manifest = parse_manifest(_manifest_of(f"{url}/other"), url)
    store = open_store(f"{url}/here")
    attempt = begin(store, may_overwrite=False)
    attempt.put_metadata(METADATA_NAME, b"{}")
    store.delete_tree(attempt.data)
    with pytest.raises(FileNotFoundError, match="somebody deleted what this save wrote"):
        attempt.commit(manifest)
    assert store.names() == []


# --- how large objects are ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "itemsize"),
    [
        ((5 * GIB,), 1),
        ((3 * GIB,), 2),
        ((50257, 131072), 4),  # a prime number of rows
        ((1, 6 * GIB), 1),
        ((7, 1, 3 * GIB), 2),
        ((2**16, 2**17), 8),
    ],
)
@pytest.mark.parametrize("chunk_bytes_max", [64 * MIB, 1, 100 * GIB])
def test_no_chunk_is_larger_than_an_object_may_be(
    shape: tuple[int, ...], itemsize: int, chunk_bytes_max: int
) -> None:
    if chunk_bytes_max == 1:
        shape = tuple(size for size in shape if size <= 2**17)
    chunk = cut_shard(shape, itemsize, chunk_bytes_max)
    assert np.prod(chunk, dtype=np.int64) * itemsize <= OBJECT_BYTES_MAX < 4 * GIB
    assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    prime = 4 * GIB + 15
    extent = LeafExtent((prime,), 1, (prime,), (((0,), 0),))
    assert not is_divisible(extent, 64 * MIB)
    assert is_divisible(LeafExtent((50257, 131072), 4, (50257, 131072), (((0, 0), 0),)), 64 * MIB)
    # Memory that nobody touches.
    tree = {"fine": np.zeros(3, np.int8), "prime": np.empty(prime, np.int8)}
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="larger than an object may be") as caught:
        jaxckpt.save("memory://test_buckets/prime", tree)
    assert [problem.key for problem in caught.value.problems] == ["prime"]


def test_objects_are_small_where_memory_is(url: str) -> None:
    tree = {
        "large": jnp.arange(8 * MIB, dtype=jnp.float32),
        "small": [jnp.full(1000, i) for i in range(2000)],
    }
    options = jaxckpt.SaveOptions(host_bytes_max=128 * MIB)
    jaxckpt.save(url, tree, options=options)
    store = open_bucket(url)
    lengths = [len(store.read(name, GIB)) for name in store._listing()]
    # Half of the memory is for 16 objects, each of them twice.
    assert max(lengths) <= 2 * MIB
    assert sum(lengths) > 36 * MIB
    assert_same_tree(jaxckpt.restore(url), tree)


# --- errors ---------------------------------------------------------------------------------------------------


class FailingRoot:
    """TensorStore's view of a bucket that refuses everything in one way."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _fail(self, *arguments: Any, **keywords: Any) -> Any:
        raise self._error

    read = write = list = delete_range = _fail


@pytest.mark.parametrize(
    ("error", "number", "says"),
    [
        (
            ValueError("ABORTED: All 3 attempts failed [curl_code='7']"),
            errno.ECONNABORTED,
            "All 3 attempts failed",
        ),
        (ValueError("PERMISSION_DENIED: no [x='1']"), errno.EACCES, "no"),
        (ValueError("NOT_FOUND: NoSuchBucket"), errno.ENXIO, "there is no such bucket"),
        (ValueError("odd"), errno.ECONNABORTED, "odd"),
        (TimeoutError(), errno.ETIMEDOUT, "no answer in time"),
    ],
)
def test_a_failed_request_names_the_object_and_the_reason(error: Exception, number: int, says: str) -> None:
    place, access = parse_url("memory://run")
    store = BucketStore(place, FailingRoot(error), access.timeout_s)
    for call in (
        lambda: store.put("a/b", b""),
        lambda: store.read("a/b", 1),
        lambda: store.delete("a/b"),
        lambda: store.delete_tree("a/b"),
        lambda: store.exists("a/b"),
        lambda: store.has_length("a/b", 3),
    ):
        with pytest.raises(OSError, match=says) as caught:
            call()
        assert caught.value.errno == number
        assert caught.value.filename == "memory://run/a/b"
        assert "[" not in str(caught.value.strerror)
    with pytest.raises(OSError, match=says):
        store.names()


def test_what_cannot_be_read_now_is_not_called_damaged(url: str) -> None:
    jaxckpt.save(f"{url}/step_00000001", small_tree())
    store = open_bucket(url)
    refusing = BucketStore(store._place, FailingRoot(ValueError("ABORTED: again")), 1.0)
    with pytest.raises(OSError, match="again"):
        jaxckpt.CheckpointManager(refusing).restore()


class RootWithoutPacks:
    """TensorStore's view of a bucket of which the packs cannot be reached."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root, name)

    def read(self, key: str, **keywords: Any) -> Any:
        if "/packs/" in key:
            raise ValueError("ABORTED: All 10 retry attempts failed")
        return self._root.read(key, **keywords)


def test_a_restore_that_storage_fails_does_not_call_the_checkpoint_damaged(url: str) -> None:
    jaxckpt.save(url, small_tree())
    store = open_bucket(url)
    unreachable = BucketStore(store._place, RootWithoutPacks(store._root), 1.0)
    with pytest.raises(jaxckpt.CheckpointError, match="storage did not give") as caught:
        jaxckpt.restore(unreachable)
    assert not isinstance(caught.value, jaxckpt.CorruptError)
    assert "packs/" in str(caught.value)
    assert "All 10 retry attempts failed" in str(caught.value)
    assert_same_tree(jaxckpt.restore(url), small_tree())


@pytest.mark.parametrize(
    ("length", "asked"), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (9, 8), (9, 9), (9, 10), (9, 99)]
)
def test_the_length_of_an_object_is_exact(url: str, length: int, asked: int) -> None:
    store = open_store(url)
    store.put("object", b"x" * length)
    assert store.has_length("object", asked) == (length == asked)
    with pytest.raises(FileNotFoundError):
        store.has_length("other", asked)


# --- what a strict reader of URLs and answers refuses -----------------------------------------------------------


def test_a_server_that_does_not_do_what_is_asked_is_an_error_of_storage(url: str) -> None:
    store = BucketStore(
        open_bucket(url)._place, FailingRoot(NotImplementedError("NotImplemented [a='1']")), 1.0
    )
    with pytest.raises(OSError, match="NotImplemented") as caught:
        store.put("object", b"")
    assert caught.value.filename == f"{url}/object"
    with pytest.raises(jaxckpt.WriteError, match="NotImplemented"):
        jaxckpt.save(store, small_tree())


class OddRoot:
    """TensorStore's view of a bucket that gives one answer to everything."""

    generation = b""

    def __init__(self, state: str, error: Exception | None = None) -> None:
        self.state = state
        self.value = b""
        self._error = error

    def read(self, key: str, **keywords: Any) -> Any:
        return self

    def write(self, key: str, value: bytes) -> Any:
        return self

    def result(self, timeout: float) -> Any:
        if self._error is not None:
            raise self._error
        return self


@pytest.mark.parametrize(
    "root", [OddRoot("unspecified"), OddRoot("value", ValueError("OUT_OF_RANGE: InvalidRange"))]
)
def test_an_odd_answer_does_not_make_a_checkpoint_missing(root: OddRoot) -> None:
    store = BucketStore(parse_url("memory://run")[0], root, 1.0)
    with pytest.raises(OSError, match=r"nothing has changed|InvalidRange"):
        store.read("manifest.msgpack", 10)
    with pytest.raises(jaxckpt.CheckpointError) as caught:
        jaxckpt.restore(store)
    assert not isinstance(caught.value, (jaxckpt.NotFoundError, jaxckpt.FormatError))


def test_an_object_that_was_not_taken_is_not_counted_as_written() -> None:
    store = BucketStore(parse_url("memory://run")[0], OddRoot("missing"), 1.0)
    with pytest.raises(OSError, match="has not taken") as caught:
        store.put("data/packs/0-0", b"bytes")
    assert caught.value.filename == "memory://run/data/packs/0-0"


@pytest.mark.parametrize("wrong", ["s3://bucket/a%ff", "gs://bucket/a\udcff/b", "memory://%c3"])
def test_a_prefix_that_is_no_text_is_refused_and_not_taken_for_another(wrong: str) -> None:
    with pytest.raises(jaxckpt.CheckpointError, match="must be UTF-8"):
        open_store(wrong)


@pytest.mark.parametrize("wrong", ["s3:/bucket/run", "gs:/bucket/run", "memory:/run"])
def test_the_text_of_a_path_that_was_a_url_is_refused(
    wrong: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where it would be saved
    with pytest.raises(jaxckpt.CheckpointError, match="is a URL that became a path"):
        jaxckpt.save(wrong, small_tree())
    assert list(tmp_path.iterdir()) == []


class BusyRoot:
    """TensorStore's view of a bucket in which somebody commits after the last look for a manifest."""

    def __init__(self, root: Any, commit: Callable[[], object], last_look: int) -> None:
        self._root = root
        self._commit = commit
        self._looks = 0
        self._last_look = last_look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._root, name)

    def read(self, key: str, **keywords: Any) -> Any:
        answer = self._root.read(key, **keywords).result()
        if key.endswith("manifest.msgpack"):
            self._looks += 1
            if self._looks == self._last_look:
                self._commit()
        return Answered(answer)


class Answered:
    """A request that was answered."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def result(self, timeout: float) -> Any:
        return self._answer


@pytest.mark.parametrize("may_overwrite", [False, True])
def test_a_commit_right_before_ours_is_replaced_only_if_that_is_allowed(
    url: str, may_overwrite: bool
) -> None:
    store = open_bucket(url)
    jaxckpt.save(url, small_tree(1))
    manifest = store.read(MANIFEST_NAME, MIB)
    store.delete(MANIFEST_NAME)  # of which the other one says next that it is there
    # A save that may not overwrite looks when it begins, too.
    root = BusyRoot(store._root, lambda: store.put(MANIFEST_NAME, manifest), 1 if may_overwrite else 2)
    busy = BucketStore(store._place, root, timeout_s=1.0)
    if may_overwrite:
        jaxckpt.save(busy, small_tree(2), overwrite=True)
    else:
        with pytest.raises(jaxckpt.ExistsError):
            jaxckpt.save(busy, small_tree(2))
        assert sum(name.startswith("data-") for name in store.names()) == 1
    assert_same_tree(jaxckpt.restore(url), small_tree(2 if may_overwrite else 1))


# --- how many requests a restore takes --------------------------------------------------------------------------


def test_leaves_between_others_are_read_in_few_requests_and_alone_in_memory(url: str) -> None:
    tree = {
        f"{number:04}{name}": np.full(250, number, np.float32) for number in range(1500) for name in "abc"
    }
    tree["0700c-large"] = np.ones(MIB // 4, np.float32)
    jaxckpt.save(url, tree)
    store, calls = counting_store(url)
    restored = jaxckpt.restore(store, select="*b", options=jaxckpt.RestoreOptions(host_bytes_max=32 * MIB))
    assert_same_tree(restored, {key: leaf for key, leaf in tree.items() if key.endswith("b")})
    # 4.6 MB in units of 1 MiB, the metadata, and one more for the large one in between.
    assert calls["read"] <= 12, calls
    base = restored["0003b"]
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert base.nbytes <= MIB
