"""Benchmarks of jaxckpt: how fast is a durable save and a restore, against raw I/O and against its peers?

    python -m benchmarks.run [--quick] [--only NAME] [--dir DIR] [--repeat N]

Read in this order:

1. `workloads`    the trees that are saved: sizes, shardings, reproducible values, and their comparison
2. `contenders`   everything that saves and restores them: jaxckpt, Orbax, plain system calls
3. `measure`      seconds, peak memory and bytes of one operation, from the kernel; warm and cold files
4. `trial`        one save or one restore in a process of its own: the unit of all measurements
5. `run`          the command: interleaves the trials of all contenders
6. `report`       medians, ratios, tables, JSON, RESULTS.md

`path_length` and `import_cost` are commands of their own: how much code a save and a restore run through, and
what `import jaxckpt` costs. So are `loops` (managers in a training loop), `groups` (several processes, and one of them
fails), `scale` (plans and manifests of thousands of processes), `behaviour` and `storage`.
"""
