"""What the tests of several kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh arrays hold 0xff bytes, NaN in every float type, so that an element nobody wrote is found.

    For whole files: pytestmark = pytest.mark.usefixtures("poisoned_memory"). Tests that need no GPU are left alone.
    """
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import cupy

    below = cupy.cuda.get_allocator()

    def allocate(num_bytes: int) -> cupy.cuda.MemoryPointer:
        pointer = below(num_bytes)
        pointer.memset(0xFF, num_bytes)
        return pointer

    with cupy.cuda.using_allocator(allocate):
        yield
