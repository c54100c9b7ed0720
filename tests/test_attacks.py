"""A hostile manifest gets `FormatError` before anything large is allocated (requirement 17).

`attacks/` holds one file for each attack; `attacks/generate.py` makes them. The rest is systematic: every field
replaced by every type, the payload cut off at every byte, and random changes of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

import jaxckpt
from jaxckpt._dtypes import is_jax_dtype
from jaxckpt._encoding import parse_manifest

from .attacks.generate import ATTACKS, FOLDER, base_fields, digest, frame, pack, write_honest
from .helpers import run_fork

# What the checkpoint opens with all the same: it depends on the program whether there are such keys.
OPENS = {"keys_of_an_unknown_implementation", "keys_with_too_much_data"}


@pytest.fixture
def honest(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint whose manifest the attacks are made from."""
    write_honest(path)
    return path


def parse(data: bytes) -> None:
    parse_manifest(data, "somewhere")


def read_each_leaf(path: pathlib.Path) -> None:
    checkpoint = jaxckpt.open(path)
    for key in checkpoint.manifest.keys:
        checkpoint[key][...]


def use_everything(path: pathlib.Path) -> None:
    """Whatever a user would do with a checkpoint; errors of the library's own are what is allowed to happen."""
    calls: list[Callable[[pathlib.Path], Any]] = [
        jaxckpt.restore,
        jaxckpt.verify,
        lambda path: str(jaxckpt.describe(path)),
        read_each_leaf,
    ]
    for call in calls:
        with contextlib.suppress(jaxckpt.CheckpointError):
            call(path)


# --- the files ------------------------------------------------------------------------------------------------


def test_the_honest_checkpoint_is_whole_and_restores(honest: pathlib.Path) -> None:
    """Or every attack on it would prove nothing."""
    assert jaxckpt.verify(honest).ok
    tree = jaxckpt.restore(honest)
    assert sorted(tree) == ["a", "k", "n", "s", "v", "w"]
    assert tree["v"] == 7
    assert tree["s"] == "\0" * 5
    assert not np.asarray(tree["a"]).any()
    assert str(jaxckpt.describe(honest))


def test_each_attack_has_its_file_and_is_what_the_generator_makes() -> None:
    files = {file.stem: file.read_bytes() for file in FOLDER.glob("*.msgpack")}
    assert files == {name: build(base_fields()) for name, build in ATTACKS.items()}


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_refused(honest: pathlib.Path, name: str) -> None:
    (honest / "manifest.msgpack").write_bytes((FOLDER / f"{name}.msgpack").read_bytes())
    with pytest.raises(jaxckpt.FormatError) as caught:
        jaxckpt.restore(honest)
    assert caught.value.problems
    assert len(str(caught.value)) < 2000
    if name in OPENS:
        use_everything(honest)
        return
    with pytest.raises(jaxckpt.FormatError):
        jaxckpt.open(honest)
    with pytest.raises(jaxckpt.FormatError):
        jaxckpt.describe(honest)
    kind = "version" if name in ("newer_reader_needed", "unknown_feature") else "manifest"
    assert [problem.kind for problem in jaxckpt.verify(honest).problems] == [kind]


@pytest.mark.slow
def test_attacks_take_neither_memory_nor_time(tmp_path: pathlib.Path) -> None:
    """In a process of its own, whose largest resident size since the attack began the kernel tells."""
    write_honest(tmp_path / "checkpoint")
    result = run_fork(
        """
        import json, pathlib, sys, time
        import jax
        import jaxckpt

        path, folder = map(pathlib.Path, sys.argv[1:])

        def kib(name):
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

        jaxckpt.restore(path)
        costs = {}
        for file in sorted(folder.glob("*.msgpack")):
            (path / "manifest.msgpack").write_bytes(file.read_bytes())
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = kib("VmRSS")
            began = time.process_time()
            for call in (jaxckpt.restore, jaxckpt.open, jaxckpt.describe):
                try:
                    call(path)
                except jaxckpt.FormatError:
                    pass
            jaxckpt.verify(path)
            costs[file.stem] = [kib("VmHWM") - before, (time.process_time() - began) / 4]
        print(json.dumps(costs))
        """,
        tmp_path / "checkpoint",
        FOLDER,
        devices=2,
    )
    costs = json.loads(result.stdout)
    assert len(costs) == len(ATTACKS)
    assert {name: kib for name, (kib, _) in costs.items() if kib > 64 * 1024} == {}
    assert {name: seconds for name, (_, seconds) in costs.items() if seconds > 1} == {}


def test_a_newer_checkpoint_names_both_versions(honest: pathlib.Path) -> None:
    (honest / "manifest.msgpack").write_bytes((FOLDER / "newer_reader_needed.msgpack").read_bytes())
    with pytest.raises(jaxckpt.FormatError, match=r"format 9.*up to 1.*jaxckpt 9\.8\.7"):
        jaxckpt.restore(honest)


def test_a_manifest_that_was_made_very_long_is_refused(honest: pathlib.Path) -> None:
    """A metadata object and a manifest with a long hole at their end."""
    with open(honest / "zarr.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(jaxckpt.CorruptError, match=r"zarr\.json"):
        jaxckpt.restore(honest)
    with open(honest / "manifest.msgpack", "r+b") as file:
        file.truncate(64 << 20)
    with pytest.raises(jaxckpt.FormatError):
        jaxckpt.restore(honest)


def test_text_that_is_no_text_is_refused(honest: pathlib.Path) -> None:
    """The bytes of a long string lie outside of the manifest, with a right checksum all the same."""
    fields = base_fields()
    pack_bytes = bytearray(4096)
    pack_bytes[256:261] = b"\xff" * 5
    checksums = [fields["checksums"][at : at + 16] for at in range(0, 96, 16)]
    checksums[4] = digest(bytes(pack_bytes[256:]))
    fields["checksums"] = b"".join(checksums)
    (honest / "data-00ff" / "packs" / "0-0").write_bytes(pack_bytes)
    (honest / "manifest.msgpack").write_bytes(pack(fields))
    with pytest.raises(jaxckpt.FormatError):
        jaxckpt.restore(honest)
    with pytest.raises(jaxckpt.FormatError):
        jaxckpt.open(honest)["s"][...]


def test_fields_that_python_takes_for_equal_do_no_harm(honest: pathlib.Path) -> None:
    fields = base_fields()
    fields["tree"][0] = ["namedtuple", "m:\ud800", ["ﬁ", "fi", "class", "_x", "a b", ""]]
    fields["keys"] = ["ﬁ", "fi", "class", "_x", "a b", "~e"]
    (honest / "manifest.msgpack").write_bytes(pack(fields))
    assert len(jaxckpt.restore(honest)) == 6


# --- every field, every type ----------------------------------------------------------------------------------

SAMPLES = [
    None,
    True,
    0,
    1,
    -1,
    2**63,
    2**64 - 1,
    1.5,
    math.nan,
    "",
    "x",
    "\ud800",
    b"",
    b"\x01\x02",
    [],
    [None],
    [[]],
    ["x"],
    [1, 2],
    {},
    {"x": 1},
    msgpack.ExtType(5, b"x"),
    msgpack.Timestamp(1, 1),
]
DELETED = object()
# Where a value of another type is as good as the one that was there.
OTHER_TYPES: dict[tuple[Any, ...], tuple[type, ...]] = {
    ("created_s",): (int, float),
    ("specs", 0, "sharding"): (int, type(None)),
    ("specs", 1, "sharding"): (int, type(None)),
    ("specs", 5, "sharding"): (int, type(None)),
    ("shardings", 0, "memory_kind"): (str, type(None)),
    ("shardings", 1, "memory_kind"): (str, type(None)),
    ("shardings", 0, "device_ids"): (list, type(None)),
    ("shardings", 0, "spec", 0): (list, type(None)),
    ("shardings", 0, "spec", 1): (list, type(None)),
}
# What a reader may do without; everything else must be there.
OPTIONAL = {"weak_type", "committed", "sharding", "order"}


def places_in(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields and elements."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*prefix, step)
        yield from places_in(inner, (*prefix, step))


def changed(place: tuple[Any, ...], sample: Any) -> tuple[dict[str, Any], Any]:
    """Honest fields with another value in one place, and the value that was there."""
    fields = copy.deepcopy(base_fields())
    parent = functools.reduce(lambda inner, step: inner[step], place[:-1], fields)
    old = parent[place[-1]]
    if sample is DELETED:
        del parent[place[-1]]
    else:
        parent[place[-1]] = sample
    return fields, old


def is_as_good(place: tuple[Any, ...], old: Any, new: Any) -> bool:
    """Whether a reader may take this value there."""
    if place[0] in ("metadata", "min_writer"):
        return True
    if new is DELETED:
        # Fewer dimensions than the array has, and no metadata objects, are honest things to say.
        return (
            place[-1] in OPTIONAL
            or place[0] == "writer"
            or place[:3] == ("shardings", 0, "spec")
            or place == ("objects", 0)
        )
    return type(new) in OTHER_TYPES.get(place, (type(old),))


PLACES = list(places_in(base_fields()))


@pytest.mark.slow
@pytest.mark.parametrize("field", sorted(base_fields()))
def test_a_field_of_another_type_is_refused(honest: pathlib.Path, field: str) -> None:
    tried = 0
    for place in [place for place in PLACES if place[0] == field]:
        for sample in [*SAMPLES, DELETED]:
            fields, old = changed(place, sample)
            data = pack(fields)
            try:
                parse(data)
            except jaxckpt.FormatError:
                pass
            else:
                assert is_as_good(place, old, sample), f"{place}: {sample!r} instead of {old!r} was taken"
                (honest / "manifest.msgpack").write_bytes(data)
                use_everything(honest)
            tried += 1
    assert tried >= len(SAMPLES)


def test_the_payload_cut_off_anywhere_is_refused() -> None:
    payload = msgpack.packb(base_fields())
    for length in range(len(payload)):
        with pytest.raises(jaxckpt.FormatError):
            parse(frame(payload[:length]))


def test_the_manifest_cut_off_anywhere_is_refused() -> None:
    data = pack(base_fields())
    for length in range(len(data)):
        with pytest.raises(jaxckpt.FormatError):
            parse(data[:length])


@pytest.mark.slow
def test_every_changed_byte_of_the_payload_is_refused_or_harmless(honest: pathlib.Path) -> None:
    """With the checksum recomputed; one changed bit in each byte."""
    payload = msgpack.packb(base_fields())
    taken = 0
    for at in range(len(payload)):
        hostile = bytearray(payload)
        hostile[at] ^= 1 << at % 8
        data = frame(bytes(hostile))
        try:
            parse(data)
        except jaxckpt.FormatError:
            continue
        taken += 1
        (honest / "manifest.msgpack").write_bytes(data)
        use_everything(honest)
    assert 0 < taken < len(payload)


# --- at random ------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fuzz = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzz
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(jaxckpt.FormatError):
        parse(data)
    with pytest.raises(jaxckpt.FormatError):
        parse(frame(data))


@fuzz
@given(st.lists(st.tuples(st.sampled_from(PLACES), plain), min_size=1, max_size=3))
@example([(("specs", 2, "dtype"), ["<i4", [2**31, 2**31]])])
def test_random_values_in_random_places(
    honest: pathlib.Path, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    fields = copy.deepcopy(base_fields())
    for place, value in changes:
        try:
            parent = functools.reduce(lambda inner, step: inner[step], place[:-1], fields)
            parent[place[-1]] = value
        except (LookupError, TypeError):  # an earlier change took the place away
            continue
    (honest / "manifest.msgpack").write_bytes(pack(fields))
    use_everything(honest)


@fuzz
@given(st.data())
def test_random_dtypes(honest: pathlib.Path, data: st.DataObject) -> None:
    names = st.sampled_from(
        [
            "i4",
            "<i4",
            "|V3",
            "U",
            "S0",
            "O",
            "M8[ns]",
            "m8",
            "V2147483648",
            "finfo",
            "a5",
            "b",
            "c8,",
            "<f16",
            ">f8",
            "g",
            "int4",
            "bcomplex32",
            "complex32",
            "float6_e2m3fn",
            "M8[zz]",
            "(2,3)i4",
            "U999999999",
            "\0",
        ]
    )
    forms = st.recursive(
        names | st.text(max_size=4),
        lambda inner: st.lists(
            st.tuples(st.text(max_size=3), inner).map(list)
            | st.tuples(st.text(max_size=3), inner, st.lists(st.integers(-1, 2**31), max_size=3)).map(list),
            max_size=3,
        ),
        max_leaves=6,
    )
    fields = base_fields()
    which = data.draw(st.sampled_from([0, 2, "value"]))
    form = data.draw(forms)
    if which == "value":
        fields["values"] = [[4, ["numpy", form, data.draw(st.binary(max_size=40))]]]
    else:
        fields["specs"][which]["dtype"] = form
    (honest / "manifest.msgpack").write_bytes(pack(fields))
    use_everything(honest)


@pytest.mark.slow
@fuzz
@given(st.data())
def test_random_shardings(honest: pathlib.Path, data: st.DataObject) -> None:
    """What a valid manifest says of meshes is never too strange to restore."""
    sizes = data.draw(st.lists(st.integers(1, 40) | st.sampled_from([2**31, 2**62]), max_size=4))
    names = [f"n{number}" for number in range(len(sizes))]
    entry = (
        st.none()
        | st.just("unconstrained")
        | st.lists(st.sampled_from([*names, "x"]), max_size=2, unique=True)
    )
    fields = base_fields()
    fields["shardings"][0] = {
        "type": "named",
        "axes": [list(pair) for pair in zip(names, sizes, strict=True)],
        "axis_types": data.draw(
            st.lists(
                st.sampled_from(["Auto", "Explicit", "Manual"]), min_size=len(sizes), max_size=len(sizes)
            )
        ),
        "spec": data.draw(st.lists(entry, max_size=4)),
        "memory_kind": data.draw(
            st.sampled_from([None, "pinned_host", "unpinned_host", "device", "", "moon"])
        ),
        "device_ids": None,
    }
    (honest / "manifest.msgpack").write_bytes(pack(fields))
    try:
        parse((honest / "manifest.msgpack").read_bytes())
    except jaxckpt.FormatError:
        return
    assert not np.asarray(jaxckpt.restore(honest)["a"]).any()


@pytest.mark.slow
def test_every_dtype_of_jax_is_known() -> None:
    """Or an array that JAX can make could not be read back."""
    names = [
        "bool",
        *dir(ml_dtypes),
        *(name for name in dir(jnp) if isinstance(getattr(jnp, name), type(jnp.float32))),
    ]
    found = set()
    for name in names:
        try:
            with jax.enable_x64(True):
                dtype = jax.eval_shape(functools.partial(jnp.zeros, 2, name)).dtype
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            continue
        found.add(dtype.name)
        assert is_jax_dtype(dtype), dtype
    assert {"bfloat16", "int4", "float8_e4m3", "complex128", "bool"} <= found
