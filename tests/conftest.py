"""Eight CPU devices, a compilation cache that outlives the run, and the shared data's place.

Set here, in the environment, because it must be there before jax is imported, and in the tests' subprocesses too.
"""

import getpass
import os
import pathlib
import tempfile

import pytest

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"dit_video-jax-cache-{getpass.getuser()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: minutes, or many processes; leave out with -m "not slow"')


@pytest.fixture(scope="session")
def shared():
    """The directory of clips, broken media and reference arrays (DIT_VIDEO_SHARED, by default ../shared)."""
    root = pathlib.Path(__file__).resolve().parent.parent
    path = pathlib.Path(os.environ.get("DIT_VIDEO_SHARED", root.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set DIT_VIDEO_SHARED)")
    return path


@pytest.fixture(scope="session")
def golden(shared):
    """The directory of what reference implementations gave."""
    path = shared / "golden"
    if not path.is_dir():
        pytest.skip(f"no reference arrays at {path}")
    return path
