"""Settings for all tests: sixteen forced CPU devices, and quick compilation, set before anything imports jax."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .object_servers import Remote

# Most of the time of many tests would go into machine code that is good, and runs once.
_FLAGS = (
    "--xla_force_host_platform_device_count=16",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_given, *(flag for flag in _FLAGS if flag.split("=")[0] not in _given)])

import hypothesis  # noqa: E402  jax must not be imported before the flag is set
import pytest  # noqa: E402

# A busy machine is no failure, and those who want more examples set their number.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=50)
hypothesis.settings.load_profile("tests")

# A program of its own, which needs TensorFlow.
collect_ignore = ["tensorflow/generate.py"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, for tests of deadlines and signals wait more than they compute."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker that ends with quick tests does not let the others wait
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        names = vars(getattr(item, "module", None) or object)
        if "run_processes" in names or "start_processes" in names:
            item.add_marker(pytest.mark.processes)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where a test saves its checkpoint; nothing is there yet."""
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def remotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Remote]]:
    """The object stores of the session by scheme; all of pytest's workers share the servers, each has its proxies."""
    from .object_servers import Remote, running_servers
    from .proxy import Proxy

    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(running_servers(directory))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        found: dict[str, Remote] = {}
        for scheme, server in servers.items():
            found[scheme] = Remote(scheme, server, stack.enter_context(Proxy(server.port)))
            for name, value in found[scheme].environment.items():
                patch.setenv(name, value)
        yield found


@pytest.fixture
def s3(remotes: dict[str, Remote]) -> Iterator[Remote]:
    """An S3 server; nobody has asked it anything yet."""
    yield from _undisturbed(remotes["s3"])


@pytest.fixture(params=["s3", "gs"])
def remote(request: pytest.FixtureRequest, remotes: dict[str, Remote]) -> Iterator[Remote]:
    """An S3 server, and a GCS server; nobody has asked it anything yet."""
    yield from _undisturbed(remotes[request.param])


def _undisturbed(remote: Remote) -> Iterator[Remote]:
    if remote.problem:
        pytest.skip(remote.problem)
    remote.proxy.reset()
    yield remote
    remote.proxy.reset()
