"""What stands in for a GPU where a launch is to be compiled without one."""

import pytest
from ptx.device import absent


@pytest.fixture
def absent_gpu(request):
    """An H100, or the compute capability that a test names as the fixture's parameter."""
    with absent(getattr(request, "param", 90)):
        yield
