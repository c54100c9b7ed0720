"""The names that the examples in docstrings use: jaxckpt, jax, jnp, np, and ``tmp``, an empty directory."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _names_of_examples(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxckpt

    tmp: pathlib.Path = request.getfixturevalue("tmp_path")
    doctest_namespace.update(jax=jax, jaxckpt=jaxckpt, jnp=jnp, np=np, tmp=tmp)
