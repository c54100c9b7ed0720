"""Two tiers: steps are committed to a directory and uploaded from there; what is read comes from the nearest whole one.

The second tier is a directory, ``memory://``, or a `Bucket`, which behaves as object stores do and can be held up,
refused and counted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import Best, CheckpointManager, Preemption, SaveOptions, UploadOptions
from jaxckpt._copying import copy_checkpoint
from jaxckpt._keeping import Keeper
from jaxckpt._retention import Retention, steps_to_delete
from jaxckpt._steps import StepDirectory
from jaxckpt._storage import Buffer, ObjectWriter, Store
from jaxckpt._store import Kernel, LocalStore
from jaxckpt._uploading import Uploader

from .helpers import assert_same_tree, run_fork
from .processes import Worker, run_processes
from .storage_faults import Journal, KillingKernel, NotedKernel
from .test_crashes import in_child
from .test_manager import MANIFEST, Events, name_of, save_steps, tree_of
from .test_manager_group import assert_is_step, returned_alike, tree_of as global_tree
from .test_many_processes import global_mesh

KIB = 1 << 10
ONCE = UploadOptions(attempts=1)


class Bucket(Store):
    """An object store in this process: an object is there when it was put whole, and there are no locks.

    Attributes:
      before: Called with what is done and the path of the object; may raise or wait.
      calls: What was done.
      writing_bytes: Bytes of objects that are being written; `writing_bytes_peak` is the most that they were.
    """

    is_remote = True

    def __init__(self, before: Callable[[str, str], None] | None = None, path: str = "bucket://run") -> None:
        self.path = path
        self.before = before
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.writing_bytes = 0
        self.writing_bytes_peak = 0
        self.lock = threading.Lock()
        self._root = self

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}".removeprefix(f"{self._root.path}/")

    def _tell(self, call: str, name: str) -> None:
        root = self._root
        if root.before is not None:
            root.before(call, self._key(name))
        with root.lock:
            root.calls.append((call, self._key(name)))

    def puts(self) -> list[str]:
        return [path for call, path in self._root.calls if call == "put"]

    def child(self, name: str) -> Store:
        child = Bucket(path=f"{self.path}/{name}")
        child._root = self._root
        return child

    def put(self, name: str, data: bytes) -> None:
        self._tell("put", name)
        self._root.objects[self._key(name)] = bytes(data)

    def create(self, name: str, length: int) -> ObjectWriter:
        return BucketWriter(self, name, length)

    def publish(self, name: str, data: bytes) -> None:
        self.put(name, data)

    def read(self, name: str, bytes_max: int) -> bytes:
        self._tell("get", name)
        data = self._root.objects.get(self._key(name))
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", name)
        return data

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        data = self.read(name, 0)[offset : offset + len(buffer)]
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)

    def has_length(self, name: str, length: int) -> bool:
        return len(self.read(name, 0)) == length

    def exists(self, name: str) -> bool:
        return self._key(name) in self._root.objects

    def fingerprint(self, name: str) -> Any:
        return self._root.objects.get(self._key(name))

    def names(self) -> list[str]:
        self._tell("list", "")
        start = self._key("")
        paths = [path for path in list(self._root.objects) if path.startswith(start)]
        return sorted({path.removeprefix(start).partition("/")[0] for path in paths})

    def delete(self, name: str) -> None:
        self._tell("delete", name)
        self._root.objects.pop(self._key(name), None)

    def delete_tree(self, name: str) -> None:
        for path in list(self._root.objects):
            if path.startswith(f"{self._key(name)}/"):
                self._tell("delete", path.removeprefix(self._key("")))
                self._root.objects.pop(path, None)

    def sync(self) -> None: ...
    def confirm(self) -> None: ...
    def remove_if_empty(self) -> None: ...
    def make_directory(self, name: str) -> None: ...


class BucketWriter(ObjectWriter):
    def __init__(self, bucket: Bucket, name: str, length: int) -> None:
        self._bucket = bucket
        self._name = name
        self._data = np.empty(length, np.uint8)
        self._count(length)

    def _count(self, nbytes: int) -> None:
        root = self._bucket._root
        with root.lock:
            root.writing_bytes += nbytes
            root.writing_bytes_peak = max(root.writing_bytes_peak, root.writing_bytes)

    def write(self, offset: int, data: Buffer) -> None:
        self._data[offset : offset + len(data)] = data

    def finish(self) -> None:
        self._bucket.put(self._name, self._data.tobytes())
        self.abandon()

    def abandon(self) -> None:
        self._count(-len(self._data))
        self._data = self._data[:0]


class Gate:
    """Stops the first call on a path with this in it until the test opens it."""

    def __init__(self, where: str, call: str = "put") -> None:
        self._where = where
        self._call = call
        self.reached = threading.Event()
        self.may_go_on = threading.Event()

    def __call__(self, call: str, path: str) -> None:
        if call == self._call and self._where in path and not self.reached.is_set():
            self.reached.set()
            assert self.may_go_on.wait(60)


class Outage:
    """Refuses every call from the one with a number on, until it is mended."""

    def __init__(self, at: int = 1, calls: tuple[str, ...] = ("put", "list")) -> None:
        self._left = at
        self._calls = calls
        self._lock = threading.Lock()

    def __call__(self, call: str, path: str) -> None:
        with self._lock:
            self._left -= call in self._calls
            if self._left <= 0 and call in self._calls:
                raise OSError(errno.ECONNREFUSED, "the network is down", path)

    def mend(self) -> None:
        self._left = 1 << 60


@pytest.fixture
def local(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "local"


def rich_tree(step: int) -> dict[str, Any]:
    """Chunks of their own and packed ones, PRNG keys, values, long strings."""
    return {
        "large": jnp.arange(300_000, dtype=jnp.float32) + step,
        "small": [jnp.full((7,), step), np.arange(5), jax.random.key(step)],
        "text": "x" * 10_000,
        "n": step,
    }


SMALL_CHUNKS = SaveOptions(chunk_bytes_max=400_000, pack_bytes_max=100_000)


def records_of(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def data_of(root: pathlib.Path, step: int) -> pathlib.Path:
    return max((root / name_of(step)).glob("data-*/packs/*"))  # that of the last process


def flip_a_bit(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def keepers_of(*stores: Store) -> list[Keeper]:
    """Of each of the places, with rules that keep everything."""
    return [
        Keeper(
            StepDirectory(store, "step_", 8), Retention(max_to_keep=None), lambda: 0.0, lambda *_, **__: None
        )
        for store in stores
    ]


DAMAGES: dict[str, Callable[[pathlib.Path, int], None]] = {
    "a bit of the data": lambda root, step: flip_a_bit(data_of(root, step)),
    "a bit of the manifest": lambda root, step: flip_a_bit(root / name_of(step) / MANIFEST),
    "short data": lambda root, step: os.truncate(data_of(root, step), 3),
    "missing object": lambda root, step: data_of(root, step).unlink(),
    "missing data": lambda root, step: shutil.rmtree(data_of(root, step).parent.parent),
}


def files_of(root: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def steps_in(place: Any) -> list[int]:
    return CheckpointManager(place).steps()


def assert_whole(place: Any, steps: list[int]) -> None:
    """The place holds exactly these steps, whole, and nothing of any other."""
    manager = CheckpointManager(place)
    assert manager.steps() == steps
    store = manager._directory._store
    assert store.names() == sorted(["checkpoint.json", *map(name_of, steps)] if steps else [])
    for step in steps:
        assert jaxckpt.verify(manager._directory.store_of(step)).ok
        inside = store.child(name_of(step)).names()
        assert [name.partition("-")[0] for name in inside] == ["data", MANIFEST, "zarr.json"]
        assert_same_tree(manager.restore(step), tree_of(step))


# --- the life of a manager ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["directory", "memory", "bucket"])
def test_steps_go_through_both_tiers_and_come_back_when_the_machine_is_gone(
    kind: str, local: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    places: dict[str, Any] = {
        "directory": tmp_path / "remote",
        "memory": f"memory://test_tiers/{tmp_path.name}",
        "bucket": Bucket(),
    }
    remote = places[kind]
    events = Events()
    upload = UploadOptions(max_to_keep=2, keep_period=3, best=Best("loss"))
    with CheckpointManager(local, max_to_keep=1, upload_to=remote, upload=upload, on_event=events) as manager:
        for step in range(1, 9):
            manager.save(step, tree_of(step), metrics={"loss": abs(step - 2)}, items={"seen": step * 10})
            manager.wait()
        assert manager.steps() == [2, 3, 6, 7, 8]
        assert manager.best_step(Best("loss")) == 2
        assert manager.metrics(2) == {"loss": 0}
        assert manager.path_of(8) == str(local / name_of(8))
    assert events.steps("uploaded") == list(range(1, 9))
    assert events.steps("upload deleted") == [1, 4, 5]
    assert_whole(local, [8])
    assert_whole(remote, [2, 3, 6, 7, 8])

    shutil.rmtree(local)
    manager = CheckpointManager(local, max_to_keep=1, upload_to=remote, upload=upload)
    step, tree = manager.resume() or (0, None)
    assert step == 8
    assert_same_tree(tree, tree_of(8))
    assert manager.open().items == {"seen": 80}
    assert not local.exists()
    assert manager.save(8, tree_of(0)) is None
    manager.save(9, tree_of(9))
    manager.close()
    assert_whole(local, [9])
    assert steps_in(remote) == [2, 3, 6, 8, 9]


def test_an_upload_is_the_same_checkpoint_byte_for_byte(local: pathlib.Path, tmp_path: pathlib.Path) -> None:
    remote = tmp_path / "remote"
    double = jaxckpt.Program(lambda tree: tree["n"] * 2)
    with CheckpointManager(local, upload_to=remote, options=SMALL_CHUNKS) as manager:
        manager.save(1, rich_tree(1), items={"a": [1, 2]}, metadata={"b": 3}, programs={"double": double})
        manager.wait()
        manager.pin(1)
        manager.save(2, rich_tree(2)).wait()
        manager.pin(2)
    for step in (1, 2):
        files = files_of(remote / name_of(step))
        assert files == files_of(local / name_of(step))
        assert len(files) >= 9
        assert jaxckpt.verify(remote / name_of(step)).ok
        assert_same_tree(jaxckpt.restore(remote / name_of(step)), rich_tree(step))
    assert jaxckpt.open(remote / name_of(1)).program("double", trust=True)() == 2
    assert json.loads((remote / "checkpoint.json").read_text())["latest"] == name_of(2)


def test_the_local_tier_may_be_memory(tmp_path: pathlib.Path) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="jaxckpt-") as memory:
        with CheckpointManager(f"{memory}/run", max_to_keep=1, upload_to=tmp_path / "remote") as manager:
            for step in (1, 2):
                manager.save(step, tree_of(step))
        assert steps_in(f"{memory}/run") == [2]
    with CheckpointManager(f"{memory}/run", upload_to=tmp_path / "remote") as manager:
        assert_same_tree(manager.resume(), (2, tree_of(2)))


def test_who_only_reads_uploads_nothing(local: pathlib.Path) -> None:
    save_steps(local, 1, 2)
    bucket = Bucket()
    with CheckpointManager(local, upload_to=bucket) as manager:
        assert_same_tree(manager.resume(), (2, tree_of(2)))
        assert manager.steps() == [1, 2]
        assert list(manager.watch(timeout_s=0)) == [2]
        manager.wait()
    assert bucket.puts() == []


@pytest.mark.parametrize("value", [-1, 0])
def test_what_cannot_be_is_refused(local: pathlib.Path, value: int) -> None:
    with pytest.raises(ValueError, match="no upload_to="):
        CheckpointManager(local, upload=UploadOptions())
    with pytest.raises(ValueError, match="another place"):
        CheckpointManager(local, upload_to=local)
    for name in ("interval_steps", "attempts", "io_threads", "host_bytes_max", "max_to_keep", "keep_period"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            UploadOptions(**{name: value})
    with pytest.raises(ValueError, match="waiting_max"):
        UploadOptions(waiting_max=-1)


# --- which steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"max_to_keep": 1},
        {"max_to_keep": 2, "best": Best("loss", keep=2)},
        {"keep_interval_s": 25.0, "max_to_keep": 1},
    ],
    ids=["all", "one", "best", "interval"],
)
def test_each_tier_keeps_what_its_own_rules_say(local: pathlib.Path, rules: dict[str, Any]) -> None:
    now_s = [1e9]
    bucket = Bucket()
    with CheckpointManager(
        local, max_to_keep=2, upload_to=bucket, upload=UploadOptions(**rules), wall_s=lambda: now_s[0]
    ) as manager:
        for step in range(10):
            now_s[0] += 10
            manager.save(step, tree_of(step), metrics={"loss": (step * 7) % 10})
            manager.wait()
    fields = rules | {"best": (rules["best"],) if "best" in rules else ()}
    policy = Retention(**({"max_to_keep": None} | fields))
    times_s = [1e9 + 10 * (step + 1) for step in range(10)]
    metrics = [{"loss": (step * 7) % 10} for step in range(10)]
    gone = steps_to_delete(range(10), times_s, metrics, policy, now_s[0])
    assert_whole(bucket, [step for step in range(10) if step not in gone])
    assert_whole(local, [8, 9])


def test_steps_between_the_multiples_are_not_uploaded_but_for_the_last(local: pathlib.Path) -> None:
    bucket = Bucket()
    with CheckpointManager(
        local, max_to_keep=2, upload_to=bucket, upload=UploadOptions(interval_steps=10)
    ) as manager:
        for step in (4, 8, 11, 13, 20, 24, 33, 35):
            manager.save(step, tree_of(step))
            manager.wait()
        assert steps_in(bucket) == [4, 11, 20, 33]
    assert_whole(bucket, [4, 11, 20, 33, 35])
    assert_whole(local, [33, 35])


def test_a_pin_goes_along_and_is_taken_away_in_both(local: pathlib.Path) -> None:
    bucket = Bucket()
    upload = UploadOptions(max_to_keep=1)
    with CheckpointManager(local, max_to_keep=1, upload_to=bucket, upload=upload) as manager:
        manager.save(1, tree_of(1)).wait()
        manager.pin(1)
        for step in (2, 3):
            manager.save(step, tree_of(step))
            manager.wait()
        assert steps_in(bucket) == [1, 3]
        manager.unpin(1)
        manager.save(4, tree_of(4))
    assert steps_in(bucket) == [4]


def test_a_step_that_only_the_second_tier_has_is_there(
    local: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket()
    save_steps(bucket, 1, 2)
    with CheckpointManager(local, upload_to=bucket) as manager:
        assert manager.save(2, tree_of(20)) is None
        (warning,) = records_of(caplog, logging.WARNING)
        assert "step 2 is not saved: it is in 'bucket://run' already" in warning
        assert manager.save(2, tree_of(20), force=True, overwrite=True) is not None
        manager.wait()
    assert_same_tree(jaxckpt.restore(bucket.child(name_of(2))), tree_of(20))
    assert bucket.child(name_of(2)).names()[1:] == [MANIFEST, "zarr.json"]


def test_whether_a_step_is_there_is_found_out_before_it_is_saved_but_not_for_ever(
    local: pathlib.Path,
) -> None:
    bucket = Bucket()
    save_steps(bucket, 1, 2)
    bucket.before = gate = Gate("", "list")
    manager = CheckpointManager(local, upload_to=bucket)
    manager._uploader.wake_first()
    assert gate.reached.wait(60)
    opening = threading.Timer(0.2, gate.may_go_on.set)
    opening.start()
    assert manager.save(2, tree_of(20)) is None  # waits
    opening.join()
    manager.close()

    bucket.before = gate = Gate("", "list")
    keepers = keepers_of(LocalStore(str(local)), bucket)
    uploader = Uploader(
        *keepers, UploadOptions(), lambda *_, **__: None, lambda *_: None, lambda: 0.0, look_s=0.01
    )
    uploader.wake()
    assert gate.reached.wait(60)
    assert not uploader.is_there(2)
    gate.may_go_on.set()
    assert uploader.wait(60)
    assert uploader.is_there(2)


def test_a_step_that_the_second_tier_has_deleted_is_not_there(local: pathlib.Path) -> None:
    bucket = Bucket()
    upload = UploadOptions(max_to_keep=1)
    with CheckpointManager(local, max_to_keep=1, upload_to=bucket, upload=upload) as manager:
        for step in (1, 2, 3):
            manager.save(step, tree_of(step))
            manager.wait()
        assert manager.save(2, tree_of(2), force=True) is not None


def test_what_this_manager_saved_is_younger_whatever_the_clock_says(local: pathlib.Path) -> None:
    bucket = Bucket()
    now_s = [100.0]
    with CheckpointManager(local, upload_to=bucket, wall_s=lambda: now_s[0]) as manager:
        manager.save(1, tree_of(10))
        manager.wait()
        now_s[0] = 50.0
        manager.save(1, tree_of(1), overwrite=True)
    assert_whole(bucket, [1])


def test_what_replaces_another_step_is_due_between_the_multiples_too(local: pathlib.Path) -> None:
    bucket = Bucket()
    arguments: dict[str, Any] = {"upload_to": bucket, "upload": UploadOptions(interval_steps=10)}
    with CheckpointManager(local, **arguments) as manager:
        manager.save(30, tree_of(30))
        manager.save(35, tree_of(0))
    with CheckpointManager(local, **arguments) as manager:
        manager.save(35, tree_of(35), force=True, overwrite=True)
        manager.save(36, tree_of(36))
    assert_whole(bucket, [30, 35, 36])


def test_of_two_different_steps_the_younger_one_stays(local: pathlib.Path) -> None:
    bucket = Bucket()
    now_s = [100.0]
    save_steps(local, 1, wall_s=lambda: 50.0)
    save_steps(local, 2, wall_s=lambda: 150.0)
    save_steps(bucket, 1, 2, wall_s=lambda: now_s[0])
    before = {path: data for path, data in bucket.objects.items() if name_of(1) in path}
    with CheckpointManager(local, upload_to=bucket) as manager:
        manager.save(3, tree_of(3))
    assert {path: data for path, data in bucket.objects.items() if name_of(1) in path} == before
    for name in ("manifest.msgpack", "zarr.json"):
        assert bucket.objects[f"{name_of(2)}/{name}"] == (local / name_of(2) / name).read_bytes()
    assert_whole(bucket, [1, 2, 3])


def test_deleting_a_step_deletes_it_in_both_and_cuts_off_its_upload(local: pathlib.Path) -> None:
    gate = Gate(f"{name_of(2)}/data-")
    bucket = Bucket(gate)
    with CheckpointManager(local, upload_to=bucket) as manager:
        manager.save(1, tree_of(1))
        manager.wait()
        manager.delete(1)
        manager.save(2, tree_of(2)).wait()
        assert gate.reached.wait(60)
        deleting = threading.Thread(target=manager.delete, args=(2,))
        deleting.start()
        while 2 not in manager._uploader._barred:
            deleting.join(0.001)
        gate.may_go_on.set()
        deleting.join(60)
        with pytest.raises(jaxckpt.NotFoundError, match=r"no step 1 in .*\n.*no step 1 in 'bucket"):
            manager.restore(1)
        manager.save(3, tree_of(3))
    assert_whole(local, [3])
    assert_whole(bucket, [3])


def test_a_step_that_a_rule_deletes_at_the_same_moment_is_deleted(local: pathlib.Path) -> None:
    bucket = Bucket()
    near = Bucket(lambda call, _: bucket.objects.clear() if call == "delete" else None, "bucket://near")
    for place in (near, bucket):
        save_steps(place, 1, 2)
    manager = CheckpointManager(near, upload_to=bucket)
    manager.delete(1)
    assert steps_in(near) == [2]
    with pytest.raises(jaxckpt.NotFoundError, match="no step 1"):
        manager.delete(1)


def test_pruning_spares_what_still_has_to_be_uploaded(local: pathlib.Path) -> None:
    bucket = Bucket()
    save_steps(local, *range(6))
    files = files_of(local)
    bucket.objects = {path: data for path, data in files.items() if path.startswith((name_of(0), name_of(4)))}
    manager = CheckpointManager(local, max_to_keep=1, upload_to=bucket, upload=UploadOptions(waiting_max=2))
    assert manager.prune() == [0, 1, 4]
    assert steps_in(local) == [2, 3, 5]


# --- a slow second tier ---------------------------------------------------------------------------------------


def test_a_slow_second_tier_neither_blocks_training_nor_fills_the_disk(
    local: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(f"{name_of(1)}/data-")
    bucket = Bucket(gate)
    events = Events()
    upload = UploadOptions(waiting_max=2)
    with CheckpointManager(local, max_to_keep=2, upload_to=bucket, upload=upload, on_event=events) as manager:
        for step in range(1, 9):
            manager.save(step, tree_of(step)).wait()
            manager._background.wait_until_idle()
            if step == 1:
                assert gate.reached.wait(60)
            # Two by the rules, two that wait, and the one that is being uploaded.
            assert len(steps_in(local)) <= 5
        assert steps_in(local) == [1, 5, 6, 7, 8]
        with pytest.raises(TimeoutError, match="uploads to 'bucket://run' are not finished"):
            manager.wait(0.01)
        assert events.steps("uploaded") == []
        gate.may_go_on.set()
    assert events.steps("uploaded") == [1, 8, 7, 6, 5]
    assert events.steps("upload skipped") == [2, 3, 4]
    warnings = records_of(caplog, logging.WARNING)
    assert warnings[0] == "step 2 is deleted before it was uploaded: 2 others wait, too"
    assert len(warnings) == 3
    assert_whole(local, [7, 8])
    assert_whole(bucket, [1, 5, 6, 7, 8])


def test_of_many_that_wait_those_are_let_go_that_would_not_stay_for_long(local: pathlib.Path) -> None:
    gate = Gate(f"{name_of(1)}/data-")
    bucket = Bucket(gate)
    upload = UploadOptions(max_to_keep=9, keep_period=4, waiting_max=2)
    with CheckpointManager(local, max_to_keep=1, upload_to=bucket, upload=upload) as manager:
        for step in range(1, 12):
            manager.save(step, tree_of(step)).wait()
            manager._background.wait_until_idle()
            if step == 1:
                assert gate.reached.wait(60)
            assert len(steps_in(local)) <= 4
        gate.may_go_on.set()
    assert_whole(local, [11])
    assert_whole(bucket, [1, 4, 8, 11])


def test_after_a_preemption_the_end_waits_no_longer_than_the_grace(
    local: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate("data-")
    bucket = Bucket(gate)
    preemption = Preemption((), grace_s=5, clock=lambda: clock_s[0])
    clock_s = [0.0]
    manager = CheckpointManager(local, upload_to=bucket, preemption=preemption)
    preemption.request()
    manager.save(1, tree_of(1)).wait()
    assert gate.reached.wait(60)
    clock_s[0] = 6.0
    manager.close()
    (warning,) = [text for text in records_of(caplog, logging.WARNING) if "upload" in text]
    assert warning == "no time is left to upload to 'bucket://run'; the next run goes on with step 1"
    gate.may_go_on.set()
    assert manager._uploader.wait(60)
    assert steps_in(bucket) == []
    with CheckpointManager(local, upload_to=bucket) as manager:
        manager.save(1, tree_of(1))
    assert_whole(bucket, [1])


def test_a_preemption_or_an_interrupt_while_the_end_waits_ends_that(local: pathlib.Path) -> None:
    class Interrupt(BaseException):
        pass

    class Grace:
        """None is announced when it is asked first, then there is one, and then none is left."""

        def __init__(self, *answers: float | None) -> None:
            self._answers = [*answers]

        def __call__(self) -> float | None:
            if not self._answers:
                raise Interrupt
            return self._answers.pop(0)

    save_steps(local, 1, 2)
    for grace in (Grace(None, 0.01, 0.0), Grace(None)):
        gate = Gate("data-")
        bucket = Bucket(gate)
        uploader = Uploader(
            *keepers_of(LocalStore(str(local)), bucket),
            UploadOptions(io_threads=1),
            lambda *_, **__: None,
            lambda *_: None,
            lambda: 0.0,
        )
        uploader.wake()
        assert gate.reached.wait(60)
        with contextlib.suppress(Interrupt):
            uploader.finish(grace)
        gate.may_go_on.set()
        assert uploader.wait(60)
        assert len([path for path in bucket.puts() if "data-" in path]) == 1
        assert steps_in(bucket) == []


def test_after_the_end_a_network_that_is_down_is_asked_nothing_more(local: pathlib.Path) -> None:
    def interrupt() -> float:
        raise KeyboardInterrupt

    def break_down(call: str, path: str) -> None:
        if call == "list" and any(path.endswith(MANIFEST) for path in bucket.objects):
            asked.append(call)
            with contextlib.suppress(KeyboardInterrupt):
                uploader.finish(interrupt)
        if asked:
            asked.append(call)
            raise OSError(errno.ECONNREFUSED, "the network is down", path)

    save_steps(local, 1)
    asked: list[str] = []
    bucket = Bucket(break_down)
    keepers = keepers_of(LocalStore(str(local)), bucket)
    uploader = Uploader(*keepers, UploadOptions(), lambda *_, **__: None, lambda *_: None, lambda: 0.0)
    uploader.wake()
    assert uploader.wait(60)
    assert asked == ["list", "list"]


def test_when_the_network_breaks_down_among_deletions_the_end_waits_for_one_of_them(
    tmp_path: pathlib.Path,
) -> None:
    def interrupt() -> float:
        raise KeyboardInterrupt

    def break_down(call: str, path: str) -> None:
        if call == "delete":
            asked.append(path)
            with contextlib.suppress(KeyboardInterrupt):
                uploader.finish(interrupt)
            raise OSError(errno.ECONNREFUSED, "the network is down", path)

    asked: list[str] = []
    bucket = Bucket(break_down)
    save_steps(tmp_path, 1, 2, 3, 4)
    for step in (1, 2, 3):
        source = LocalStore(str(tmp_path / name_of(step)))
        copy_checkpoint(source, bucket.child(name_of(step)), io_threads=1, host_bytes_max=1)
    options = UploadOptions(max_to_keep=1)
    (local,) = keepers_of(LocalStore(str(tmp_path)))
    directory = StepDirectory(bucket, "step_", 8)
    remote = Keeper(directory, options.retention(), lambda: 0.0, lambda *_, **__: None)
    uploader = Uploader(local, remote, options, lambda *_, **__: None, lambda *_: None, lambda: 0.0)
    uploader.wake()
    assert uploader.wait(60)
    assert len(asked) == 1
    assert remote.explain()[-1].step == 4


def test_objects_in_flight_stay_within_their_bound(local: pathlib.Path) -> None:
    tree = {f"w{number}": np.full(100 * KIB, number, np.uint8) for number in range(20)}
    tree["large"] = np.zeros(900 * KIB, np.uint8)
    jaxckpt.save(local, tree, options=SaveOptions(pack_bytes_max=0))
    pause = threading.Event()  # never set

    def wait_for_others(call: str, path: str) -> None:
        """Time for the other threads to go beyond the bound, if they do."""
        del call, path
        pause.wait(0.01)

    for host_bytes_max, want in ((250 * KIB, 900 * KIB), (1000 * KIB, 1000 * KIB)):
        bucket = Bucket(wait_for_others)
        report = copy_checkpoint(LocalStore(str(local)), bucket, io_threads=8, host_bytes_max=host_bytes_max)
        assert report is not None
        assert report.bytes_sent > 2900 * KIB
        assert 900 * KIB <= bucket.writing_bytes_peak <= want
        assert bucket.writing_bytes == 0
        assert jaxckpt.verify(bucket).ok


def test_several_objects_are_in_flight_and_progress_is_told(local: pathlib.Path) -> None:
    together = threading.Barrier(4)

    def meet(call: str, path: str) -> None:
        if call == "put" and "/arrays/" in path and "/c." in path:
            together.wait(60)

    bucket = Bucket(meet)
    tree = {f"w{number}": np.full(100, number) for number in range(8)}
    told: list[jaxckpt.Progress] = []
    upload = UploadOptions(io_threads=4, on_progress=told.append)
    with CheckpointManager(
        local, upload_to=bucket, upload=upload, options=SaveOptions(pack_bytes_max=0)
    ) as manager:
        manager.save(1, tree)
    assert {progress.phase for progress in told} == {"upload"}
    assert told[-1].bytes_done == told[-1].bytes_total
    assert max(progress.bytes_done for progress in told) == told[0].bytes_total > 6400
    assert jaxckpt.verify(bucket.child(name_of(1))).ok


# --- failures -------------------------------------------------------------------------------------------------


def test_a_failed_upload_is_told_as_a_failed_save_is_and_tried_again(
    local: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    outage = Outage()
    bucket = Bucket(outage)
    events = Events()
    manager = CheckpointManager(local, upload_to=bucket, upload=ONCE, on_event=events)
    assert manager.save(1, tree_of(1)).wait().step == 1
    with pytest.raises(
        jaxckpt.WriteError, match=r"step 1 is not uploaded to 'bucket://run'.*network is down"
    ) as caught:
        manager.wait()
    assert caught.value.errno == errno.ECONNREFUSED
    assert records_of(caplog, logging.ERROR)[-1] == str(caught.value)
    assert 1 in events.steps("upload failed")
    manager.wait()  # it was told
    manager.save(2, tree_of(2)).wait()
    with contextlib.suppress(jaxckpt.WriteError):
        manager.wait()
    assert steps_in(local) == [1, 2]
    outage.mend()
    manager.save(3, tree_of(3))
    manager.close()
    assert events.steps("uploaded") == [3, 2, 1]
    assert_whole(bucket, [1, 2, 3])


def test_whatever_an_upload_fails_by_is_told(local: pathlib.Path) -> None:
    def refuse(call: str, path: str) -> None:
        if call == "put":
            raise MemoryError("for an object")

    manager = CheckpointManager(local, upload_to=Bucket(refuse), upload=ONCE)
    manager.save(1, tree_of(1)).wait()
    with pytest.raises(jaxckpt.WriteError, match=r"step 1 is not uploaded .* MemoryError: for an object"):
        manager.close()


@pytest.mark.parametrize("max_to_keep", [1, 5])
def test_what_cut_off_uploads_left_does_not_fill_the_second_tier(
    local: pathlib.Path, max_to_keep: int
) -> None:
    """Room for two steps and a bit, some of which a step has that could not be sent whole."""
    room_bytes = [1 << 60]

    def refuse(call: str, path: str) -> None:
        if call == "put" and sum(map(len, bucket.objects.values())) > room_bytes[0]:
            raise OSError(errno.ENOSPC, "no space is left", path)

    def large_tree(step: int) -> dict[str, Any]:
        return {"w": np.full(100_000, step, np.uint8), "v": np.full(100_000, step, np.uint8)}

    bucket = Bucket(refuse)
    arguments: dict[str, Any] = {
        "max_to_keep": max_to_keep,
        "upload_to": bucket,
        "upload": UploadOptions(attempts=1, max_to_keep=1, waiting_max=0),
        "options": SaveOptions(pack_bytes_max=0),
    }
    with CheckpointManager(local, **arguments) as manager:
        manager.save(1, large_tree(1))
        manager.wait()
        room_bytes[0] = 310_000  # which the third of these objects exceeds
        for step in (2, 3):
            manager.save(step, large_tree(step)).wait()
            with pytest.raises(jaxckpt.WriteError, match="no space is left"):
                manager.wait()
        room_bytes[0] = 410_000
        manager.save(4, large_tree(4))
    assert steps_in(bucket) == [4]
    assert {path.partition("/")[0] for path in bucket.objects} == {name_of(4), "checkpoint.json"}


def test_a_failure_that_nobody_has_seen_is_raised_at_the_end(local: pathlib.Path) -> None:
    manager = CheckpointManager(local, upload_to=Bucket(Outage(3)), upload=ONCE)
    manager.save(1, tree_of(1)).wait()
    with pytest.raises(jaxckpt.WriteError, match="network is down"):
        manager.close()
    assert_whole(local, [1])


@pytest.mark.parametrize("refused", [{2}, {1, 2}])
def test_a_failed_step_is_tried_again_with_growing_pauses_and_does_not_keep_the_others(
    local: pathlib.Path, refused: set[int]
) -> None:
    def refuse(call: str, path: str) -> None:
        if call == "put" and any(name_of(step) in path for step in refused):
            raise OSError(errno.EFBIG, "too large", path)

    save_steps(local, 1, 2, 3)
    ended: list[tuple[int, bool]] = []
    pauses_s: list[float] = []
    bucket = Bucket(refuse)
    uploader = Uploader(
        *keepers_of(LocalStore(str(local)), bucket),
        UploadOptions(attempts=4),
        lambda *_, **__: None,
        lambda step, error: ended.append((step, error is None)),
        lambda: 0.0,
        pauses_s.append,
    )
    uploader.wake()
    assert uploader.wait(60)
    assert pauses_s == [1.0, 2.0, 4.0]
    assert ended == [(3, True), (2, False), (1, 1 not in refused)]
    assert steps_in(bucket) == sorted({1, 2, 3} - refused)


@pytest.mark.parametrize("damage", ["a bit of the data", "short data", "missing object", "missing data"])
def test_damage_is_not_uploaded(local: pathlib.Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(local, 1, 2)
    DAMAGES[damage](local, 2)
    bucket = Bucket()
    manager = CheckpointManager(local, upload_to=bucket)
    manager.save(3, tree_of(3)).wait()
    with pytest.raises(jaxckpt.CorruptError, match=r"step 2 is not uploaded to 'bucket://run'") as caught:
        manager.wait()
    assert caught.value.problems
    assert any("damaged" in text for text in records_of(caplog, logging.ERROR))
    assert manager.steps() == [1, 3]
    manager.save(4, tree_of(4))
    manager.close()
    assert CheckpointManager(bucket).steps() == [1, 3, 4]
    assert not [path for path in bucket.objects if path.startswith(f"{name_of(2)}/{MANIFEST}")]


@pytest.mark.parametrize("offset", [0, 399_999, 1_048_576, 2_000_000])
def test_every_byte_of_an_object_is_compared(local: pathlib.Path, offset: int) -> None:
    """Chunks of more than a block, and a pack of chunks of odd lengths that are no multiples of a piece."""
    tree = {"large": np.arange(600_000, dtype=np.float32)} | {
        f"w{number}": np.full(99_991, number, np.uint8) for number in range(30)
    }
    jaxckpt.save(local, tree, options=SaveOptions(pack_bytes_max=1_000_000))
    source = LocalStore(str(local))
    assert copy_checkpoint(source, Bucket(), io_threads=2, host_bytes_max=1) is not None
    objects = sorted((file for file in local.rglob("*") if file.stat().st_size > 2_000_000), key=str)
    assert len(objects) == 2
    for file in objects:
        whole = file.read_bytes()
        file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        bucket = Bucket()
        with pytest.raises(jaxckpt.CorruptError, match="checksum"):
            copy_checkpoint(source, bucket, io_threads=2, host_bytes_max=1)
        assert MANIFEST not in bucket.objects
        file.write_bytes(whole)


def test_what_is_damaged_in_one_tier_is_read_from_the_other(
    local: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = tmp_path / "remote"
    with CheckpointManager(local, upload_to=remote) as manager:
        for step in (1, 2, 3):
            manager.save(step, tree_of(step))
    for damage in DAMAGES.values():
        shutil.rmtree(local)
        shutil.copytree(remote, local)
        damage(local, 3)
        for read in (
            lambda manager: manager.restore(3),
            lambda manager: manager.restore(fallback=False),
            lambda manager: (manager.resume() or (0, None))[1],
        ):
            caplog.clear()
            manager = CheckpointManager(local, upload_to=remote)
            assert_same_tree(read(manager), tree_of(3))
            (error,) = records_of(caplog, logging.ERROR)
            assert f"step 3 in '{local}' is damaged, the next tier is tried" in error
            assert manager.steps() == [1, 2, 3]
            assert manager.save(3, tree_of(3)) is None
        assert manager.open(3)["n"][()] == 3
    shutil.rmtree(local)
    shutil.copytree(remote, local)
    flip = DAMAGES["a bit of the data"]
    flip(remote, 3)
    assert_same_tree(CheckpointManager(local, upload_to=remote).resume(), (3, tree_of(3)))
    flip(local, 3)
    assert_same_tree(CheckpointManager(local, upload_to=remote).resume(), (2, tree_of(2)))
    with pytest.raises(jaxckpt.CorruptError):
        CheckpointManager(local, upload_to=remote).restore(3)
    with pytest.raises(jaxckpt.CorruptError):
        CheckpointManager(local, upload_to=remote).restore(fallback=False)


def test_a_second_tier_that_cannot_be_listed_is_no_empty_one(local: pathlib.Path) -> None:
    save_steps(local, 1)
    manager = CheckpointManager(local, upload_to=Bucket(Outage()))
    with pytest.raises(OSError, match="network is down"):
        manager.resume()
    assert_same_tree(manager.restore(1), tree_of(1))


# --- crashes --------------------------------------------------------------------------------------------------


def test_what_was_sent_before_a_failure_is_not_sent_again(local: pathlib.Path) -> None:
    with CheckpointManager(local, options=SMALL_CHUNKS) as manager:
        manager.save(1, rich_tree(1))
    objects = len(files_of(local / name_of(1)))
    for at in range(2, objects + 2):  # the last one is checkpoint.json
        outage = Outage(at, ("put",))
        bucket = Bucket(outage)
        manager = CheckpointManager(local, upload_to=bucket, upload=ONCE)
        manager.save(1, rich_tree(1))
        with contextlib.suppress(jaxckpt.WriteError):
            manager.close()
        assert steps_in(bucket) == ([] if at <= objects else [1])
        sent = set(bucket.objects) - {f"{name_of(1)}/zarr.json"}
        outage.mend()
        bucket.calls.clear()
        with CheckpointManager(local, upload_to=bucket) as manager:
            manager.save(1, rich_tree(1))
        assert not sent & {*bucket.puts()}
        assert jaxckpt.verify(bucket.child(name_of(1))).ok
        want = {f"{name_of(1)}/{name}": data for name, data in files_of(local / name_of(1)).items()}
        assert {path: data for path, data in bucket.objects.items() if path != "checkpoint.json"} == want


def test_what_was_sent_stays_while_other_steps_are_uploaded(local: pathlib.Path) -> None:
    save_steps(local, 1, 2)
    outage = Outage(3, ("put",))
    bucket = Bucket(lambda call, path: outage(call, path) if name_of(2) in path else None)
    manager = CheckpointManager(local, upload_to=bucket, upload=ONCE)
    manager.save(2, tree_of(2))
    with contextlib.suppress(jaxckpt.WriteError):
        manager.close()
    assert steps_in(bucket) == [1]
    sent = {path for path in bucket.objects if f"{name_of(2)}/data-" in path}
    assert sent
    outage.mend()
    bucket.calls.clear()
    with CheckpointManager(local, upload_to=bucket) as manager:
        manager.save(2, tree_of(2))
    assert not sent & {*bucket.puts()}
    assert_whole(bucket, [1, 2])


def test_half_an_object_is_sent_again(local: pathlib.Path) -> None:
    save_steps(local, 1)
    bucket = Bucket()
    (data,) = (local / name_of(1)).glob("data-*")
    for file in data.rglob("*"):
        if file.is_file():
            bucket.objects[f"{name_of(1)}/{file.relative_to(data.parent)}"] = file.read_bytes()[:-1]
    with CheckpointManager(local, upload_to=bucket) as manager:
        manager.save(1, tree_of(1))
    assert_whole(bucket, [1])


def test_what_an_upload_left_of_a_step_that_is_gone_is_swept(local: pathlib.Path) -> None:
    save_steps(local, 1, 2)
    outage = Outage(3, ("put",))
    bucket = Bucket(outage)
    manager = CheckpointManager(local, upload_to=bucket, upload=ONCE)
    manager.save(2, tree_of(2))
    with contextlib.suppress(jaxckpt.WriteError):
        manager.close()
    assert bucket.names() == [name_of(2)]
    shutil.rmtree(local / name_of(2))
    outage.mend()
    with CheckpointManager(local, upload_to=bucket) as manager:
        manager.save(3, tree_of(3))
    assert_whole(bucket, [1, 3])


def upload_one(local: pathlib.Path, remote: pathlib.Path, kernel: Kernel | None = None) -> None:
    store = LocalStore(str(remote), kernel)
    upload = UploadOptions(attempts=1, io_threads=2)
    with CheckpointManager(local, upload_to=store, upload=upload) as manager:
        manager.save(1, {"w": np.zeros(3)})  # it is there, and the first call uploads it


def kill_uploads(root: pathlib.Path) -> dict[str, int]:
    """Kills an upload at every single operation of the second tier, and lets the next run go on."""
    logging.getLogger("jaxckpt").setLevel(logging.ERROR)
    tree = {"w": np.arange(300_000, dtype=np.float32), "n": [1, 2, np.arange(9)]}
    local = root / "local"
    with CheckpointManager(local, options=SMALL_CHUNKS) as manager:
        manager.save(1, tree, items={"a": 1})
    want = files_of(local / name_of(1))
    points = commits = at = 0
    while True:
        at += 1
        remote = root / f"remote-{at}"
        journal = Journal()
        kernel = KillingKernel(journal, at)
        _, status = os.waitpid(in_child(functools.partial(upload_one, local, remote, kernel)), 0)
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert is_killed or status == 0, journal.read()[-1]
        committed = "committed" in journal.read()
        assert steps_in(remote) == ([1] if committed else [])
        assert not committed or jaxckpt.verify(remote / name_of(1)).ok
        _, status = os.waitpid(in_child(functools.partial(upload_one, local, remote)), 0)
        assert status == 0
        assert files_of(remote / name_of(1)) == want
        left = {entry.name for entry in remote.iterdir()} - {"checkpoint.json", name_of(1)}
        assert all(name.startswith("checkpoint.json.tmp-") for name in left)
        shutil.rmtree(remote)
        points += 1
        commits += committed
        if not is_killed:
            return {"points": points, "commits": commits}


@pytest.mark.slow
def test_sigkill_at_every_operation_of_an_upload() -> None:
    program = """
        import gc, json, pathlib, sys, warnings

        warnings.simplefilter("ignore")  # forking is safe here: no device was touched yet
        from tests.test_tiers import kill_uploads

        gc.freeze()  # the children need not touch, and so copy, what is there already
        print(json.dumps(kill_uploads(pathlib.Path(sys.argv[1]))))
    """
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base, prefix="jaxckpt-") as root:
        report = json.loads(run_fork(program, root, timeout_s=100).stdout.splitlines()[-1])
    assert report["points"] > 40
    assert 1 < report["commits"] < 12


def test_a_commit_in_the_second_tier_comes_after_all_else_is_durable(
    local: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    save_steps(local, 1)
    kernel = NotedKernel()
    upload_one(local, tmp_path / "remote", kernel)
    done = [str(operation) for operation in kernel.done]
    commit = next(place for place, operation in enumerate(kernel.done) if operation.is_commit)
    created = {line.removeprefix("create ") for line in done[:commit] if line.startswith("create ")}
    assert len(created) >= 4
    for path in created:
        assert any(line == f"fsync {path}" for line in done[:commit])
    made = {line.removeprefix("mkdir ") for line in done[:commit] if line.startswith("mkdir ")}
    for path in made:
        assert f"fsync {path}" in done[:commit]
    assert not [line for line in done[commit:] if "data-" in line]


def test_an_upload_that_somebody_swept_is_not_committed(local: pathlib.Path) -> None:
    jaxckpt.save(local, tree_of(1))
    bucket = Bucket()

    def sweep(call: str, path: str) -> None:
        if call == "put" and "/packs/" in path:
            bucket.objects.clear()

    bucket.before = sweep
    with pytest.raises(jaxckpt.WriteError, match="somebody deleted what was copied"):
        copy_checkpoint(LocalStore(str(local)), bucket, io_threads=1, host_bytes_max=1)
    assert MANIFEST not in bucket.objects


@pytest.mark.slow
def test_a_program_that_ends_without_a_word_uploads_first(tmp_path: pathlib.Path) -> None:
    program = """
        import sys
        import numpy as np
        import jaxckpt

        upload = jaxckpt.UploadOptions(attempts=1)
        manager = jaxckpt.CheckpointManager(sys.argv[1], upload_to=sys.argv[2], upload=upload)
        for step in range(3):
            manager.save(step, {"w": np.full(1000, step)})
    """
    local, remote = tmp_path / "local", tmp_path / "remote"
    run_fork(program, local, remote)
    assert steps_in(remote) == [0, 1, 2]
    assert all(jaxckpt.verify(remote / name_of(step)).ok for step in range(3))
    blocked = tmp_path / "a file"
    blocked.write_text("no directory")
    result = run_fork(program, tmp_path / "other", blocked / "remote", check=False)
    assert result.returncode == 120, result.stderr
    assert "is not uploaded to" in result.stderr
    assert steps_in(tmp_path / "other") == [0, 1, 2]


# --- groups of processes --------------------------------------------------------------------------------------


GROUP = SaveOptions(timeout_s=20)


class LateKernel(Kernel):
    """Makes no file before the loops of all processes are over."""

    def __init__(self) -> None:
        self.loops_are_over = threading.Event()

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        assert self.loops_are_over.wait(60)
        return os.open(path, flags, mode)


def save_in_group(worker: Worker, local: str, remote: str, is_local: bool) -> list[list[int]]:
    kernel = LateKernel()
    late = LocalStore(remote, kernel)
    with CheckpointManager(local, max_to_keep=1, upload_to=late, local=is_local, options=GROUP) as manager:
        for step in (1, 2, 3):
            manager.save(step, global_tree(step))
        assert (manager._uploader is not None) == (worker.index == 0 or is_local)
        worker.meet()
        kernel.loops_are_over.set()
    # Nobody is ahead of the uploads of another: JAX would end both.
    return [*map(steps_in, parts_of(remote, is_local)), manager.steps()]


def parts_of(path: str, is_local: bool) -> list[pathlib.Path]:
    return (
        [pathlib.Path(path, f"process-{index}") for index in range(2)] if is_local else [pathlib.Path(path)]
    )


def resume_in_group(worker: Worker, local: str, remote: str, is_local: bool) -> tuple[int, list[int]]:
    with CheckpointManager(local, max_to_keep=1, upload_to=remote, local=is_local, options=GROUP) as manager:
        step, tree = manager.resume(mesh=global_mesh()) or (0, {})
        assert_is_step(tree, step)
        again = manager.restore(3, mesh=global_mesh())
        assert_is_step(again, 3)
        steps = manager.steps()
        worker.meet()
    return step, steps


@pytest.mark.slow
@pytest.mark.parametrize("is_local", [False, True])
def test_a_group_uploads_once_and_comes_back_from_either_tier(tmp_path: pathlib.Path, is_local: bool) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    arguments = (str(local), str(remote), is_local)
    saved = [[1, 2, 3]] * (3 if is_local else 2)
    assert returned_alike(run_processes(save_in_group, 2, arguments=arguments)) == saved
    parts = ["process-0", "process-1"] if is_local else ["."]
    for part in parts:
        assert steps_in(local / part) == [3]
        assert steps_in(remote / part) == [1, 2, 3]
        assert files_of(local / part / name_of(3)) == files_of(remote / part / name_of(3))
    # One of them finds damage, and the last one finds nothing.
    DAMAGES["a bit of the data"](local / parts[-1], 3)
    assert returned_alike(run_processes(resume_in_group, 2, arguments=arguments)) == (3, [1, 2, 3])
    shutil.rmtree(local / parts[-1])
    assert returned_alike(run_processes(resume_in_group, 2, arguments=arguments)) == (3, [1, 2, 3])


def leave_at_the_end(worker: Worker, local: str, remote: str, is_local: bool, leaver: int) -> str:
    manager = CheckpointManager(local, save_interval_steps=2, upload_to=remote, local=is_local, options=GROUP)
    try:
        with manager:
            manager.save(2, global_tree(2))
            manager.save(3, global_tree(3))  # for the end: who closes has a word to hear before the uploads
            if worker.index == leaver:
                raise ValueError("the end of the loop failed")
    except ValueError:
        return "left"
    except jaxckpt.CoordinationError:
        pass  # of step 3
    return "closed"


@pytest.mark.slow
@pytest.mark.parametrize(("is_local", "leaver"), [(False, 0), (True, 1)])
def test_nobody_waits_for_the_uploads_of_who_has_left_by_an_exception(
    tmp_path: pathlib.Path, is_local: bool, leaver: int
) -> None:
    arguments = (str(tmp_path / "local"), str(tmp_path / "remote"), is_local, leaver)
    outcomes = run_processes(leave_at_the_end, 2, timeout_s=20, arguments=arguments)
    assert [outcome.value for outcome in outcomes] == [
        ("left" if i == leaver else "closed") for i in range(2)
    ]
