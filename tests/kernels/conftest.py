"""What stands in for a GPU where a launch is to be compiled without one."""

import pytest
from ptx.device import absent

from tokquant.kernels import launch


@pytest.fixture
def absent_gpu(request):
    """An H100, or the compute capability that a test names as the fixture's parameter."""
    with absent(getattr(request, "param", 90)):
        yield


@pytest.fixture
def interpreter():
    """Triton's interpreter, for tests of what only it does."""
    if not launch.interpreted():
        pytest.skip("kernels are compiled here")
    from triton.runtime import interpreter

    return interpreter
