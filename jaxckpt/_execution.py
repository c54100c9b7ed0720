"""How does ``jaxckpt run`` get the inputs of a program from files, and its results into one?

Files are NumPy's: ``.npy`` holds one array, ``.npz`` several by name. Nothing is unpickled. NumPy's files do not know
the dtypes that JAX adds (bfloat16, float8 and others) and hold their elements as raw bytes, which are taken for what
the program wants.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._calling import StoredProgram
from ._errors import CheckpointError, printable


class InputError(CheckpointError, ValueError):
    """What was given as inputs does not fit the program, or cannot be read."""


def read_inputs(program: StoredProgram, given: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs of a program by name.

    Args:
      program: Says which inputs there are.
      given: ``FILE.npy`` for the next input that has no value yet, ``NAME=FILE.npy``, or ``FILE.npz``.

    Raises:
      InputError: A file cannot be read, or the inputs are not those of the program.
    """
    found: dict[str, np.ndarray[Any, Any]] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or (os.path.exists(text) and name not in program.inputs):
            name, path = "", text
        loaded = _load(path)
        if isinstance(loaded, np.ndarray):
            free = [each for each in program.inputs if each not in found]
            if not name and not free:
                raise InputError(f"{printable(path)}: {_what_it_takes(program)}")
            loaded = {name or free[0]: loaded}
        elif name:
            raise InputError(f"{printable(path)} has names of its own; give it without {name}=")
        for each, array in loaded.items():
            if each not in program.inputs or each in found:
                problem = "was given twice" if each in found else "is not an input"
                raise InputError(f"{printable(each)} {problem}: {_what_it_takes(program)}")
            found[each] = array
    missing = [name for name in program.inputs if name not in found]
    if missing:
        raise InputError(f"no value for {', '.join(missing)}: {_what_it_takes(program)}")
    return found


def _what_it_takes(program: StoredProgram) -> str:
    inputs = ", ".join(f"{name}: {form}" for name, form in program.inputs.items()) or "nothing"
    return f"the program {program.name!r} takes {inputs}"


def _load(path: str) -> np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot read {printable(path)}: {printable(reason)}") from error


def run_program(
    program: StoredProgram, inputs: Mapping[str, Any], fetch: Sequence[str]
) -> dict[str, np.ndarray[Any, Any]]:
    """Results of a bound program by name.

    Args:
      program: Bound to values.
      inputs: By name.
      fetch: Which outputs and values inside; none of them: all outputs.

    Raises:
      InputError: There is no such value, or the inputs have other shapes or dtypes.
    """
    names = list(fetch) or list(program.results)
    known = [*program.results, *program.intermediates]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"no value {', '.join(unknown)}: the program {program.name!r} has {', '.join(known)}"
        )
    try:
        values = program.fetch(names, *program.inputs_from(inputs))
    except (TypeError, ValueError) as error:  # shapes that are wrong, alone or together
        raise InputError("\n".join([str(error), *getattr(error, "__notes__", [])])) from error
    return {name: _to_numpy(value) for name, value in zip(names, values, strict=True)}


def _to_numpy(value: Any) -> np.ndarray[Any, Any]:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def write_results(path: str, results: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes results to a file.

    Args:
      path: Ends with ``.npy``, for one array, or ``.npz``.
      results: By name.

    Raises:
      InputError: The ending is another one, or there are several arrays for one.
    """
    if path.endswith(".npz"):
        # By hand: `numpy.savez` takes no array of the name "file".
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in results.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, array, allow_pickle=False)
        return
    if not path.endswith(".npy"):
        raise InputError(f"{printable(path)}: results are written to .npy and .npz files")
    if len(results) != 1:
        raise InputError(
            f"{printable(path)} takes one array, and there are {len(results)} ({', '.join(results)}): "
            "name one with --fetch, or write them to a .npz file"
        )
    (array,) = results.values()
    np.save(path, array, allow_pickle=False)
