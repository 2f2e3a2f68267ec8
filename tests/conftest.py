"""Settings for every test: fixed seeds, uninitialised memory filled with NaN, reproducible property tests."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels on a CPU; triton, which transformers imports, reads it once

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the tests side by side, and for what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

settings.register_profile("titans", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("titans")


@pytest.fixture(autouse=True, scope="session")
def poison():
    """``torch.empty`` returns NaN, so that a result that reads memory nobody wrote cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
