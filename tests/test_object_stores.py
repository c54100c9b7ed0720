"""Whatever can be done with a checkpoint in files can be done with one in a bucket, in few requests.

Real servers answer (`tests.object_servers`); what they are asked is counted on the way (`tests.proxy`). What
happens when they do not answer well is in `test_object_store_faults`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import CheckpointManager, SaveOptions, UploadOptions
from jaxckpt._cli import main
from jaxckpt._layout import OBJECT_BYTES_MAX, LeafExtent, cut_shard, plan_writes
from jaxckpt._store import open_store
from jaxckpt.interop import orbax, safetensors

from .helpers import assert_same_tree, make_mesh
from .object_servers import CREDENTIALS, Remote
from .processes import Outcome, Worker, run_processes, start_processes

pytestmark = [pytest.mark.slow, pytest.mark.object_stores]

MIB = 1 << 20
GOLDEN = pathlib.Path(__file__).with_name("golden")
SMALL = SaveOptions(pack_bytes_max=4096)


@dataclasses.dataclass(frozen=True)
class Place:
    """A prefix that nobody used before.

    Attributes:
      remote: The store, or None for ``memory://``.
      prefix: In its bucket.
    """

    remote: Remote | None
    prefix: str

    def url(self, name: str = "run", **options: object) -> str:
        if self.remote is None:
            return f"memory://{self.prefix}/{name}"
        return self.remote.url(f"{self.prefix}/{name}", **options)

    def objects(self, name: str = "run") -> dict[str, int]:
        """Names and lengths of what is stored, behind the back of what is tested."""
        assert self.remote is not None
        return self.remote.objects(f"{self.prefix}/{name}/")


@pytest.fixture
def place(remote: Remote) -> Place:
    return Place(remote, f"test-{secrets.token_hex(6)}")


@pytest.fixture
def s3_place(s3: Remote) -> Place:
    return Place(s3, f"test-{secrets.token_hex(6)}")


@pytest.fixture(params=["memory", "remote"])
def any_place(request: pytest.FixtureRequest) -> Place:
    if request.param == "memory":
        return Place(None, f"test-{secrets.token_hex(6)}")
    return Place(request.getfixturevalue("s3"), f"test-{secrets.token_hex(6)}")


def counts(remote: Remote | None) -> dict[str, int]:
    assert remote is not None
    return {kind: remote.proxy.count(kind) for kind in ("put", "get", "list", "head", "delete")}


DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.uint4),
]


def random_array(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray[Any, Any]:
    """Any bits at all, NaN payloads included."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    if dtype == np.bool_:
        data &= 1
    if dtype.name in ("int4", "uint4"):
        return (data & 7).astype(dtype).reshape(shape)
    return np.frombuffer(data.tobytes(), dtype).reshape(shape)


def tree_of(number: int) -> dict[str, Any]:
    """Packed arrays, arrays in objects of their own, and values."""
    return {
        "layers": [{"w": np.arange(50.0) + number, "b": np.full(3, number, np.int8)} for _ in range(2)],
        "own": np.full(2000, number, np.float64),
        "device": jnp.full((20,), number, jnp.float32),
        "name": f"save {number}",
        "number": number,
    }


# --- one checkpoint -------------------------------------------------------------------------------------------


def test_every_dtype_and_size_comes_back_bit_for_bit(any_place: Place) -> None:
    shapes = [(), (0,), (1,), (3, 0, 2), (7, 5), (513, 3), (409, 65)]
    tree = {
        str(np.dtype(dtype)): {
            str(shape): random_array(shape, dtype, seed) for seed, shape in enumerate(shapes)
        }
        for dtype in DTYPES
    }
    options = SaveOptions(pack_bytes_max=1024, chunk_bytes_max=100_000)
    info = jaxckpt.save(any_place.url(), tree, items={"position": [1, b"\0"]}, metadata="m", options=options)
    assert_same_tree(jaxckpt.restore(any_place.url()), tree)
    checkpoint = jaxckpt.open(any_place.url())
    assert (checkpoint.items, checkpoint.metadata) == ({"position": [1, b"\0"]}, "m")
    report = jaxckpt.verify(any_place.url())
    assert report.ok, report
    assert jaxckpt.describe(any_place.url()).nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    jaxckpt.save(any_place.url("other"), tree, options=SMALL)
    assert jaxckpt.diff(any_place.url(), any_place.url("other")).same
    tree["int8"]["(1,)"] = tree["int8"]["(1,)"] + 1
    jaxckpt.save(any_place.url("other"), tree, overwrite=True)
    assert not jaxckpt.diff(any_place.url(), any_place.url("other")).same
    assert info.path == any_place.url()


def test_sharded_arrays_come_back_on_other_devices(place: Place) -> None:
    mesh = make_mesh({"x": 4, "y": 2})
    values = random_array((64, 4096), np.float32, 1)
    tree = {
        "w": jax.device_put(values, NamedSharding(mesh, P("x", "y"))),
        "replicated": jax.device_put(values[:3], NamedSharding(mesh, P())),
        "key": jax.random.key(3),
    }
    jaxckpt.save(place.url(), tree, options=SaveOptions(chunk_bytes_max=1 << 16, pack_bytes_max=1024))
    assert_same_tree(jaxckpt.restore(place.url()), tree)
    other = jaxckpt.restore(place.url(), mesh=make_mesh({"y": 8}))
    assert_same_tree(jax.tree.map(np.asarray, other["w"]), values)
    like = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype)}
    part = jaxckpt.restore(place.url(), like, unexpected="ignore", sharding=NamedSharding(mesh, P(None, "x")))
    np.testing.assert_array_equal(np.asarray(part["w"]).view(np.uint32), values.view(np.uint32))


def test_a_part_of_a_leaf_is_read_by_ranges(place: Place) -> None:
    values = random_array((64, MIB // 4), np.float32, 2)  # 64 MiB
    jaxckpt.save(place.url(), {"w": values, "b": np.ones(10)}, options=SaveOptions(chunk_bytes_max=16 * MIB))
    assert place.remote is not None
    proxy = place.remote.proxy
    proxy.reset()
    checkpoint = jaxckpt.open(place.url())
    opening = sum(request.answer_bytes for request in proxy.requests)
    assert opening < 100_000
    proxy.reset()
    got = checkpoint["w"][10:12, 5:9]
    np.testing.assert_array_equal(got.view(np.uint32), values[10:12, 5:9].view(np.uint32))
    # Two rows of a mebibyte each, which are whole blocks.
    assert sum(request.answer_bytes for request in proxy.requests) <= 3 * MIB
    assert proxy.count("get") <= 2
    assert proxy.count("get|head|list") == len(proxy.requests)
    proxy.reset()
    np.testing.assert_array_equal(checkpoint["b"][3:4], np.ones(1))
    assert sum(request.answer_bytes for request in proxy.requests) < MIB


def test_nothing_is_read_before_it_is_asked_for_and_large_arrays_go_in_few_requests(place: Place) -> None:
    tree = {"w": random_array((40, MIB // 4), np.float32, 3)}
    assert place.remote is not None
    proxy = place.remote.proxy
    jaxckpt.save(place.url(), tree)
    assert counts(place.remote)["put"] <= 8  # a chunk of 40 MiB; metadata; the manifest
    assert proxy.requests[-1].name.endswith("/manifest.msgpack")
    assert proxy.requests[-1].kind == "put"
    sent = sum(request.body_bytes for request in proxy.requests)
    assert sent < 40 * MIB + 100_000
    proxy.reset()
    assert_same_tree(jaxckpt.restore(place.url()), tree)
    assert counts(place.remote)["get"] <= 12
    assert sum(request.answer_bytes for request in proxy.requests) < 40 * MIB + 100_000


def test_an_overwrite_replaces_and_leaves_nothing_behind(any_place: Place) -> None:
    url = any_place.url()
    for number in range(3):
        jaxckpt.save(url, tree_of(number), overwrite=number > 0, options=SMALL)
        assert_same_tree(jaxckpt.restore(url), tree_of(number))
    if any_place.remote is not None:
        data = {name.partition("/")[0] for name in any_place.objects() if name.startswith("data-")}
        assert len(data) == 1
    with pytest.raises(jaxckpt.ExistsError, match="already"):
        jaxckpt.save(url, tree_of(9))
    assert_same_tree(jaxckpt.restore(url), tree_of(2))


def test_who_reads_what_was_replaced_learns_that_it_is_gone(place: Place) -> None:
    jaxckpt.save(place.url(), tree_of(1), options=SMALL)
    checkpoint = jaxckpt.open(place.url())
    jaxckpt.save(place.url(), tree_of(2), overwrite=True, options=SMALL)
    with pytest.raises((jaxckpt.CheckpointError, OSError), match="own"):
        checkpoint["own"][...]


def test_what_is_not_there_is_not_found(any_place: Place) -> None:
    for verb in (jaxckpt.restore, jaxckpt.open, jaxckpt.verify, jaxckpt.describe):
        with pytest.raises(jaxckpt.NotFoundError):
            verb(any_place.url("nothing"))
    manager = CheckpointManager(any_place.url("nothing"))
    assert (manager.steps(), manager.latest_step(), manager.resume()) == ([], None, None)
    with pytest.raises(jaxckpt.NotFoundError):
        manager.restore()


ODD_NAMES = [
    "a b",
    "50%",
    "%2F",
    "a%20b",
    "what?",
    "c#",
    "a+b",
    "a&b=c",
    "~tilde",
    "x:y",
    "ä日本",
    "'quoted\"",
    "[1]*{2}$(3)",
    "back\\slash",
    "new\nline",
    ".",
    "..",
    "long" * 50,
    "",
]


def test_keys_with_odd_characters(any_place: Place) -> None:
    tree = {name: {f"{name}/{name}": np.full(2000, number)} for number, name in enumerate(ODD_NAMES)}
    jaxckpt.save(any_place.url(), tree, options=SaveOptions(pack_bytes_max=0))
    assert_same_tree(jaxckpt.restore(any_place.url()), tree)
    assert jaxckpt.verify(any_place.url()).ok


@pytest.mark.parametrize(
    "name", ["a b", "50%", "a%20b", "c#1", "what?", "a+b", "a&b", "ä日本", "~t'\"[1]", "long" * 40]
)
def test_prefixes_with_odd_characters(place: Place, name: str) -> None:
    url = place.url(f"{name}/run")
    with CheckpointManager(url, max_to_keep=2) as manager:
        for step in range(3):
            manager.save(step, tree_of(step))
    manager = CheckpointManager(url)
    assert manager.steps() == [1, 2]
    assert_same_tree(jaxckpt.restore(manager.path_of(2)), tree_of(2))
    assert "step_00000002/manifest.msgpack" in place.objects(f"{name}/run")
    assert main(["verify", manager.path_of(1)]) == 0
    # Neighbours of the prefix are no part of it.
    jaxckpt.save(place.url(f"{name}/run2/step_00000009"), tree_of(9))
    jaxckpt.save(place.url(f"{name}/run-/step_00000009"), tree_of(9))
    assert manager.steps() == [1, 2]


# --- how the store is reached ---------------------------------------------------------------------------------


@pytest.fixture
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_environment_says_where_s3_is(s3_place: Place, environment: pytest.MonkeyPatch) -> None:
    assert s3_place.remote is not None
    environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_place.remote.proxy.port}")
    environment.setenv("AWS_REGION", "us-east-1")
    url = s3_place.url().partition("?")[0]
    jaxckpt.save(url, tree_of(1))
    assert_same_tree(jaxckpt.restore(url), tree_of(1))
    assert_same_tree(jaxckpt.restore(s3_place.url()), tree_of(1))
    environment.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    environment.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{s3_place.remote.proxy.port}")
    assert_same_tree(jaxckpt.restore(url), tree_of(1))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "bucket"),
        ("s3:///prefix", "bucket"),
        ("s3://bkt/p?max_retrys=1", "max_retrys"),
        ("s3://bkt/p?max_retries=many", "many"),
        ("gs://bkt/p?endpoint=x", "endpoint"),
        ("s3://bkt/p?max_retries=-1", "max_retries|-1"),
        ("s3://bkt/p?initial_delay=soon", "initial_delay|soon"),
        ("s3://bkt/p?credentials=mine", "credentials|mine"),
        ("s3://bkt/p?timeout_s=nan", "timeout_s|nan"),
        ("s3://bkt/p?timeout_s=-1", "timeout_s|-1"),
        ("s3://bkt/a/../p", "'..'"),
        ("s3://bkt/./p", "'.'"),
        ("s3://bkt/a//p", "''"),
        ("gs://bkt/..", "'..'"),
        ("azure://bkt/p", "azure"),
        ("memory://p?endpoint=x", "endpoint"),
    ],
)
def test_a_url_that_names_no_place_is_refused(url: str, message: str) -> None:
    with pytest.raises(jaxckpt.CheckpointError, match=message):
        jaxckpt.open(url)
    with pytest.raises(jaxckpt.CheckpointError, match=message):
        CheckpointManager(url)


def test_a_user_who_may_only_read(
    s3_place: Place, environment: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    key, secret, _ = CREDENTIALS["reader"]
    profiles = tmp_path / "credentials"
    profiles.write_text(f"[reader]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
    jaxckpt.save(s3_place.url(), tree_of(1))
    before = s3_place.objects()
    for options in ({"credentials": "profile", "profile": "reader"}, {"profile": "reader"}):
        url = s3_place.url(**options)
        assert_same_tree(jaxckpt.restore(url), tree_of(1))
        assert jaxckpt.verify(url).ok
        with pytest.raises(jaxckpt.WriteError, match=r"(?i)permission|denied") as refused:
            jaxckpt.save(url, tree_of(2), overwrite=True)
        assert "data-" in str(refused.value) or "zarr.json" in str(refused.value)
    assert_same_tree(jaxckpt.restore(s3_place.url()), tree_of(1))
    assert s3_place.objects() == before


@pytest.mark.parametrize("case", ["wrong secret", "unknown key", "no bucket", "anonymous"])
def test_what_the_server_refuses_is_an_error_that_says_so(
    s3_place: Place, environment: pytest.MonkeyPatch, case: str
) -> None:
    assert s3_place.remote is not None
    jaxckpt.save(s3_place.url(), tree_of(1))
    url = s3_place.url()
    if case == "wrong secret":
        environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    elif case == "unknown key":
        environment.setenv("AWS_ACCESS_KEY_ID", "nobody")
    elif case == "no bucket":
        url = s3_place.remote.url("x", bucket="no-such-bucket")
    else:
        url = s3_place.url(credentials="anonymous")
    pattern = "(?i)bucket" if case == "no bucket" else "(?i)permission|denied|credentials|signature|access"
    s3_place.remote.proxy.reset()
    for attempt in (
        lambda: jaxckpt.save(url, tree_of(2), overwrite=True),
        lambda: jaxckpt.restore(url),
        lambda: jaxckpt.verify(url),
        lambda: CheckpointManager(url).steps(),
    ):
        with pytest.raises((OSError, jaxckpt.CheckpointError), match=pattern) as refused:
            attempt()
        assert not isinstance(refused.value, jaxckpt.CorruptError), refused.value
        # Of a bucket that is not there the answer to a GET is the one of an object that is not there.
        assert case == "no bucket" or not isinstance(refused.value, jaxckpt.NotFoundError), refused.value
    with pytest.raises(jaxckpt.CheckpointError):
        CheckpointManager(url, save_last=False).save(1, tree_of(1)).wait()  # type: ignore[union-attr]
    # What the server refuses for good is not asked again and again.
    assert len(s3_place.remote.proxy.requests) < 60
    environment.undo()
    assert_same_tree(jaxckpt.restore(s3_place.url()), tree_of(1))


# --- a manager ------------------------------------------------------------------------------------------------


def test_a_manager_from_the_first_save_to_the_last(any_place: Place) -> None:
    url = any_place.url()
    events: list[jaxckpt.CheckpointEvent] = []
    rules: dict[str, Any] = {
        "max_to_keep": 2,
        "keep_period": 4,
        "best": jaxckpt.Best("loss", mode="min"),
        "options": SMALL,
    }
    losses = [5.0, 0.5, 3.0, 4.0, 2.0, 6.0, 1.0, 7.0, 8.0, 9.0]
    with CheckpointManager(url, **rules, on_event=events.append) as manager:
        assert manager.resume() is None
        for step, loss in enumerate(losses):
            manager.save(step, tree_of(step), metrics={"loss": loss}, items={"data": {"at": step}})
    assert manager.steps() == [0, 1, 4, 8, 9]
    assert [event.step for event in events if event.kind == "saved"] == list(range(10))
    assert [event for event in events if event.kind in ("failed", "in use", "damaged")] == []

    again = CheckpointManager(url, **rules)
    assert again.steps() == [0, 1, 4, 8, 9]
    assert (again.latest_step(), again.best_step(), again.metrics(4)) == (9, 1, {"loss": 2.0})
    for step in again.steps():
        assert_same_tree(again.restore(step), tree_of(step))
        assert again.open(step).items == {"data": {"at": step}}
        assert jaxckpt.verify(again.path_of(step)).ok
    step, tree = again.resume() or (0, None)
    assert step == 9
    assert_same_tree(tree, tree_of(9))
    assert again.save(9, tree_of(9)) is None
    again.save(10, tree_of(10), metrics={"loss": 10.0})
    again.wait()
    assert again.steps() == [0, 1, 4, 8, 9, 10]
    again.pin(9)
    again.delete(4)
    with pytest.raises(jaxckpt.NotFoundError):
        again.delete(4)
    again.close()
    strict = CheckpointManager(url, max_to_keep=1)
    assert [verdict.step for verdict in strict.explain() if not verdict.is_kept] == [0, 1, 8]
    assert strict.prune() == [0, 1, 8]
    strict.unpin(9)
    assert strict.prune() == [9]
    assert strict.steps() == [10]
    assert_same_tree(strict.restore(), tree_of(10))
    if any_place.remote is not None:
        left = any_place.objects()
        assert {name.partition("/")[0] for name in left} == {"checkpoint.json", "step_00000010"}
        document = json.loads(any_place.remote.read(f"{any_place.prefix}/run/checkpoint.json"))
        assert document["latest"] == "step_00000010"


def test_a_manager_overwrites_a_step(any_place: Place) -> None:
    with CheckpointManager(any_place.url(), options=SMALL) as manager:
        manager.save(1, tree_of(1))
    with CheckpointManager(any_place.url(), options=SMALL) as manager:
        assert manager.save(1, tree_of(2)) is None
        manager.save(1, tree_of(3), overwrite=True, force=True)
    assert_same_tree(manager.restore(1), tree_of(3))
    if any_place.remote is not None:
        data = {name.split("/")[1] for name in any_place.objects() if "/data-" in name}
        assert len(data) == 1


def test_a_reader_watches_what_another_manager_saves(place: Place) -> None:
    reader = CheckpointManager(place.url())
    writer = CheckpointManager(place.url(), max_to_keep=1, options=SMALL)
    seen: list[int] = []
    writer.save(0, tree_of(0)).wait()  # type: ignore[union-attr]
    for step in reader.watch(timeout_s=30, poll_s=0.01):
        assert_same_tree(reader.restore(step), tree_of(step))
        seen.append(step)
        if step == 3:
            break
        writer.save(step + 1, tree_of(step + 1)).wait()  # type: ignore[union-attr]
        writer.wait()
    assert seen == [0, 1, 2, 3]
    # What the other one has replaced or deleted is seen so.
    writer.save(3, tree_of(33), overwrite=True, force=True)
    writer.close()
    assert reader.steps() == [3]
    assert_same_tree(reader.restore(3), tree_of(33))
    writer.delete(3)
    assert reader.steps() == []


def test_two_managers_save_into_one_directory_in_turns(place: Place) -> None:
    managers = [CheckpointManager(place.url(), max_to_keep=3, options=SMALL) for _ in range(2)]
    for step in range(8):
        manager = managers[step % 2]
        pending = manager.save(step, tree_of(step), metrics={"number": step})
        assert pending is not None
        pending.wait()
        manager.wait()
    assert [manager.steps() for manager in managers] == [[5, 6, 7]] * 2
    for manager in managers:
        manager.close()
        for step in (5, 6, 7):
            assert_same_tree(manager.restore(step), tree_of(step))
            assert manager.metrics(step) == {"number": step}


def test_many_steps_are_listed_and_saved_with_as_few_requests_as_one(s3_place: Place) -> None:
    place = s3_place
    assert place.remote is not None
    proxy = place.remote.proxy
    found: dict[int, dict[str, dict[str, int]]] = {}
    saving: list[dict[str, int]] = []
    for steps in (1, 20):
        url = place.url(f"run-{steps}")
        with CheckpointManager(url, max_to_keep=None) as manager:
            for step in range(steps):
                proxy.reset()
                manager.save(step, {"w": np.arange(4.0)}, metrics={"loss": step})
                manager.wait()
                saving.append(counts(place.remote))
        questions = {
            "steps": lambda manager: manager.steps(),
            "latest_step": lambda manager: manager.latest_step(),
            "best_step": lambda manager: manager.best_step(),
            "explain": lambda manager: manager.explain(),
            "resume": lambda manager: manager.resume(),
            "watch": lambda manager: next(manager.watch(timeout_s=0)),
        }
        found[steps] = {}
        for name, ask in questions.items():
            manager = CheckpointManager(url, max_to_keep=None, best=jaxckpt.Best("loss"))
            proxy.reset()
            answer = ask(manager)
            found[steps][name] = counts(place.remote)
            if name in ("steps", "explain"):
                assert len(answer) == steps
        proxy.reset()
        assert main(["ls", url]) == 0
        found[steps]["ls"] = {"list": counts(place.remote)["list"]}
    assert found[1]["steps"] == {"put": 0, "get": 0, "list": 1, "head": 0, "delete": 0}
    assert found[20] == found[1]
    assert saving[-1] == saving[3]
    assert sum(saving[-1].values()) <= 25, saving[-1]


def test_the_root_of_a_bucket_is_a_directory_too(remote: Remote) -> None:
    mark = f"root{secrets.token_hex(4)}_"
    url = remote.url("")
    with CheckpointManager(url, prefix=mark, max_to_keep=2, options=SMALL) as manager:
        for step in range(3):
            manager.save(step, tree_of(step))
    manager = CheckpointManager(url, prefix=mark)
    assert manager.steps() == [1, 2]
    assert_same_tree(manager.restore(2), tree_of(2))
    assert jaxckpt.verify(manager.path_of(1)).ok
    manager.delete(1)
    manager.delete(2)
    assert remote.objects(mark) == {}
    assert CheckpointManager(remote.url(""), prefix=mark).steps() == []


def test_a_listing_of_several_answers_is_read_to_its_end(s3_place: Place) -> None:
    tree = {f"leaf{number:03}": np.full(2, number, np.int16) for number in range(510)}
    options = SaveOptions(pack_bytes_max=0, io_threads=16)
    with CheckpointManager(s3_place.url(), options=options) as manager:
        manager.save(1, tree)
        manager.save(2, {"w": np.ones(3)})
    assert s3_place.remote is not None
    assert len(s3_place.remote.names(f"{s3_place.prefix}/run/")) > 1020
    manager = CheckpointManager(s3_place.url())
    assert manager.steps() == [1, 2]
    manager.delete(1)
    assert CheckpointManager(s3_place.url()).steps() == [2]
    assert s3_place.remote.names(f"{s3_place.prefix}/run/step_00000001/") == []


# --- commands -------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_command_takes_urls(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    with CheckpointManager(place.url(), max_to_keep=None) as manager:
        for step in (1, 2, 3):
            manager.save(step, tree_of(step), metrics={"loss": step})
    one, two = manager.path_of(1), manager.path_of(2)
    code, out, _ = run(capsys, "ls", place.url())
    assert (code, "step_00000001" in out, "step_00000003" in out) == (0, True, True)
    assert run(capsys, "info", one)[0] == 0
    code, out, _ = run(capsys, "tree", one)
    assert (code, "layers/0/w" in out) == (0, True)
    assert run(capsys, "verify", one)[0] == 0
    code, out, _ = run(capsys, "cat", one, "layers/0/w[3:5]")
    assert (code, out.split()) == (0, ["array([4.,", "5.])"])
    assert run(capsys, "diff", one, one)[0] == 0
    assert run(capsys, "diff", one, two)[0] == 1
    code, out, _ = run(capsys, "prune", place.url(), "--max-to-keep", "1")
    assert code == 0
    assert manager.steps() == [3]
    assert run(capsys, "verify", one)[0] != 0
    code, _, err = run(capsys, "cat", one, "own")
    assert code != 0
    assert "step_00000001" in err


def test_checkpoints_are_converted_into_a_bucket_and_out_of_it(
    place: Place, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    tree = {"w": random_array((300, 70), np.float32, 1), "b": np.arange(5, dtype=np.int32)}
    jaxckpt.save(place.url("there"), tree)
    model = str(tmp_path / "model")
    assert run(capsys, "convert", place.url("there"), model, "--to", "tensorflow")[0] == 0
    code, _, err = run(capsys, "convert", model, place.url("back"), "--rename", "w=v")
    assert code == 0, err
    checkpoint = jaxckpt.open(place.url("back"))
    assert_same_tree({key: checkpoint[key][...] for key in checkpoint}, {"v": tree["w"], "b": tree["b"]})


# --- counts ---------------------------------------------------------------------------------------------------


def test_ten_thousand_small_leaves_are_few_requests(place: Place) -> None:
    assert place.remote is not None
    tree = {f"leaf{number:05}": np.full(1024, number, np.float32) for number in range(10_000)}
    jaxckpt.save(place.url(), tree)
    saving = counts(place.remote)
    assert saving["put"] <= 40, saving
    assert sum(saving.values()) <= 44, saving
    place.remote.proxy.reset()
    restored = jaxckpt.restore(place.url())
    restoring = counts(place.remote)
    assert restoring["get"] <= 40, restoring
    assert sum(restoring.values()) <= 44, restoring
    assert_same_tree(restored, tree)


def test_two_thousand_small_arrays_on_devices_are_few_requests(s3_place: Place) -> None:
    assert s3_place.remote is not None
    mesh = make_mesh({"x": 8})
    values = np.arange(1024, dtype=np.float32)
    arrays = [
        jax.device_put(values, NamedSharding(mesh, P("x") if number % 2 else P())) for number in range(200)
    ]
    tree = {f"leaf{number:05}": arrays[number % 200] for number in range(2000)}
    jaxckpt.save_async(s3_place.url(), tree).wait()
    assert counts(s3_place.remote)["put"] <= 40
    s3_place.remote.proxy.reset()
    restored = jaxckpt.restore(s3_place.url(), tree)
    assert counts(s3_place.remote)["get"] <= 40
    np.testing.assert_array_equal(np.asarray(restored["leaf01999"]), values)


@pytest.mark.parametrize("chunk_bytes_max", [1, 4 << 20, 1 << 40])
@pytest.mark.parametrize(
    "shape",
    [(1 << 34,), (7, 1 << 31), (1 << 31, 7), (2, 3, 5, 1 << 30), (104_729, 104_729), (8_589_934_583,)],
)
def test_no_chunk_is_larger_than_an_object_may_be(shape: tuple[int, ...], chunk_bytes_max: int) -> None:
    for itemsize in (1, 4, 16):
        chunk = cut_shard(shape, itemsize, chunk_bytes_max)
        assert int(np.prod(chunk, dtype=object)) * itemsize <= OBJECT_BYTES_MAX < 4 << 30
        assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))


def test_no_option_makes_an_object_larger_than_it_may_be() -> None:
    shapes = [((5, 3 << 30), 4), ((1 << 20,), 4), ((3 << 33,), 1), *[((1 << 19,), 8)] * 100]
    leaves = [LeafExtent(shape, itemsize, shape, (((0,) * len(shape), 0),)) for shape, itemsize in shapes]
    for chunk_bytes_max in (1 << 20, 1 << 50):
        plan = plan_writes(
            leaves, chunk_bytes_max=chunk_bytes_max, pack_bytes_max=1 << 50, piece_bytes=8 * MIB
        )
        assert max(planned.length for planned in plan.objects) <= OBJECT_BYTES_MAX
        assert sum(planned.length for planned in plan.objects) >= 80 << 30


# --- damage ---------------------------------------------------------------------------------------------------


def test_what_is_lost_or_cut_behind_our_back_is_found(place: Place) -> None:
    assert place.remote is not None
    tree = tree_of(1)
    jaxckpt.save(place.url("good"), tree, options=SMALL)
    names = place.objects("good")
    # Group and array metadata are for other readers; ours does not read them but to verify.
    essential = [name for name in names if not name.endswith("zarr.json")]
    assert len(essential) == 3
    for name in names:
        full = f"{place.prefix}/good/{name}"
        data = place.remote.read(full)
        changed = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        for damage in (None, data[:-1], b"", data + b"\0", changed):
            if damage is None:
                place.remote.delete(full)
            else:
                place.remote.write(full, damage)
            try:
                report = jaxckpt.verify(place.url("good"))
                assert not report.ok, (name, damage and len(damage))
            except (jaxckpt.FormatError, jaxckpt.NotFoundError, jaxckpt.CorruptError):
                assert name == "manifest.msgpack"
            if name in essential:
                try:
                    restored = jaxckpt.restore(place.url("good"))
                except (jaxckpt.CheckpointError, FileNotFoundError):
                    pass
                else:  # a byte too many behind what is read
                    assert damage is not None
                    assert len(damage) > len(data)
                    assert_same_tree(restored, tree)
        place.remote.write(full, data)
    assert jaxckpt.verify(place.url("good")).ok


def test_a_manager_passes_over_a_damaged_step(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    assert place.remote is not None
    with CheckpointManager(place.url(), options=SMALL) as manager:
        for step in (1, 2, 3):
            manager.save(step, tree_of(step))
    own = next(
        name for name in place.objects() if name.startswith("step_00000003/") and name.endswith("own/c.0")
    )
    place.remote.delete(f"{place.prefix}/run/{own}")
    caplog.set_level(logging.WARNING, logger="jaxckpt")
    manager = CheckpointManager(place.url())
    assert_same_tree(manager.restore(), tree_of(2))
    assert manager.steps() == [1, 2]
    assert "3" in caplog.text
    with pytest.raises(jaxckpt.CorruptError, match="own"):
        CheckpointManager(place.url()).restore(3)


# --- processes ------------------------------------------------------------------------------------------------


def returned(outcomes: list[Outcome]) -> list[Any]:
    assert [outcome.error_text for outcome in outcomes] == [""] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def place_globally(values: np.ndarray[Any, Any], spec: P) -> jax.Array:
    from .test_many_processes import global_mesh, place

    return place(values, global_mesh(), spec)


def group_tree(step: int) -> dict[str, Any]:
    values = np.arange(64 * 96, dtype=np.float32).reshape(64, 96) + step
    return {
        "rows": place_globally(values, P("x")),
        "columns": place_globally(values, P(None, "x")),
        "replicated": place_globally(values, P()),
        "step": step,
    }


def assert_is_step(tree: dict[str, Any], step: int) -> None:
    values = np.arange(64 * 96, dtype=np.float32).reshape(64, 96) + step
    assert tree["step"] == step
    for key in ("rows", "columns", "replicated"):
        for shard in tree[key].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])


def run_manager(worker: Worker, environment: dict[str, str], url: str, last: int) -> list[int]:
    os.environ.update(environment)
    from .test_many_processes import global_mesh

    options = SaveOptions(pack_bytes_max=4096, timeout_s=30)
    with CheckpointManager(url, max_to_keep=2, best=jaxckpt.Best("loss"), options=options) as manager:
        begin = 0
        resumed = manager.resume(mesh=global_mesh())
        if resumed is not None:
            begin, tree = resumed
            assert_is_step(tree, begin)
        for step in range(begin + 1, last + 1):
            manager.save(step, group_tree(step), metrics={"loss": step}, items={"at": step})
        manager.wait()
        assert_is_step(manager.restore(last, mesh=global_mesh()), last)
        return manager.steps()


def save_where_one_is_refused(worker: Worker, environment: dict[str, str], url: str) -> str:
    os.environ.update(environment)
    options = SaveOptions(pack_bytes_max=0, timeout_s=30)
    with CheckpointManager(url, options=options) as manager:
        manager.save(1, group_tree(1))
        manager.wait()
        worker.meet()
        if worker.index == 0:
            worker.send("saved")
            worker.receive()
        worker.meet()
        pending = manager.save(2, group_tree(2))
        assert pending is not None
        try:
            pending.wait()
        except jaxckpt.CheckpointError as error:
            message = str(error)
        worker.meet()
        if worker.index == 0:
            worker.send("failed")
            worker.receive()
        worker.meet()
        manager.save(3, group_tree(3))
    assert manager.steps() == [1, 3]
    return message


def test_what_the_store_refuses_one_process_fails_in_all_and_the_next_step_is_saved(s3_place: Place) -> None:
    assert s3_place.remote is not None
    proxy = s3_place.remote.proxy
    arguments = (s3_place.remote.environment, s3_place.url())
    with start_processes(save_where_one_is_refused, 2, arguments=arguments) as group:
        assert group.receive(0) == "saved"
        # Of the rows each process writes its own.
        rule = proxy.inject("503", "put", r"rows/c\.1", times=None)
        group.send(0, "go on")
        assert group.receive(0) == "failed"
        assert rule.hits >= 5
        proxy.reset()
        group.send(0, "go on")
        messages = returned(group.wait(60))
    assert all("rows/c.1" in message for message in messages), messages
    manager = CheckpointManager(s3_place.url())
    assert manager.steps() == [1, 3]
    assert jaxckpt.verify(manager.path_of(3)).ok
    assert not [name for name in s3_place.objects() if name.startswith("step_00000002/")]


def test_managers_of_several_processes_share_a_bucket(place: Place) -> None:
    assert place.remote is not None
    environment, url = place.remote.environment, place.url()
    assert returned(run_processes(run_manager, 4, arguments=(environment, url, 4))) == [[1, 3, 4]] * 4
    puts = [request.name for request in place.remote.proxy.requests if request.kind == "put"]
    assert sum(name.endswith("manifest.msgpack") for name in puts) == 4
    assert returned(run_processes(run_manager, 2, arguments=(environment, url, 6))) == [[1, 5, 6]] * 2
    manager = CheckpointManager(url)
    assert manager.steps() == [1, 5, 6]
    np.testing.assert_array_equal(
        np.asarray(manager.restore(6)["rows"]), np.arange(64 * 96, dtype=np.float32).reshape(64, 96) + 6
    )
    assert jaxckpt.verify(manager.path_of(6)).ok
    assert {name.partition("/")[0] for name in place.objects()} == {
        "checkpoint.json",
        "step_00000001",
        "step_00000005",
        "step_00000006",
    }


# --- two tiers, and files of other libraries ------------------------------------------------------------------


def test_steps_go_to_the_bucket_and_come_back_from_it(place: Place, tmp_path: pathlib.Path) -> None:
    url = place.url()
    options = UploadOptions(max_to_keep=3)
    with CheckpointManager(tmp_path / "run", max_to_keep=1, upload_to=url, upload=options) as manager:
        for step in range(5):
            manager.save(step, tree_of(step), metrics={"loss": step})
            manager.wait()
        assert manager.steps() == [2, 3, 4]
    assert CheckpointManager(tmp_path / "run").steps() == [4]
    assert CheckpointManager(url).steps() == [2, 3, 4]
    assert all(jaxckpt.verify(CheckpointManager(url).path_of(step)).ok for step in (2, 3, 4))
    # Another machine, whose directory is empty.
    with CheckpointManager(tmp_path / "other", upload_to=url, upload=options) as manager:
        resumed = manager.resume(like=tree_of(0))
        assert resumed is not None
        step, tree = resumed
        assert step == 4
        assert_same_tree(tree, tree_of(4))
        manager.save(5, tree_of(5)).wait()
    assert CheckpointManager(url).steps() == [3, 4, 5]


def test_files_of_safetensors_in_a_bucket_are_written_and_read_by_ranges(place: Place) -> None:
    tree = {"large": np.arange(MIB, dtype=np.float32).reshape(1024, 1024), "small": np.arange(3)}
    safetensors.write(place.url("model.safetensors"), tree)
    assert place.remote is not None
    place.remote.proxy.reset()
    opened = safetensors.open(place.url("model.safetensors"))
    np.testing.assert_array_equal(opened["large"][10:20], tree["large"][10:20])
    assert sum(request.answer_bytes for request in place.remote.proxy.requests) < MIB
    assert_same_tree(safetensors.read(place.url("model.safetensors"), like=tree), tree)
    assert main(["convert", place.url("model.safetensors"), place.url("converted")]) == 0
    assert_same_tree(jaxckpt.restore(place.url("converted"), like=tree), tree)


def test_a_checkpoint_of_orbax_in_a_bucket_is_read_and_converted(place: Place) -> None:
    # As it was copied there, with the mark that Orbax leaves on object stores.
    golden = GOLDEN / "orbax" / "0.11.26-manager"
    store = open_store(place.url("orbax"))
    for path in sorted(golden.rglob("*")):
        if path.is_file():
            store.put(path.relative_to(golden).as_posix(), path.read_bytes())
    steps = [path.name for path in golden.iterdir() if path.name.isdigit()]
    for step in steps:
        store.put(f"{step}/commit_success.txt", b"")
        for item in (golden / step).iterdir():
            if item.is_dir():
                store.put(f"{step}/{item.name}/commit_success.txt", b"")
    here = orbax.read(golden, item="state")
    assert_same_tree(orbax.read(place.url("orbax"), item="state"), here)
    assert main(["convert", place.url("orbax"), place.url("converted")]) == 0
    assert CheckpointManager(place.url("converted")).steps() == sorted(map(int, steps))
