"""jaxckpt checkpoints JAX pytrees."""

from __future__ import annotations

from ._checkpoint import open as open
from ._checkpoint import restore as restore
from ._checkpoint import save as save
from ._checkpoint import save_async as save_async
from ._config import RestoreOptions as RestoreOptions
from ._config import SaveOptions as SaveOptions
from ._errors import CheckpointError as CheckpointError
from ._errors import CorruptError as CorruptError
from ._errors import ExistsError as ExistsError
from ._errors import FormatError as FormatError
from ._errors import MismatchError as MismatchError
from ._errors import NotFoundError as NotFoundError
from ._errors import Problem as Problem
from ._errors import UnsupportedLeafError as UnsupportedLeafError
from ._errors import WriteError as WriteError
from ._progress import Progress as Progress
from ._reading import Checkpoint as Checkpoint
from ._reading import StoredLeaf as StoredLeaf
from ._restoring import RestoreReport as RestoreReport
from ._saving import CheckpointInfo as CheckpointInfo
from ._saving import PendingSave as PendingSave
from ._inspect import Description as Description
from ._inspect import DiffReport as DiffReport
from ._inspect import LeafDescription as LeafDescription
from ._inspect import VerifyReport as VerifyReport
from ._inspect import describe as describe
from ._inspect import diff as diff
from ._inspect import verify as verify
