"""The modules form levels: each imports only from lower ones, and the package only what it declares.

Also what an import costs: nothing that is needed by some users only is loaded with the package.
"""

from __future__ import annotations

import ast
import json
import pathlib
import re
import sys

import pytest

import jaxckpt

from .helpers import run_program

PACKAGE = pathlib.Path(jaxckpt.__file__).resolve().parent

LEVELS = (
    (
        "_config",
        "_dtypes",
        "_errors",
        "_garbage",
        "_intermediates",
        "_preemption",
        "_progress",
        "_schedule",
        "_shardings",
    ),
    (
        "_indexing",
        "_items",
        "_keys",
        "_processes",
        "_reporting",
        "_retention",
        "_storage",
        "_tables",
        "_terminal",
        "_values",
    ),
    ("_buckets", "_leader", "_manifest", "_nesting"),
    ("_deriving", "_encoding", "_foreign", "_layout", "_parts", "_programs", "_store", "_zarr"),
    ("_commit", "_leaves", "_matching", "_naming", "_ownership", "_persist", "_resharding"),
    ("_addressing", "_fetching", "_individual", "_placement", "_planning", "_staging", "_steps", "_viewing"),
    ("_calling", "_collective", "_gathering", "_keeping", "_pinned"),
    ("_execution", "_reading", "_snapshot"),
    ("_copying", "_inspect", "_restoring", "_saving"),
    ("_adopting", "_bundling", "_converting", "_events", "_pending", "_uploading"),
    ("_background", "_exchange"),
    ("_checkpoint", "_deciding"),
    ("_resuming",),
    ("_manager",),
    ("_callback", "_cli"),
    ("__init__", "__main__"),
)
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}

# What pyproject.toml declares, and ml_dtypes, which is a part of every JAX.
DECLARED = {"jax", "jaxlib", "ml_dtypes", "msgpack", "numpy", "xxhash"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and names of foreign packages, that a module imports anywhere in it."""
    own: set[str] = set()
    foreign: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            foreign |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            own |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add((node.module or "").partition(".")[0])
    return own, foreign - set(sys.stdlib_module_names)


def test_every_module_has_a_level_and_every_level_its_modules() -> None:
    assert sorted(LEVEL_OF) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_levels(module: str) -> None:
    own, _ = imports_of(module)
    assert own <= set(LEVEL_OF)
    assert [name for name in sorted(own) if LEVEL_OF[name] >= LEVEL_OF[module]] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_stands_higher_than_its_imports_need(module: str) -> None:
    own, _ = imports_of(module)
    needed = 1 + max((LEVEL_OF[name] for name in own), default=-1)
    # `__main__` stands at the top beside `__init__`.
    assert LEVEL_OF[module] == needed or module in ("__init__", "__main__")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_declared_packages_only(module: str) -> None:
    _, foreign = imports_of(module)
    allowed = DECLARED | ({"tensorstore"} if module == "_buckets" else set())
    # Methods of an open checkpoint that are short for a public verb call it by its public name.
    allowed |= {"jaxckpt"} if module == "_reading" else set()
    assert foreign - allowed == set()


def test_tensorstore_is_imported_by_one_module() -> None:
    _, foreign = imports_of("_buckets")
    assert "tensorstore" in foreign


def test_the_declared_packages_are_those_of_the_project() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [")[2].partition("]")[0]
    declared = set(re.findall(r'"([a-z]+)', block))
    assert declared == DECLARED - {"ml_dtypes"} | {"tensorstore"}


def test_the_map_of_the_package_names_every_module_in_an_order_that_holds() -> None:
    named = re.findall(r"^    (_[a-z]+) ", jaxckpt.__doc__ or "", re.MULTILINE)
    assert sorted(named) == [name for name in MODULES if not name.startswith("__")]
    for place, module in enumerate(named):
        own, _ = imports_of(module)
        assert own <= set(named[place + 1 :]), module


def test_the_table_of_levels_in_the_design_is_this_one() -> None:
    text = (PACKAGE / "DESIGN.md").read_text(encoding="utf-8")
    table: list[set[str]] = []
    for number, cell in re.findall(r"^\| ([0-9]+) \| (.*) \|$", text, re.MULTILINE):
        assert int(number) == len(table)
        table.append({entry.split("`")[1] for entry in cell.split(" · ") if entry.startswith("`_")})
    assert table == [set(modules) for modules in LEVELS[:-1]]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)


def test_the_import_loads_little_and_nothing_that_few_need() -> None:
    result = run_program(
        """
        import json, sys
        import jax
        before = set(sys.modules)
        import jaxckpt
        print(json.dumps(sorted(set(sys.modules) - before)))
        """
    )
    loaded = json.loads(result.stdout)
    assert "jaxckpt" in loaded
    assert len(loaded) < 100
    packages = {name.partition(".")[0] for name in loaded}
    assert packages & {"tensorstore", "orbax", "zarr", "asyncio", "flax", "optax", "argparse"} == set()
    assert "jaxckpt._cli" not in loaded


def test_the_import_has_no_side_effects() -> None:
    """No devices are looked for, no thread runs, and nothing listens to the logger."""
    run_program(
        """
        import logging, threading
        import jaxckpt
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        assert threading.active_count() == 1
        assert logging.getLogger("jaxckpt").handlers == []
        """
    )


def test_a_save_and_a_restore_of_local_files_need_no_tensorstore(tmp_path: pathlib.Path) -> None:
    run_program(
        """
        import sys
        import jax.numpy as jnp, jaxckpt
        jaxckpt.save(sys.argv[1], {"a": jnp.arange(3)})
        jaxckpt.restore(sys.argv[1])
        assert "tensorstore" not in sys.modules
        """,
        tmp_path / "a",
    )


INTEROP = {path.stem: path for path in (PACKAGE / "interop").glob("*.py")}


def interop_imports_of(module: str) -> tuple[set[str], set[str], set[str]]:
    """Modules beside it, modules of the package, and foreign packages that a module of ``interop`` imports."""
    beside: set[str] = set()
    package: set[str] = set()
    foreign: set[str] = set()
    for node in ast.walk(ast.parse(INTEROP[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            beside |= {node.module} if node.module else {alias.name for alias in node.names}
            continue
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        package |= {name.partition(".")[2] for name in names if name.startswith("jaxckpt.")}
        foreign |= {name.partition(".")[0] for name in names} - {"jaxckpt"}
    return beside, package, foreign - set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", sorted(INTEROP))
def test_a_module_of_interop_imports_what_stands_below_the_checkpoint_and_declared_packages(
    module: str,
) -> None:
    beside, package, foreign = interop_imports_of(module)
    assert beside <= set(INTEROP)
    assert [name for name in sorted(package) if LEVEL_OF[name] >= LEVEL_OF["_checkpoint"]] == []
    assert foreign - DECLARED == ({"tensorstore"} if module == "_zarrays" else set())
    assert ast.get_docstring(ast.parse(INTEROP[module].read_text(encoding="utf-8")))


def test_no_circle_of_imports_in_interop() -> None:
    waiting = {module: interop_imports_of(module)[0] for module in INTEROP}
    while waiting:
        ready = {module for module, beside in waiting.items() if not beside & set(waiting)}
        assert ready, waiting
        waiting = {module: beside for module, beside in waiting.items() if module not in ready}
