"""Benchmarks of jaxckpt: how fast is a durable save and a restore, against raw I/O and against its peers?

    python -m benchmarks.run [--quick] [--only NAME] [--dir DIR] [--repeat N]    measures, writes results.json
    python -m benchmarks.report                                                  writes RESULTS.md, README's tables
    python -m benchmarks.plot                                                    draws results.png

Read in this order:

1. `workloads`    the trees that are saved: sizes, shardings, reproducible values, and their comparison
2. `contenders`   everything that saves and restores them: jaxckpt, its peers, plain system calls
3. `measure`      seconds, peak memory and bytes of one operation, from the kernel; warm and cold files
4. `trial`        one save or one restore in a process of its own: the unit of all measurements of trees
5. `run`          the command: interleaves the trials of all contenders, then runs the studies
6. `study`        what a study is; `studies` lists them: `partial` reads, a training `loop`, `endurance`, `memory`,
                  `opening` and listing, `growth`, `checksums`, and the cost of the code itself (`code_cost`)
7. `ratios`       results files, and ratios within each repetition of a run
8. `figures`      the targets, and whether they are met
9. `report`       tables: for a terminal, RESULTS.md, README.md
10. `plot`        the picture

Commands of their own: `gpu` (everything about one machine's GPUs), `groups` (several processes, and one of them fails),
`scale` (plans and manifests of thousands of processes), `convert` (TensorFlow's checkpoints), `behaviour` (awkward
inputs) and `storage` (ways to write a file).
"""
