"""How is a stored program opened, and how is it called with trees and arrays?

`open_program` looks at what the manifest says of a program before it touches its bytes: whether this version of JAX and
these devices can run it. Then the bytes must have the sha256 of the manifest, and only then are they given to
`jax.export`. What is refused has a clear error, and the values of the checkpoint can be restored all the same.

`StoredProgram` is called as the function was, ``program(tree, *inputs)``, or ``program(*inputs)`` when values are bound
to it. It finds the arrays of the tree by their keys, so that any tree with these keys will do: one of the classes of
the model, or the plain one that `restore` makes without ``like``. In what it returns, a part that has the structure of
the tree comes back in the classes of the tree that was given.

A program is code. Nothing here is reached without ``trust=True``. What somebody has made to fit the manifest can do all
that code can, and end the process: JAX's reader of StableHLO does not withstand hostile bytes.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from typing import Any, final

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ._errors import FormatError, MismatchError, Problem, list_problems
from ._keys import LEAF_NODE, FlatTree, flatten, rebuild
from ._manifest import ProgramEntry
from ._placement import with_weak_type
from ._programs import (
    LeafForm,
    Signature,
    decode_program,
    find_subtrees,
    form_of,
    output_name,
    require_flatbuffers,
    unwrap,
    wrap,
)
from ._values import decode_value

# Older versions crash when they load linear algebra for the CPU (jax issue 29610, mended by pull request 33522).
_JAX_MIN = (0, 10)

_RESTORE = "the values of the checkpoint can be restored without it"


def check_entry(
    name: str, entry: ProgramEntry, *, jax_version: str, platforms: Collection[str], device_count: int
) -> None:
    """Refuses a program that cannot run here, by what the manifest says of it.

    Args:
      name: For messages.
      entry: From the manifest.
      jax_version: Of this JAX.
      platforms: Of the devices here, in the words of `jax.export`.
      device_count: Number of devices here.

    Raises:
      FormatError: It was exported by a JAX that is too new or too old for this one, or this one is too old.
      MismatchError: It is for other platforms, or for more devices.
    """
    versions = f"the program {name!r} was exported by jax {entry.jax}, and this is jax {jax_version}"
    if _version_of(jax_version) < _JAX_MIN:
        raise FormatError(f"{versions}: opening programs needs jax 0.10 or newer\n{_RESTORE}")
    least = jax.export.minimum_supported_calling_convention_version
    most = jax.export.maximum_supported_calling_convention_version
    if entry.convention > most:
        raise FormatError(f"{versions}, which is too old to call it: install jax {entry.jax}\n{_RESTORE}")
    if entry.convention < least:
        raise FormatError(
            f"{versions}, which does not call programs that old any more: export it again\n{_RESTORE}"
        )
    if not set(entry.platforms) & set(platforms):
        raise MismatchError(
            f"the program {name!r} was exported for {', '.join(entry.platforms)}, and here is "
            f"{', '.join(sorted(platforms))}: export it with platforms="
        )
    if entry.devices > device_count:
        raise MismatchError(
            f"the program {name!r} was exported for {entry.devices} devices, and here are {device_count}: "
            "export it without shardings, and it runs on any number"
        )


def _version_of(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", text)[:2])


def platforms_here() -> set[str]:
    """The platforms of the devices here, in the words of `jax.export`."""
    found: set[str] = set()
    for device in jax.devices():
        # A GPU is one of these two; which one, JAX does not say in public.
        found |= {"cuda", "rocm"} if device.platform == "gpu" else {device.platform}
    return found | {"cpu"}


def open_program(name: str, entry: ProgramEntry, data: bytes, source: str) -> StoredProgram:
    """Opens a program.

    Args:
      name: What it is called.
      entry: From the manifest; checked already (`check_entry`).
      data: The bytes of its object; verified already.
      source: Where they came from, for messages.

    Raises:
      FormatError: They are no program, or one that this version of JAX cannot open.
    """
    require_flatbuffers()
    signature, blobs = decode_program(data, source)
    functions: dict[str, jax.export.Exported] = {}
    try:
        for platform, blob in blobs.items():
            functions[platform] = _open_function(signature, platform, blob)
    except Exception as error:  # jax.export raises almost anything
        message = f"{type(error).__name__}: {str(error)[:200]}"
        problem = Problem(None, "object", message)
        raise FormatError(
            f"cannot open the program {name!r} of {source!r}, which jax {entry.jax} exported, with jax "
            f"{jax.__version__}\n  {problem}\ninstall jax {entry.jax}, or export it again; {_RESTORE}",
            [problem],
        ) from error
    return StoredProgram(name, entry, signature, functions)


def _open_function(signature: Signature, platform: str, blob: bytes) -> jax.export.Exported:
    exported = jax.export.deserialize(bytearray(blob))
    (own, others), keywords = jax.tree_util.tree_unflatten(exported.in_tree, exported.in_avals)
    outputs, named = jax.tree_util.tree_unflatten(exported.out_tree, exported.out_avals)
    if keywords or not _has_signature(signature, own, others, outputs, named):
        raise ValueError("its function is not what its signature says")
    if platform not in exported.platforms:
        raise ValueError("its function is for another platform")
    if "@main" not in exported.mlir_module():  # what JAX cannot read is found out here
        raise ValueError("its function has no body")
    return exported


def _has_signature(signature: Signature, own: Any, others: Any, outputs: Any, named: Any) -> bool:
    """Whether the function has just the arrays that the signature says."""
    return (
        _are_of_forms(own, signature.tree.arrays())
        and _are_of_forms(others, signature.inputs.arrays())
        and _are_of_forms(outputs, signature.outputs.arrays())
        and _are_of_forms(named, signature.intermediates.items())
    )


def _are_of_forms(arrays: Mapping[str, Any], forms: Iterable[tuple[str, LeafForm]]) -> bool:
    form_of_key = dict(forms)
    return (
        arrays.keys() == form_of_key.keys()
        and all(
            str(arrays[key].dtype) == form.dtype
            and len(arrays[key].shape) == len(form.shape)
            # Symbolic dimensions can be written in several ways.
            and all(
                size == other or (type(size) is str and not isinstance(other, int))
                for size, other in zip(form.shape, arrays[key].shape, strict=True)
            )
            and (
                form.impl is None
                or form.shape[len(form.shape) - _key_rank(form.impl) :] == _key_shape(form.impl)
            )
            for key, form in form_of_key.items()
        )
    )


@final
class StoredProgram:
    """A program of a checkpoint, ready to be called. `Checkpoint.program` makes these.

    It can be called inside of `jax.jit` and, if it was exported with ``vjp_order``, differentiated with `jax.grad`; on
    a mesh with explicit axes that has to happen inside of `jax.jit`. There is no `jax.vmap` and no forward mode.

    Example:
      >>> def predict(tree, x):
      ...     return x @ tree["w"]
      >>> program = jaxckpt.Program(predict, (jax.ShapeDtypeStruct((2, 3), jnp.float32),))
      >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.ones((3, 1))}, programs={"predict": program})
      >>> stored = jaxckpt.open(tmp / "a").program("predict", trust=True)
      >>> stored(np.ones((2, 3), np.float32)).tolist()
      [[3.0], [3.0]]
    """

    def __init__(
        self,
        name: str,
        entry: ProgramEntry,
        signature: Signature,
        functions: Mapping[str, jax.export.Exported],
        *,
        bound: FlatTree | None = None,
        is_donating: bool = False,
    ) -> None:
        self._name = name
        self._entry = entry
        self._signature = signature
        self._exported = dict(functions)
        self._bound = bound
        self._is_donating = is_donating
        self._functions: dict[tuple[str, ...] | None, Callable[..., Any]] = {}
        self._arguments = dict(signature.tree.arrays())
        self._bound_arrays = None if bound is None else self._arrays_of_tree(bound)
        self._places: tuple[list[Any], list[tuple[int, int]]] = ([], [])

    @property
    def name(self) -> str:
        """What it is called in the checkpoint."""
        return self._name

    @property
    def arguments(self) -> tuple[str, ...]:
        """Keys of the leaves of the tree that it uses."""
        return tuple(self._arguments)

    @property
    def inputs(self) -> dict[str, str]:
        """What it takes beside the tree: names, and dtypes with shapes."""
        forms = self._signature.inputs
        return {self._input_name(key): str(form) for key, form in zip(forms.keys, forms.leaves, strict=True)}

    @property
    def outputs(self) -> dict[str, str]:
        """What it returns: names, and dtypes with shapes. A single array is called ``"output"``."""
        forms = self._signature.outputs
        return {output_name(key): str(form) for key, form in zip(forms.keys, forms.leaves, strict=True)}

    @property
    def intermediates(self) -> dict[str, str]:
        """Values inside of it that `fetch` gives: names, and dtypes with shapes."""
        return {name: str(form) for name, form in self._signature.intermediates.items()}

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the outputs that it computes, and so without those that are constants of it."""
        return tuple(output_name(key) for key, _ in self._signature.outputs.arrays())

    @property
    def tree(self) -> Any:
        """The tree that it was exported for, with a `jax.ShapeDtypeStruct` for each array."""
        form = self._signature.tree
        return rebuild(form.nodes, [_abstract(leaf) for leaf in form.leaves])

    @property
    def platforms(self) -> tuple[str, ...]:
        """What it runs on."""
        return self._entry.platforms

    @property
    def vjp_order(self) -> int:
        """How many times it can be differentiated."""
        return self._entry.vjp_order

    @property
    def exported(self) -> dict[str, jax.export.Exported]:
        """By platform, the functions as `jax.export` has them: ``call(arrays of tree, arrays of inputs)``, by key."""
        return dict(self._exported)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {form}" for name, form in self.inputs.items())
        tree = "" if self._bound is not None else "tree, "
        outputs = ", ".join(f"{name}: {form}" for name, form in self._entry.outputs)
        return f"StoredProgram({self._name!r}: ({tree}{inputs}) -> {outputs})"

    def bind(self, tree: Any) -> StoredProgram:
        """The same program with values for its tree: called as ``program(*inputs)``.

        Args:
          tree: Any tree with the keys, shapes and dtypes that it was exported for, on any sharding.

        Raises:
          MismatchError: The tree differs; `.problems` lists every difference.
        """
        return StoredProgram(self._name, self._entry, self._signature, self._exported, bound=flatten(tree))

    def donating(self) -> StoredProgram:
        """The same program, which may use the memory of the tree's arrays for its results; they are gone afterwards.

        Raises:
          ValueError: Values are bound to it.
        """
        if self._bound is not None:
            raise ValueError("values that are bound to a program are used again by the next call")
        return StoredProgram(self._name, self._entry, self._signature, self._exported, is_donating=True)

    def __call__(self, *arguments: Any) -> Any:
        """Calls it as the function was called; the tree is left out when it is bound.

        Returns:
          What the function returned. A part with the structure of the tree has the node types of the tree that was
          given; other node types come back as from `jaxckpt.restore` without ``like``.

        Raises:
          TypeError: Another number of inputs.
          MismatchError: The tree or the inputs have other keys, shapes or dtypes.
          ValueError: Shapes contradict each other, or a constraint on a symbolic dimension.
        """
        own, arrays, inputs = self._arrange(arguments)
        with self._explaining():
            outputs = self._function(None)(arrays, inputs)
        return self._rebuild_outputs(outputs, own)

    def fetch(self, names: str | Sequence[str], *arguments: Any) -> Any:
        """Computes some outputs and intermediate values, by name, and nothing else.

        Args:
          names: One name of `outputs` or `intermediates`, or several.
          *arguments: As for the call.

        Returns:
          The value, or a list of them in the order of the names. Of PRNG keys inside the program it is their data.

        Raises:
          KeyError: There is no such value.
          TypeError, MismatchError, ValueError: As for the call.
        """
        wanted = (names,) if isinstance(names, str) else tuple(names)
        forms = self._fetchable()
        for name in wanted:
            if name not in forms:
                close = difflib.get_close_matches(name, forms, n=3)
                hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise KeyError(f"{name!r} is no value of the program {self._name!r}{hint}")
        _, arrays, inputs = self._arrange(arguments)
        with self._explaining():
            values = self._function(wanted)(arrays, inputs)
        results = [
            _result(forms[name], value) if name not in self._signature.intermediates else value
            for name, value in zip(wanted, values, strict=True)
        ]
        return results[0] if isinstance(names, str) else results

    def inputs_from(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """What to call it with, from arrays for its `inputs`, by name.

        An array of raw elements (``numpy.void``) is taken for the dtype of the input, if that has the same size, and
        for a PRNG key its data is taken.
        """
        form = self._signature.inputs
        leaves = [
            _from_file(leaf, values[self._input_name(key)])
            for key, leaf in zip(form.keys, form.leaves, strict=True)
        ]
        return rebuild(form.nodes, leaves)

    def _fetchable(self) -> dict[str, LeafForm]:
        outputs = {output_name(key): form for key, form in self._signature.outputs.arrays()}
        return {**self._signature.intermediates, **outputs}

    def _function(self, names: tuple[str, ...] | None) -> Callable[..., Any]:
        """The compiled function for all outputs, or for some values; XLA leaves out what they do not need."""
        function = self._functions.get(names)
        if function is None:
            has_vjp = all(each.has_vjp() for each in self._exported.values())
            call = self._call if has_vjp else self._call_without_vjp()

            def compute(arrays: dict[str, Any], inputs: dict[str, Any]) -> Any:
                outputs, intermediates = call(arrays, inputs)
                if names is None:
                    return outputs
                values = {**intermediates, **{output_name(key): value for key, value in outputs.items()}}
                return [values[name] for name in names]

            donated = (0,) if self._is_donating else ()
            function = self._functions[names] = jax.jit(compute, donate_argnums=donated)
        return function

    def _call(self, arrays: dict[str, Any], inputs: dict[str, Any]) -> Any:
        """The function for the platform that the call is compiled for; JAX leaves the others out."""
        calls = {platform: exported.call for platform, exported in self._exported.items()}
        return jax.lax.platform_dependent(arrays, inputs, **calls)

    def _call_without_vjp(self) -> Callable[..., Any]:
        call = self._call

        def refuse(*_: Any) -> Any:
            raise ValueError(
                f"the program {self._name!r} cannot be differentiated: export it with Program(..., vjp_order=1)"
            )

        function = jax.custom_vjp(call)
        function.defvjp(lambda *arrays: (call(*arrays), None), refuse)
        return function

    @contextlib.contextmanager
    def _explaining(self) -> Generator[None]:
        try:
            yield
        except ValueError as error:
            if "refining shapes" in str(
                error
            ):  # all that JAX says where a constraint of a stored program fails
                error.add_note(
                    f"the shapes of the inputs contradict a constraint on the dimensions of the program {self._name!r}"
                )
            raise

    def _arrange(self, arguments: tuple[Any, ...]) -> tuple[FlatTree, dict[str, Any], dict[str, Any]]:
        """The tree, its arrays by key, and those of the inputs."""
        names = self._signature.input_names
        expected = [*names] if self._bound is not None else ["tree", *names]
        if len(arguments) != len(expected):
            raise TypeError(
                f"the program {self._name!r} takes ({', '.join(expected)}), and {len(arguments)} were given"
            )
        if self._bound is not None and self._bound_arrays is not None:
            return self._bound, self._bound_arrays, self._arrays_of_inputs(arguments)
        own = flatten(arguments[0])
        return own, self._arrays_of_tree(own), self._arrays_of_inputs(arguments[1:])

    def _arrays_of_tree(self, tree: FlatTree) -> dict[str, Any]:
        given = dict(zip(tree.keys, tree.leaves, strict=True))
        return self._arrays(self._arguments, given, "the tree is", lambda key: key)

    def _arrays_of_inputs(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        flat = flatten(inputs)
        wanted = dict(self._signature.inputs.arrays())
        given = dict(zip(flat.keys, flat.leaves, strict=True))
        unknown = [
            Problem(self._input_name(key), "unexpected", "not in the program")
            for key in given
            if key not in wanted
        ]
        return self._arrays(wanted, given, "the inputs are", self._input_name, unknown)

    def _arrays(
        self,
        wanted: dict[str, LeafForm],
        given: dict[str, Any],
        what: str,
        name_of: Callable[[str], str],
        unknown: Sequence[Problem] = (),
    ) -> dict[str, Any]:
        problems = list(unknown)
        arrays: dict[str, Any] = {}
        for key, form in wanted.items():
            if key not in given:
                problems.append(Problem(name_of(key), "missing", f"{form} in the program, and not given"))
                continue
            difference = _difference(form, given[key])
            if difference is None:
                arrays[key] = unwrap(form, given[key])
            else:
                problems.append(Problem(name_of(key), *difference))
        if problems:
            raise MismatchError(list_problems(self._headline(what), problems), problems)
        return arrays

    def _headline(self, what: str) -> str:
        return f"cannot call the program {self._name!r}: {what} not what it was exported for"

    def _input_name(self, key: str) -> str:
        number, slash, below = key.partition("/")
        return self._signature.input_names[int(number)] + slash + below

    def _rebuild_outputs(self, outputs: dict[str, Any], own: FlatTree) -> Any:
        form = self._signature.outputs
        leaves = [
            _result(leaf, outputs[key]) if leaf.is_array else decode_value(leaf.constant)
            for key, leaf in zip(form.keys, form.leaves, strict=True)
        ]
        if self._places[0] is not own.nodes:
            self._places = own.nodes, find_subtrees(form.nodes, own.nodes)
        nodes = list(form.nodes)
        count = len(own.keys)
        # From the last to the first, so that the numbers of those in front stay right.
        for node, leaf in reversed(self._places[1]):
            leaves[leaf : leaf + count] = [own.unflatten(leaves[leaf : leaf + count])]
            nodes[node : node + len(own.nodes)] = [LEAF_NODE]
        return rebuild(nodes, leaves)


def _difference(form: LeafForm, leaf: Any) -> tuple[str, str] | None:
    """Kind and message of what is wrong with an argument; None when it will do."""
    given = form_of(leaf)
    if not given.is_array:
        return "kind", f"{form} in the program, a {type(leaf).__name__} was given"
    if given.impl != form.impl or (given.dtype != form.dtype and not _is_number_for(leaf, form)):
        is_wide = form.dtype != str(jax.dtypes.canonicalize_dtype(np.dtype(form.dtype)))
        hint = "; JAX has 64-bit types only with jax_enable_x64" if is_wide else ""
        return "dtype", f"{form} in the program, {given} was given{hint}"
    is_same_shape = len(given.shape) == len(form.shape) and all(
        type(size) is str or size == other for size, other in zip(form.shape, given.shape, strict=True)
    )
    return None if is_same_shape else ("shape", f"{form} in the program, {given} was given")


def _result(form: LeafForm, array: Any) -> Any:
    return with_weak_type(array) if form.weak_type else wrap(form, array)


def _from_file(form: LeafForm, value: Any) -> Any:
    if form.impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(value), impl=form.impl)
    is_raw = isinstance(value, np.ndarray) and value.dtype.type is np.void and value.dtype.names is None
    dtype = np.dtype(form.dtype)
    return value.view(dtype) if is_raw and value.dtype.itemsize == dtype.itemsize else value


def _is_number_for(leaf: Any, form: LeafForm) -> bool:
    """Whether a Python number becomes an array of this dtype as it would beside one."""
    dtype = np.dtype(form.dtype)
    return type(leaf) in (bool, int, float, complex) and jnp.result_type(leaf, dtype) == dtype


def _abstract(form: LeafForm) -> Any:
    """A leaf's shape and dtype as JAX has them."""
    if not form.is_array:
        return None
    if form.impl is not None:
        keys = jax.eval_shape(lambda: jax.random.key(0, impl=form.impl))
        return jax.ShapeDtypeStruct(form.shape[: len(form.shape) - _key_rank(form.impl)], keys.dtype)
    shape: Any = form.shape
    if any(type(size) is str for size in shape):
        shape = jax.export.symbolic_shape(", ".join(map(str, shape)))
    return jax.ShapeDtypeStruct(shape, np.dtype(form.dtype), weak_type=form.weak_type)


def _key_rank(impl: str) -> int:
    return len(_key_shape(impl))


def _key_shape(impl: str) -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
