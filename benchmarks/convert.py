"""How long does ``jaxckpt convert`` take, and how much memory?

    python -m benchmarks.convert [--mib 2048] [--dir DIR]

A bundle of TensorFlow's (format V2) with arrays of 256 MiB is made in DIR, converted to a checkpoint of jaxckpt and
back, each by the command in a process of its own, and each also with ``--dtype bfloat16``. Printed are seconds, and the
most memory that the kernel saw the process have, beside that of a process that only imports the command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
ARRAY_MIB = 256

# In a process of its own: the peak of a child counts what its parent had when it was started.
_MAKE = """
import sys, numpy as np, jaxckpt
prefix, arrays, elements = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random = np.random.default_rng(0)
tree = {f"layer_{number}": {"kernel": random.standard_normal(elements, np.float32)} for number in range(arrays)}
jaxckpt.interop.tensorflow.write(prefix, tree)
"""


def run(*arguments: str) -> tuple[float, float]:
    """Seconds, and MiB at the peak, of a Python process."""
    began_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{arguments} ended with {process.returncode}")
    return time.perf_counter() - began_s, usage.ru_maxrss * 1024 / MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--dir", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        bundle, checkpoint = f"{directory}/model.ckpt", f"{directory}/converted"
        arrays = max(arguments.mib // ARRAY_MIB, 1)
        run("-c", _MAKE, bundle, str(arrays), str(arguments.mib * MIB // arrays // 4))
        convert = ("-m", "jaxckpt", "convert")
        back = ("--to", "tensorflow", "--overwrite")
        half = ("--dtype", "bfloat16", "--overwrite")
        trials = {
            "imports alone": ("-c", "import jaxckpt._cli, jaxckpt.interop.tensorflow"),
            "TensorFlow to jaxckpt": (*convert, bundle, checkpoint),
            "jaxckpt to TensorFlow": (*convert, checkpoint, f"{directory}/back", *back),
            "TensorFlow to jaxckpt, bfloat16": (*convert, bundle, f"{directory}/half", *half),
        }
        print(f"{arguments.mib} MiB".ljust(34) + "seconds      MiB")
        for name, command in trials.items():
            seconds, mib = run(*command)
            print(f"{name:34}{seconds:7.1f}  {mib:7.0f}")


if __name__ == "__main__":
    main()
