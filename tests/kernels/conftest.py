"""What stands in for a GPU where a launch is to be compiled without one."""

import pytest


class AbsentGpu:
    """What Triton asks its driver before it compiles: enough to specialize a call for a GPU of this compute capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        # none that is there: Triton keeps what it compiled by device, and must not launch this on another
        return -self.capability

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def absent_gpu(request):
    """An H100, or the compute capability that a test names as the fixture's parameter."""
    from triton.runtime import driver

    # set_active(None) makes Triton look for a driver again when it next needs one
    driver.set_active(AbsentGpu(getattr(request, "param", 90)))
    yield
    driver.set_active(None)
