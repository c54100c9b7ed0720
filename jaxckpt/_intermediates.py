"""Which values inside a function have a name, how does a caller get them, and which inputs matter at all?

`jax.ad_checkpoint.checkpoint_name` marks a value inside a function: an equation of the primitive ``name`` in the jaxpr
(JAX's record of what a function computes). `with_intermediates` gives a jaxpr with the same inputs and outputs, and
with the marked values as outputs behind those.

1. Look through the equations, in order of evaluation, for marks; the value is what goes into the equation, since a mark
   changes nothing.
2. An equation may hold a jaxpr of its own. If that one has marks, it gets further outputs by the same rule, and so does
   the equation. This is possible where the body is evaluated exactly once: ``jit``, ``checkpoint`` (remat) and plain
   calls. A call with custom derivatives becomes a plain call, if the caller allows it.
3. Names get TensorFlow's suffixes where they are not unique: ``h``, ``h_1``, ``h_2``. JAX does not name tangents and
   cotangents, so that ``h`` is the value of the forward pass also where the function computes gradients; what
   ``checkpoint`` computes again for the backward pass is a copy, and gets no name.

Nothing is inlined, and an equation without marks stays the very same object: compiled functions are still shared,
memory is still saved by ``checkpoint``, shardings stay. All evaluation is done by JAX.

`used_inputs` goes through a jaxpr backwards, from the outputs and the effects to the inputs.

Deliberately not here: marks inside loops, conditionals, ``shard_map`` and kernels. There is no such value, one for each
iteration, or only a part of it; their names are listed as unreachable.

Of JAX it uses ``jax.extend.core``, and what parameters equations have. Where a version of JAX differs from that, there
are no names, and all inputs count as used; a warning is logged, and nothing fails.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_log = logging.getLogger("jaxckpt")


@dataclasses.dataclass(frozen=True, slots=True)
class Intermediates:
    """A function on arrays whose marked values are further outputs.

    Attributes:
      closed_jaxpr: The function: its inputs are those of the original one, its outputs too, and after them come the
        named values. Call it with `evaluate`.
      names: Unique names of these values, in order of evaluation.
      unreachable: Names of marks that cannot be had, each once: those inside loops and the like.
    """

    closed_jaxpr: Any
    names: tuple[str, ...]
    unreachable: tuple[str, ...]


def with_intermediates(
    closed_jaxpr: Any, *, inline_custom: bool, taken: Collection[str] = ()
) -> Intermediates:
    """Makes outputs of the values that `jax.ad_checkpoint.checkpoint_name` marks inside a function.

    The other outputs stay what they are, and so do the derivatives of the function.

    Args:
      closed_jaxpr: The function, from `jax.make_jaxpr`.
      inline_custom: Whether functions with custom derivatives may lose these where marks are inside. Pass False if
        derivatives will be taken of the result; such marks are unreachable then.
      taken: Names that may not be used.

    Returns:
      The function with its names. They are empty if this version of JAX is not understood, which is logged.

    Example:
      >>> import jax
      >>> from jax.ad_checkpoint import checkpoint_name
      >>> closed_jaxpr = jax.make_jaxpr(lambda x: checkpoint_name(x + 1, "hidden") * 2)(3)
      >>> named = with_intermediates(closed_jaxpr, inline_custom=True)
      >>> outputs, values = evaluate(named, [3])
      >>> int(outputs[0]), {name: int(value) for name, value in values.items()}
      (8, {'hidden': 4})
    """
    try:
        from jax.extend.core import jaxpr_as_fun

        exposed = _expose(closed_jaxpr, inline_custom=inline_custom, known={})
        if exposed.names:
            # What JAX cannot evaluate is found out here, where there is something to fall back on.
            shapes = jax.eval_shape(jaxpr_as_fun(exposed.jaxpr), *closed_jaxpr.in_avals)
            if len(shapes) != len(closed_jaxpr.out_avals) + len(exposed.names):
                raise ValueError(f"{len(shapes)} outputs, of which {len(exposed.names)} have names")
    except Exception as error:
        message = (
            "this version of JAX (%s) keeps the marks of checkpoint_name otherwise than expected (%s: %s); "
            "there are outputs, but no intermediate values"
        )
        _log.warning(message, jax.__version__, type(error).__name__, error)
        return Intermediates(closed_jaxpr, (), ())
    names = _make_unique(exposed.names, taken)
    return Intermediates(exposed.jaxpr, names, tuple(dict.fromkeys(exposed.unreachable)))


def evaluate(named: Intermediates, values: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Calls a function with names; it may be traced.

    Args:
      named: From `with_intermediates`.
      values: One for each input.

    Returns:
      The outputs of the original function, and the named values by name. Of typed PRNG keys among the named values
      it gives the data.
    """
    from jax.extend.core import jaxpr_as_fun

    results = list(jaxpr_as_fun(named.closed_jaxpr)(*values))
    output_count = len(results) - len(named.names)
    intermediates = map(_without_keys, results[output_count:])
    return results[:output_count], dict(zip(named.names, intermediates, strict=True))


def used_inputs(closed_jaxpr: Any) -> list[bool]:
    """Which inputs of a function can have an influence on an output or an effect.

    An input of an inner function counts only where that one uses it. Loops, conditionals and functions with custom
    derivatives use all of their inputs, as far as this function knows.

    Args:
      closed_jaxpr: From `jax.make_jaxpr`, or that of `with_intermediates`, whose named values are outputs.

    Returns:
      One value for each input. All are True if this version of JAX is not understood, which is logged.
    """
    try:
        return _used_inputs(_body_of(closed_jaxpr), (True,) * len(closed_jaxpr.out_avals), known={})
    except Exception as error:
        message = (
            "cannot tell which inputs are used in this version of JAX (%s; %s: %s); all of them are kept"
        )
        _log.warning(message, jax.__version__, type(error).__name__, error)
        return [True] * len(closed_jaxpr.in_avals)


@dataclasses.dataclass(frozen=True, slots=True)
class _Exposed:
    """A jaxpr whose last outputs are its marked values; open or closed, as the original is.

    Names are in the order of these outputs, and not unique.
    """

    jaxpr: Any
    names: tuple[str, ...]
    unreachable: tuple[str, ...]


def _expose(jaxpr: Any, *, inline_custom: bool, known: dict[int, _Exposed]) -> _Exposed:
    """What is known stands below the identity of the jaxpr: a function that is called twice remains one function."""
    from jax.extend.core import primitives

    if id(jaxpr) in known:
        return known[id(jaxpr)]
    body = _body_of(jaxpr)
    equations: list[Any] = []
    values: list[Any] = []
    names: list[str] = []
    unreachable: list[str] = []
    for original in body.eqns:
        equation = original
        if equation.primitive is primitives.name_p:
            values.append(equation.invars[0])
            names.append(equation.params["name"])
        elif _is_recomputation(equation):
            pass
        elif _place_of_body(equation, inline_custom=inline_custom):
            equation, inner = _expose_inside(original, inline_custom=inline_custom, known=known)
            values.extend(equation.outvars[len(original.outvars) :])
            names.extend(inner.names)
            unreachable.extend(inner.unreachable)
        else:
            unreachable.extend(_names_inside(equation))
        equations.append(equation)
    if names:
        body = body.replace(eqns=equations, outvars=[*body.outvars, *values])
        jaxpr_with_names = jaxpr.replace(jaxpr=body) if _is_closed(jaxpr) else body
    else:
        jaxpr_with_names = jaxpr
    exposed = _Exposed(jaxpr_with_names, tuple(names), tuple(unreachable))
    known[id(jaxpr)] = exposed
    return exposed


def _expose_inside(equation: Any, *, inline_custom: bool, known: dict[int, _Exposed]) -> tuple[Any, _Exposed]:
    """An equation with the marked values of its body as further outputs; the same object if there are none."""
    from jax.extend.core import Var, primitives

    place = _place_of_body(equation, inline_custom=inline_custom)
    exposed = _expose(equation.params[place], inline_custom=inline_custom, known=known)
    count = len(exposed.names)
    if not count:
        return equation, exposed
    primitive = equation.primitive
    params = {**equation.params, place: exposed.jaxpr}
    if primitive is primitives.jit_p:
        plain = _params_of_plain_jit()
        for name in ("out_shardings", "out_layouts"):
            params[name] = (*params[name], *plain[name] * count)
    elif primitive in _custom_primitives():
        primitive = primitives.closed_call_p
        params = {place: exposed.jaxpr}
    new = [Var(value.aval) for value in _body_of(exposed.jaxpr).outvars[-count:]]
    return equation.replace(primitive=primitive, params=params, outvars=[*equation.outvars, *new]), exposed


def _place_of_body(equation: Any, *, inline_custom: bool) -> str:
    """The parameter with the body, if that is evaluated exactly once and its outputs are those of the equation."""
    from jax.extend.core import primitives

    if equation.primitive in (primitives.jit_p, primitives.remat_p):
        return "jaxpr"
    if equation.primitive is primitives.closed_call_p:
        return "call_jaxpr"
    if inline_custom and equation.primitive in _custom_primitives():
        return "call_jaxpr"
    return ""


def _custom_primitives() -> tuple[Any, ...]:
    from jax.extend.core import primitives

    return primitives.custom_jvp_call_p, primitives.custom_vjp_call_p


def _is_recomputation(equation: Any) -> bool:
    """Whether it is the backward pass of `jax.checkpoint`, whose marks are on copies."""
    from jax.extend.core import primitives

    return equation.primitive is primitives.remat_p and equation.params["differentiated"]


def _params_of_plain_jit() -> dict[str, Any]:
    """Parameters of a ``jit`` of one input and one output, whose shardings and layouts are left to the compiler."""
    [equation] = jax.make_jaxpr(jax.jit(lambda x: x, inline=False))(np.float32(0)).eqns
    return equation.params


def _names_inside(equation: Any) -> list[str]:
    """Names of all marks in the bodies of an equation, however deep."""
    from jax.extend.core import jaxprs_in_params, primitives

    found: list[str] = []
    seen: set[int] = set()
    pending = list(jaxprs_in_params(equation.params))
    while pending:
        body = pending.pop(0)
        if id(body) in seen:
            continue
        seen.add(id(body))
        for inner in body.eqns:
            if inner.primitive is primitives.name_p:
                found.append(inner.params["name"])
            elif not _is_recomputation(inner):
                pending.extend(jaxprs_in_params(inner.params))
    return found


def _make_unique(names: Sequence[str], taken: Collection[str]) -> tuple[str, ...]:
    used = set(taken)
    unique: list[str] = []
    for name in names:
        candidate, count = name, 0
        while candidate in used:
            count += 1
            candidate = f"{name}_{count}"
        used.add(candidate)
        unique.append(candidate)
    return tuple(unique)


def _without_keys(value: Any) -> Any:
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if is_key else value


def _is_closed(jaxpr: Any) -> bool:
    """Whether constants stand beside the jaxpr. Where JAX has one class for both kinds, a jaxpr is its own body."""
    return getattr(jaxpr, "jaxpr", jaxpr) is not jaxpr


def _body_of(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if _is_closed(jaxpr) else jaxpr


def _used_inputs(
    body: Any, is_output_used: tuple[bool, ...], known: dict[tuple[int, tuple[bool, ...]], list[bool]]
) -> list[bool]:
    from jax.extend.core import Literal

    question = (id(body), is_output_used)
    if question in known:
        return known[question]
    used = {
        value
        for value, is_used in zip(body.outvars, is_output_used, strict=True)
        if is_used and not isinstance(value, Literal)
    }
    for equation in reversed(body.eqns):
        is_result_used = tuple(result in used for result in equation.outvars)
        if not any(is_result_used) and not equation.effects:
            continue
        # What derivatives are made of is not in the body of a function with custom ones.
        place = _place_of_body(equation, inline_custom=False)
        if place:
            needs = _used_inputs(_body_of(equation.params[place]), is_result_used, known)
        else:
            needs = [True] * len(equation.invars)
        for value, is_needed in zip(equation.invars, needs, strict=True):
            if is_needed and not isinstance(value, Literal):
                used.add(value)
    known[question] = [value in used for value in body.invars]
    return known[question]
