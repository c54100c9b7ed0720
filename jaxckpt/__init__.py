"""jaxckpt checkpoints JAX pytrees.

`save` and `save_async` write a tree to a new checkpoint, `restore` brings it back on whatever devices are there,
`open` reads leaves or parts of them as NumPy arrays, `verify`, `describe` and `diff` look into what is stored.
FORMAT.md, beside this file, specifies what is on disk.

The modules, in the order in which to read them. Each imports only from those that stand below it; ``tests`` enforce it.

    _cli          the command ``jaxckpt``
    _converting   the command that turns a checkpoint of one library into one of another
    _callback     what a training loop calls: resume, save, stop
    _manager      a directory of numbered checkpoints
    _resuming     which of them a run goes on from
    _deciding     which calls of a manager save, and how these begin
    _background   what of a manager goes on, and failures of which nobody knows
    _uploading    committed steps go on to a second tier
    _copying      a checkpoint goes to another store, verified
    _adopting     checkpoints of other libraries, restored as ours are
    _addressing   which of their arrays like, select and rename speak of
    _foreign      what an open checkpoint of another library is
    _nesting      names in foreign files <-> keys of trees; pure
    _checkpoint   the story: save, save_async, restore, open. Start here
    _events       what an observer of a manager hears
    _execution    the command that runs a stored program
    _inspect      describe, verify, diff
    _pending      a save in the background, and who learns that it failed
    _exchange     which leaves a group of processes reads once and moves between devices
    _bundling     small leaves that a group reads once and gathers together
    _saving       one save from the tree to the commit
    _planning     all of a save that does not depend on the values, remembered; pure
    _restoring    one restore from the manifest to the tree
    _collective   what processes tell each other so that all of them save one checkpoint, or none
    _reading      Checkpoint and StoredLeaf: an open checkpoint as NumPy arrays
    _calling      opening and calling stored programs
    _gathering    pieces and rows of saved leaves become leaves
    _placement    verified bytes on the host become leaves
    _keeping      which numbered checkpoints count, and deleting those that no rule keeps
    _steps        which numbered checkpoints a directory holds; checkpoint.json
    _programs     functions <-> bytes, exported by jax.export
    _snapshot     device -> host, within a bound on host memory
    _pinned       ... from accelerators, while the training loop goes on
    _viewing      ... as views of what is in host memory
    _staging      host memory for snapshots: its bound and its buffers
    _persist      threads that checksum and write
    _commit       when a checkpoint exists, and why no crash leaves half of one
    _individual   leaves that each process has for itself, where they differ
    _ownership    which process writes which chunk; pure
    _matching     which saved leaf goes to which leaf of like, and how the two differ; pure
    _naming       which saved leaves are asked for, and their new names: select, rename; pure
    _deriving     leaves that are made of rows of saved leaves: Pieces, Vocabulary; pure
    _fetching     reading and verifying what is planned
    _resharding   which bytes must be read for which boxes; pure
    _leaves       kinds of leaves; what is refused
    _layout       shape, dtype and sharding -> chunks, packs and pieces; pure
    _parts        which process wrote a chunk, and where it lies
    _zarr         the zarr.json objects; pure
    _encoding     the bytes of the manifest: written, parsed and validated; pure
    _manifest     the records of the manifest; pure
    _tables       the tables of chunks, and whether they are possible; pure
    _values       Python values in the manifest; pure
    _leader       process 0 decides for the managers of all processes
    _processes    the processes of a jax.distributed job: telling, agreeing, failing together
    _indexing     basic indexing -> boxes; pure
    _shardings    describing and rebuilding shardings
    _keys         pytree <-> {key: leaf} and the record of its structure
    _items        small values and states of objects beside a tree, and their bytes; pure
    _schedule     which steps are saved; pure
    _retention    which steps stay; pure
    _preemption   learning that this process will be ended
    _store        objects in local files
    _buckets      objects in object stores; the only one of these that imports tensorstore
    _storage      what every store does; the memory that objects are read into
    _intermediates   values inside of a function that have a name; which inputs it uses
    _dtypes       names of dtypes, and their bytes on disk
    _config       every tunable, with the source of its default
    _terminal     what a person at a terminal sees
    _reporting    what a restore did
    _progress     what observers are told
    _garbage      a pause of Python's garbage collector
    _errors       the exception tree
"""

from __future__ import annotations

from typing import Any as _Any

from ._callback import CheckpointCallback as CheckpointCallback
from ._calling import StoredProgram as StoredProgram
from ._checkpoint import open as open, restore as restore, save as save, save_async as save_async
from ._config import RestoreOptions as RestoreOptions, SaveOptions as SaveOptions
from ._deriving import Pieces as Pieces, Vocabulary as Vocabulary
from ._errors import (
    CheckpointError as CheckpointError,
    CoordinationError as CoordinationError,
    CorruptError as CorruptError,
    ExistsError as ExistsError,
    FormatError as FormatError,
    MismatchError as MismatchError,
    MissingDependencyError as MissingDependencyError,
    NotFoundError as NotFoundError,
    Problem as Problem,
    ProcessFailure as ProcessFailure,
    ProcessMismatchError as ProcessMismatchError,
    UnsupportedLeafError as UnsupportedLeafError,
    UntrustedProgramError as UntrustedProgramError,
    WriteError as WriteError,
)
from ._events import CheckpointEvent as CheckpointEvent
from ._inspect import (
    Description as Description,
    DiffReport as DiffReport,
    LeafDescription as LeafDescription,
    ProgramDescription as ProgramDescription,
    VerifyReport as VerifyReport,
    describe as describe,
    diff as diff,
    verify as verify,
)
from ._manager import CheckpointManager as CheckpointManager
from ._pending import PendingSave as PendingSave
from ._preemption import Preemption as Preemption
from ._programs import Program as Program
from ._progress import Progress as Progress
from ._reading import Checkpoint as Checkpoint, StoredLeaf as StoredLeaf
from ._reporting import RestoreReport as RestoreReport
from ._retention import Best as Best, Verdict as Verdict
from ._saving import CheckpointInfo as CheckpointInfo
from ._uploading import UploadOptions as UploadOptions

__version__: str


def __getattr__(name: str) -> _Any:
    """The version and the foreign formats are looked up when they are asked for, so that the import stays quick."""
    if name == "__version__":
        from ._saving import library_versions

        return library_versions()["jaxckpt"]
    if name == "interop":
        import importlib

        return importlib.import_module("jaxckpt.interop")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
