"""How does a function become bytes beside the arrays, and what is said of it?

A program is a function of the saved tree and some inputs, exported with `jax.export` as StableHLO. It is stored with
the values, so that a process without the code of the model can run it. The steps of `export_program`:

1. The function is traced once, on the shapes and dtypes of the tree. Everything that goes in and out is a flat dict
   of plain arrays by key: trees are taken apart and put together inside of what is traced, and typed PRNG keys go as
   their data. So no node type has to be registered on either side.
2. Leaves that the function does not use are left out of its arguments: a prediction needs no optimizer state.
3. Values marked by `jax.ad_checkpoint.checkpoint_name` become outputs of their own (`_intermediates`). XLA drops from
   each call what was not asked for.
4. The result is lowered for each platform by itself and serialized, behind a `Signature`: the structure and the keys
   of the tree, the inputs and the outputs, as plain data. One function for several platforms would be smaller, but
   `jax.export` puts each matrix product of such a function into a condition, which the compiler optimizes otherwise:
   losses would differ in the last bits from those of the original function.

Leaves of the tree are arguments, never constants of the program, so that the same program runs on the values of any
step. What is no array (strings, bytes) is a part of the program. Arrays that the function brings along from elsewhere
are constants; those that are leaves of the tree as well are refused, and large ones are logged.

Deliberately not here: opening and running programs (`_calling`), and where their bytes lie (`_saving`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, final

import jax
import jax.export
import jax.numpy as jnp
import msgpack
import numpy as np

from ._dtypes import is_jax_dtype
from ._errors import FormatError, MissingDependencyError, Problem
from ._intermediates import evaluate, used_inputs, with_intermediates
from ._keys import LEAF_NODE, FlatTree, check_nodes, flatten
from ._manifest import ProgramEntry
from ._values import decode_value, encode_value, unpack

_log = logging.getLogger("jaxckpt")

_MAGIC = "jaxckpt-program"
PLATFORMS = ("cpu", "cuda", "tpu")

# The manifest shows so many inputs, outputs and intermediate values of a program; its object has all of them.
_LINES_MAX = 64

_LOCATIONS_OPTION = "jax_traceback_in_locations_limit"

# Constants of this size are mostly weights that should have come from the tree.
_CONSTANT_BYTES_LOGGED = 1 << 20


@final
class Program:
    """A function to store beside a tree: ``save(path, tree, programs={"predict": Program(fn, inputs)})``.

    Make one for a training run and pass it to every save: it is exported once for each structure of the tree, and later
    checkpoints of a manager share its bytes.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Any] = (),
        *,
        platforms: Sequence[str] = PLATFORMS,
        vjp_order: int = 0,
        disabled_checks: Sequence[Any] = (),
    ) -> None:
        """Describes a program; nothing is traced before the first save.

        Args:
          fn: Called as ``fn(tree, *inputs)`` with the saved tree; jitted or not. It may return any pytree of arrays.
            Values inside that `jax.ad_checkpoint.checkpoint_name` marks can be fetched by name later. It runs on any
            devices and shardings, unless it names a mesh: then it needs as many devices.
          inputs: One `jax.ShapeDtypeStruct`, array, or pytree of them for each further argument; only shapes and
            dtypes are used. A dimension may be symbolic (`jax.export.symbolic_shape`), a batch size say.
          platforms: What it can run on, in the words of `jax.export`: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``.
            Each has a function of its own in the stored program.
          vjp_order: How many times it can be differentiated in reverse mode later; 0: not at all.
          disabled_checks: `jax.export.DisabledSafetyCheck` s for what JAX does not export by default.

        Raises:
          TypeError: The function cannot be called.
          ValueError: No platform, or an order below 0.
        """
        if not callable(fn):
            raise TypeError(f"a program is a function, not {type(fn).__name__}")
        if not platforms or isinstance(platforms, str):
            raise ValueError("platforms= is a sequence of at least one of 'cpu', 'cuda', 'rocm' and 'tpu'")
        if vjp_order < 0:
            raise ValueError(f"vjp_order must be at least 0, not {vjp_order}")
        self.fn = fn
        self.inputs = tuple(inputs)
        self.platforms = tuple(platforms)
        self.vjp_order = vjp_order
        self.disabled_checks = tuple(disabled_checks)
        self._lock = threading.Lock()
        self._exported: tuple[Any, ExportedProgram] | None = None

    def export(self, name: str, tree: FlatTree) -> ExportedProgram:
        """The program for trees like this one; remembered, since a training loop saves the same tree again."""
        is_wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        identity = tree.treedef, tree.nodes, list(map(_identity_of, tree.leaves)), is_wide
        with self._lock:
            if self._exported is None or not _is_same(self._exported[0], identity):
                self._exported = identity, export_program(name, self, tree)
            return self._exported[1]


def _identity_of(leaf: Any) -> Any:
    """What a program depends on: shape and dtype, and the value of what is no array for JAX."""
    if isinstance(leaf, (bool, int, float, complex)):
        return type(leaf)
    if isinstance(leaf, (str, bytes)):
        return leaf
    if isinstance(leaf, (np.ndarray, np.generic)) and not is_jax_dtype(leaf.dtype):
        return leaf.dtype, leaf.shape, leaf.tobytes()
    return leaf.dtype, leaf.shape, getattr(leaf, "weak_type", False)


def _is_same(identity: Any, other: Any) -> bool:
    try:
        return bool(identity == other)
    except (TypeError, ValueError):  # static data of a node that cannot be compared
        return False


def as_program(name: Any, given: Any) -> Program:
    """What was given in ``programs=`` as a `Program`.

    Raises:
      TypeError: It is neither a `Program` nor a `jax.export.Exported`, or its name is no text.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of a program is a text that is not empty, not {name!r}")
    if isinstance(given, Program):
        return given
    if not isinstance(given, jax.export.Exported):
        raise TypeError(
            f"programs[{name!r}] is of type {type(given).__name__}; give a jaxckpt.Program or a jax.export.Exported"
        )
    return _wrapped(name, given)


# Remembered, so that a training loop that saves it again does not have it exported again.
@functools.lru_cache(maxsize=8)
def _wrapped(name: str, given: jax.export.Exported) -> Program:
    arguments, keywords = jax.tree_util.tree_unflatten(given.in_tree, given.in_avals)
    if keywords or not arguments:
        raise TypeError(
            f"programs[{name!r}] was exported with keyword arguments, or without any; export a function that takes the "
            "tree first"
        )
    vjp_order = 1 if given.has_vjp() else 0
    return Program(_call_of(given), arguments[1:], platforms=given.platforms, vjp_order=vjp_order)


def _call_of(given: jax.export.Exported) -> Callable[..., Any]:
    """A function that can be exported again anywhere: JAX must see as many devices there as the first time."""
    devices = jax.devices()[: given.nr_devices]
    if (
        given.nr_devices == 1 or len(devices) < given.nr_devices
    ):  # too few of them is an error of `jax.export`
        return given.call
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))

    def with_devices(array: Any) -> Any:
        free = jax.sharding.PartitionSpec(*[jax.sharding.PartitionSpec.UNCONSTRAINED] * array.ndim)
        return jax.lax.with_sharding_constraint(array, jax.sharding.NamedSharding(mesh, free))

    def call(*arguments: Any) -> Any:
        return given.call(*jax.tree_util.tree_map(with_devices, arguments))

    return call


# --- what is said of a program --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class LeafForm:
    """An array that goes into a program or comes out of it, or what stands in its place.

    Attributes:
      dtype: Name of the dtype, for PRNG keys that of the key data; "" for what is no array.
      shape: Shape, for PRNG keys of the key data. Symbolic dimensions are texts.
      weak_type: Whether it is weakly typed.
      impl: Name of the PRNG implementation, for keys.
      is_used: Whether the program takes it, or returns it.
      constant: For what is no array and is returned: the record of its value (`_values.encode_value`).
    """

    dtype: str
    shape: tuple[int | str, ...] = ()
    weak_type: bool = False
    impl: str | None = None
    is_used: bool = True
    constant: Any = None

    @property
    def is_array(self) -> bool:
        """Whether it is an argument or a result; anything else is a part of the program."""
        return self.dtype != ""

    def __str__(self) -> str:
        if not self.is_array:
            return "constant"
        shape = self.shape if self.impl is None else self.shape[:-1]
        dtype = self.dtype if self.impl is None else f"key<{self.impl}>"
        return f"{dtype}[{','.join(map(str, shape))}]"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TreeForm:
    """A pytree of such leaves: the record of its nodes (`_keys`), the keys, and the leaves."""

    nodes: list[Any]
    keys: tuple[str, ...]
    leaves: tuple[LeafForm, ...]

    def arrays(self) -> Iterator[tuple[str, LeafForm]]:
        """Keys and forms of the arrays that the program takes or returns."""
        for key, leaf in zip(self.keys, self.leaves, strict=True):
            if leaf.is_array and leaf.is_used:
                yield key, leaf


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Signature:
    """How a program is called.

    Attributes:
      tree: The tree that it takes first.
      inputs: Its other arguments, as a tuple.
      input_names: What the function calls each of them.
      outputs: What it returns.
      intermediates: Values inside of it that have a name.
    """

    tree: TreeForm
    inputs: TreeForm
    input_names: tuple[str, ...]
    outputs: TreeForm
    intermediates: dict[str, LeafForm]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class ExportedProgram:
    """A program as bytes, and what the manifest says of it.

    Attributes:
      data: The object's bytes: signature and serialized function.
      entry: For the manifest.
    """

    data: bytes
    entry: ProgramEntry


def encode_program(signature: Signature, functions: Mapping[str, bytes]) -> bytes:
    """The bytes of a program's object, from the serialized function of each platform."""
    record = {
        "tree": _encode_tree(signature.tree),
        "inputs": _encode_tree(signature.inputs),
        "input_names": list(signature.input_names),
        "outputs": _encode_tree(signature.outputs),
        "intermediates": [[name, _encode_leaf(leaf)] for name, leaf in signature.intermediates.items()],
    }
    return bytes(msgpack.packb([_MAGIC, record, dict(functions)], unicode_errors="surrogatepass") or b"")


def decode_program(data: bytes, source: str) -> tuple[Signature, dict[str, bytes]]:
    """Signature and serialized functions of a program's object, by platform.

    Raises:
      FormatError: The bytes are no such object.
    """
    try:
        magic, record, functions = unpack(data)
        if magic != _MAGIC or not functions:
            raise ValueError("it is no program of jaxckpt")
        if not _are_texts(list(functions)) or not all(isinstance(blob, bytes) for blob in functions.values()):
            raise ValueError("its functions have no platforms")
        names = record["input_names"]
        inputs = _decode_tree(record["inputs"])
        if not _are_texts(names) or inputs.nodes[0] != ["tuple", len(names)]:
            raise ValueError("its inputs have no names")
        intermediates = {name: _decode_leaf(leaf) for name, leaf in record["intermediates"]}
        if not _are_texts(list(intermediates)):
            raise ValueError("its intermediate values have no names")
        tree, outputs = _decode_tree(record["tree"]), _decode_tree(record["outputs"])
        return Signature(tree, inputs, tuple(names), outputs, intermediates), functions
    except Exception as error:  # hostile bytes can make Python raise almost anything; all of it means this
        problem = Problem(None, "object", f"{type(error).__name__}: {str(error)[:200]}")
        raise FormatError(
            f"cannot read a program of {source!r}: its bytes are no valid encoding\n  {problem}\n"
            "the values can be restored without it",
            [problem],
        ) from error


def _encode_tree(tree: TreeForm) -> list[Any]:
    return [tree.nodes, list(tree.keys), [_encode_leaf(leaf) for leaf in tree.leaves]]


def _encode_leaf(leaf: LeafForm) -> list[Any]:
    return [leaf.dtype, list(leaf.shape), leaf.weak_type, leaf.impl, leaf.is_used, leaf.constant]


def _decode_tree(record: Any) -> TreeForm:
    nodes, keys, leaves = record
    if not _are_texts(keys) or len(set(keys)) != len(keys) or len(leaves) != len(keys):
        raise ValueError("its leaves have no keys of their own")
    wrong = check_nodes(nodes, keys)
    if wrong is not None:
        raise ValueError(wrong)
    return TreeForm(nodes, tuple(keys), tuple(map(_decode_leaf, leaves)))


def _decode_leaf(record: Any) -> LeafForm:
    dtype, shape, weak_type, impl, is_used, constant = record
    if constant is not None:
        decode_value(constant)
    if not all(type(size) is str or (type(size) is int and size >= 0) for size in shape):
        raise ValueError("a shape that is none")
    if type(dtype) is not str or type(impl) not in (str, type(None)):
        raise TypeError("a dtype that is none")
    return LeafForm(dtype, tuple(shape), bool(weak_type), impl, bool(is_used), constant)


def _are_texts(names: Any) -> bool:
    return isinstance(names, list) and all(type(name) is str for name in names)


def find_subtrees(nodes: list[Any], wanted: list[Any]) -> list[tuple[int, int]]:
    """Where a structure record holds another one: the number of the node, and of the first leaf, of each place."""
    found: list[tuple[int, int]] = []
    leaves = 0
    place = 0
    while place < len(nodes):
        # A lone leaf is everywhere, and says nothing.
        is_likely = len(wanted) > 1 and nodes[place] == wanted[0]
        if is_likely and nodes[place : place + len(wanted)] == wanted:
            found.append((place, leaves))
            leaves += wanted.count(LEAF_NODE)
            place += len(wanted)
        else:
            leaves += nodes[place] == LEAF_NODE
            place += 1
    return found


def output_name(key: str) -> str:
    """What an output is called: its key, or that of a function which returns one array."""
    return key or "output"


# --- exporting ------------------------------------------------------------------------------------------------


def export_program(name: str, program: Program, tree: FlatTree) -> ExportedProgram:
    """Traces, lowers and serializes a program.

    Args:
      name: For messages.
      program: The function, and the forms of its inputs.
      tree: The tree that it takes first; only shapes and dtypes are used.

    Raises:
      MissingDependencyError: `jax.export` needs the package ``flatbuffers`` and it is not there.
      ValueError: The function uses leaves of the tree without taking them from it.
      Exception: Whatever the function, or exporting it, raises; a note names the program.
    """
    require_flatbuffers()
    try:
        forms = tuple(map(form_of, tree.leaves))
        with _without_source_locations():
            signature, exported, functions = _export_for_any_devices(name, program, tree, forms)
    except Exception as error:
        error.add_note(f"when the program {name!r} was exported; nothing was written")
        raise
    data = encode_program(signature, functions)
    entry = ProgramEntry(
        name="",
        length=len(data),
        sha256=hashlib.sha256(data).digest(),
        jax=jax.__version__,
        jaxlib=importlib.metadata.version("jaxlib"),
        created_s=time.time(),
        platforms=tuple(functions),
        devices=exported.nr_devices,
        convention=exported.calling_convention_version,
        vjp_order=program.vjp_order,
        inputs=_shortened(_summarize_inputs(signature)),
        outputs=_shortened(_summarize_outputs(signature)),
        intermediates=_shortened([(key, str(form)) for key, form in signature.intermediates.items()]),
    )
    return ExportedProgram(data, entry)


def require_flatbuffers() -> None:
    """Makes sure that `jax.export` can write and read.

    Raises:
      MissingDependencyError: It cannot.
    """
    try:
        importlib.import_module("flatbuffers")
    except ImportError as error:
        raise MissingDependencyError(
            "programs need the package flatbuffers, which jax.export writes and reads them with\n"
            "pip install 'jaxckpt[programs]'"
        ) from error


_locations_lock = threading.RLock()


@contextlib.contextmanager
def _without_source_locations() -> Generator[None]:
    """JAX writes the Python stack of each operation into what it lowers: paths of this machine, and line numbers.

    Without them equal functions have equal bytes, wherever they lie. The option holds for all threads; what others
    lower meanwhile lacks its stacks, too.
    """
    with _locations_lock:
        limit: int | None = getattr(jax.config, _LOCATIONS_OPTION, None)
        if limit is None:  # another JAX; the paths do no harm
            yield
            return
        jax.config.update(_LOCATIONS_OPTION, 0)
        try:
            yield
        finally:
            jax.config.update(_LOCATIONS_OPTION, limit)


def _export_for_any_devices(
    name: str, program: Program, tree: FlatTree, forms: Sequence[LeafForm]
) -> tuple[Signature, jax.export.Exported, dict[str, bytes]]:
    """Outside of the mesh of the training loop (`jax.set_mesh`), or for as many devices as that has where it must."""
    if not jax.sharding.get_abstract_mesh().empty:
        try:
            with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
                return _export(name, program, tree, forms)
        except Exception as error:
            # The function says where its values go, on the axes of that mesh; or it fails here as well.
            _log.debug("the program %r needs the mesh: %s", name, error)
    return _export(name, program, tree, forms)


def _export(
    name: str, program: Program, tree: FlatTree, forms: Sequence[LeafForm]
) -> tuple[Signature, jax.export.Exported, dict[str, bytes]]:
    inputs = flatten(program.inputs)
    traced = _Traced(program, tree, forms, inputs)
    arguments = {
        key: _struct_of(leaf, form)
        for key, leaf, form in zip(tree.keys, tree.leaves, forms, strict=True)
        if form.is_array
    }
    input_structs = dict(zip(inputs.keys, map(_struct_of, inputs.leaves, traced.input_forms), strict=True))
    closed = jax.make_jaxpr(traced.call)(*arguments.values(), *input_structs.values())
    outputs = traced.outputs
    _check_constants(name, closed, tree)
    output_keys = [key for key, _ in outputs.arrays()]
    named = with_intermediates(
        closed, inline_custom=program.vjp_order == 0, taken=[output_name(key) for key in output_keys]
    )
    if named.unreachable:
        _log.info(
            "the program %r: the values %s are in loops, conditions or custom derivatives, and cannot be fetched",
            name,
            ", ".join(named.unreachable),
        )
    kept = {
        key: struct
        for (key, struct), is_used in zip(arguments.items(), used_inputs(named.closed_jaxpr), strict=False)
        if is_used
    }

    def flat_function(own: dict[str, Any], others: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        # What is not used is asked for all the same by the calls inside; XLA drops it.
        values = [
            own[key] if key in kept else jnp.zeros(struct.shape, struct.dtype)
            for key, struct in arguments.items()
        ]
        results, intermediates = evaluate(named, [*values, *(others[key] for key in inputs.keys)])
        return dict(zip(output_keys, results, strict=True)), intermediates

    jitted = jax.jit(flat_function)
    exported = [
        jax.export.export(jitted, platforms=(platform,), disabled_checks=program.disabled_checks)(
            kept, input_structs
        )
        for platform in program.platforms
    ]
    functions = {each.platforms[0]: bytes(each.serialize(vjp_order=program.vjp_order)) for each in exported}
    _, named_avals = jax.tree_util.tree_unflatten(exported[0].out_tree, exported[0].out_avals)
    used_forms = tuple(
        dataclasses.replace(form, is_used=key in kept) for key, form in zip(tree.keys, forms, strict=True)
    )
    signature = Signature(
        tree=TreeForm(tree.nodes, tree.keys, used_forms),
        inputs=TreeForm(inputs.nodes, inputs.keys, traced.input_forms),
        input_names=_input_names(program.fn, len(program.inputs)),
        outputs=outputs,
        intermediates={each: form_of(named_avals[each]) for each in named.names},
    )
    return signature, exported[0], functions


@final
class _Traced:
    """The function of a program on plain arrays: those of the tree, then those of the inputs."""

    def __init__(self, program: Program, tree: FlatTree, forms: Sequence[LeafForm], inputs: FlatTree) -> None:
        self._program = program
        self._tree = tree
        self._forms = forms
        self._inputs = inputs
        self.input_forms = tuple(map(form_of, inputs.leaves))
        no_arrays = [
            key for key, form in zip(inputs.keys, self.input_forms, strict=True) if not form.is_array
        ]
        if no_arrays:
            raise TypeError(
                f"inputs {no_arrays} are no arrays; bind them to the function (functools.partial)"
            )
        # Known after the first call.
        self.outputs = TreeForm([], (), ())

    def call(self, *arrays: Any) -> list[Any]:
        """The arrays of the result; its form is kept."""
        rest = iter(arrays)
        own = [
            wrap(form, next(rest)) if form.is_array else leaf
            for leaf, form in zip(self._tree.leaves, self._forms, strict=True)
        ]
        others = [wrap(form, next(rest)) for form in self.input_forms]
        result = flatten(self._program.fn(self._tree.unflatten(own), *self._inputs.unflatten(others)))
        forms = tuple(_output_form(leaf) for leaf in result.leaves)
        self.outputs = TreeForm(result.nodes, result.keys, forms)
        return [unwrap(form, leaf) for leaf, form in zip(result.leaves, forms, strict=True) if form.is_array]


def form_of(leaf: Any) -> LeafForm:
    """The form of a leaf; what JAX has no array of is a part of the program."""
    if not hasattr(leaf, "dtype"):
        if type(leaf) not in (bool, int, float, complex):
            return LeafForm("")
        # As in `jax.jit`, a number of Python is a weakly typed array.
        return LeafForm(str(jax.dtypes.result_type(leaf)), weak_type=type(leaf) is not bool)
    shape = tuple(size if isinstance(size, int) else str(size) for size in leaf.shape)
    dtype: Any = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        impl, data = _key_form(dtype)
        return LeafForm(str(data.dtype), (*shape, *data.shape), impl=impl)
    if not isinstance(dtype, np.dtype) or not is_jax_dtype(dtype):
        return LeafForm("")
    name = str(jax.dtypes.canonicalize_dtype(dtype))
    return LeafForm(name, shape, weak_type=bool(getattr(leaf, "weak_type", False)))


@functools.lru_cache(maxsize=16)
def _key_form(dtype: Any) -> tuple[str, jax.ShapeDtypeStruct]:
    """Name of the PRNG implementation of keys of a dtype, and the form of the data of one."""
    names: list[str] = []

    def look(key: Any) -> Any:
        names.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    data = jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return names[0], data


def _output_form(leaf: Any) -> LeafForm:
    form = form_of(leaf)
    if form.is_array:
        return form
    try:
        return LeafForm("", constant=encode_value(leaf))
    except TypeError as error:
        raise TypeError(f"the program returns a {type(leaf).__name__}, which is no array") from error


def _struct_of(leaf: Any, form: LeafForm) -> jax.ShapeDtypeStruct:
    """What an argument is traced with. Not its sharding: the program runs on any."""
    shape = np.shape(leaf) if form.impl is None else (*leaf.shape, *form.shape[len(leaf.shape) :])
    if not isinstance(leaf, (bool, int, float, complex)):
        shape = tuple(leaf.shape) if form.impl is None else shape
    return jax.ShapeDtypeStruct(shape, np.dtype(form.dtype), weak_type=form.weak_type)


def wrap(form: LeafForm, array: Any) -> Any:
    """A leaf from the array that stands for it in a program."""
    return array if form.impl is None else jax.random.wrap_key_data(array, impl=form.impl)


def unwrap(form: LeafForm, leaf: Any) -> Any:
    """The array that stands for a leaf in a program."""
    if form.impl is not None:
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf, np.dtype(form.dtype))


def _check_constants(name: str, closed: Any, tree: FlatTree) -> None:
    """Weights belong into the tree: those of the tree must come from it, and large others are logged."""
    constants = {_memory_of(constant): constant for constant in _constants_of(closed.jaxpr, closed.consts)}
    key_of = {
        _memory_of(leaf): key for key, leaf in zip(tree.keys, tree.leaves, strict=True) if np.size(leaf) > 1
    }
    captured = sorted(key_of[memory] for memory in constants if memory in key_of)
    if captured:
        shown = ", ".join(captured[:10])
        raise ValueError(
            f"the function of the program {name!r} brings leaves of the tree along as constants: {shown}\n"
            "take them from the tree, its first argument"
        )
    nbytes = sum(constant.nbytes for constant in constants.values())
    if nbytes >= _CONSTANT_BYTES_LOGGED:
        _log.warning("the program %r holds %d bytes of constants; weights belong into the tree", name, nbytes)


def _memory_of(leaf: Any) -> Any:
    """What an array has in common with the constant that JAX makes of it, which is another view for NumPy's."""
    if isinstance(leaf, np.ndarray):
        return leaf.__array_interface__["data"], leaf.shape
    return id(leaf)


def _constants_of(jaxpr: Any, constants: Sequence[Any]) -> Iterator[Any]:
    """Arrays that a traced function has in itself, in the calls inside of it too."""
    from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

    def is_jaxpr(parameter: Any) -> bool:
        return isinstance(parameter, (ClosedJaxpr, Jaxpr))

    yield from (constant for constant in constants if hasattr(constant, "nbytes"))
    for equation in jaxpr.eqns:
        for variable in equation.invars:
            if isinstance(variable, Literal) and hasattr(variable.val, "nbytes"):
                yield variable.val
        for parameter in jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if isinstance(parameter, ClosedJaxpr):
                yield from _constants_of(parameter.jaxpr, parameter.consts)
            elif isinstance(parameter, Jaxpr):
                yield from _constants_of(parameter, ())


def _input_names(function: Callable[..., Any], count: int) -> tuple[str, ...]:
    """What the function calls its inputs, or ``input0``, ``input1``, ..."""
    names: list[str] = []
    try:
        parameters = list(inspect.signature(function).parameters.values())[1 : count + 1]
        names = [
            each.name
            for each in parameters
            if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):  # some callables do not say
        pass
    if len(names) < count:
        return tuple(f"input{number}" for number in range(count))
    return tuple(names)


def _summarize_inputs(signature: Signature) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, form in zip(signature.inputs.keys, signature.inputs.leaves, strict=True):
        number, slash, below = key.partition("/")
        lines.append((signature.input_names[int(number)] + slash + below, str(form)))
    return lines


def _summarize_outputs(signature: Signature) -> list[tuple[str, str]]:
    """What is returned; a whole tree in one line."""
    tree, outputs = signature.tree, signature.outputs
    begins = {leaf for _, leaf in find_subtrees(outputs.nodes, tree.nodes)}
    lines: list[tuple[str, str]] = []
    at = 0
    while at < len(outputs.keys):
        key = outputs.keys[at]
        if at in begins and tree.keys:
            lines.append((key[: -len(tree.keys[0])].removesuffix("/") or "output", "tree"))
            at += len(tree.keys)
        else:
            lines.append((output_name(key), str(outputs.leaves[at])))
            at += 1
    return lines


def _shortened(lines: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """For people, and so not of any length."""
    if len(lines) <= _LINES_MAX:
        return tuple(lines)
    return (*lines[:_LINES_MAX], ("...", f"{len(lines) - _LINES_MAX} more"))
