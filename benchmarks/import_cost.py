"""What does `import jaxckpt` add to `import jax`?

    python -m benchmarks.import_cost [--repeat N]

Each import is timed in a new interpreter, in turns with the peers. The median of the seconds is printed, and
the number of modules.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import trial

PACKAGES = ("jaxckpt", "orbax.checkpoint", "orbax.checkpoint.experimental.v1")

DEFAULT_REPEAT = 11

TIMEOUT_S = 120

# The child prints one JSON object; an absent package leaves it without figures.
CHILD = """
import importlib, json, sys, time
import jax
before = set(sys.modules)
start = time.perf_counter()
try:
    importlib.import_module(sys.argv[1])
except ModuleNotFoundError as error:
    print(json.dumps({"absent": str(error)}))
else:
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "modules": len(set(sys.modules) - before)}))
"""


def import_cost(package: str) -> dict[str, Any]:
    """Imports `package` after jax in a new interpreter; returns its `seconds` and `modules`, or `absent`."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, package],
        cwd=trial.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.import_cost", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--repeat", type=int, default=DEFAULT_REPEAT, metavar="N")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {package: [] for package in PACKAGES}
    for package in PACKAGES:
        import_cost(package)  # fills the page cache and writes the .pyc files
    for _ in range(arguments.repeat):
        for package in PACKAGES:
            found[package].append(import_cost(package))
    print(f"{'import':34}  {'seconds over jax: median [min-max]':>34}  modules over jax")
    for package, costs in found.items():
        if "absent" in costs[0]:
            print(f"{package:34}  {costs[0]['absent']}")
            continue
        seconds = [cost["seconds"] for cost in costs]
        text = f"{statistics.median(seconds):.3f} [{min(seconds):.3f}-{max(seconds):.3f}]"
        print(f"{package:34}  {text:>34}  {costs[0]['modules']:>16}")


if __name__ == "__main__":
    main()
