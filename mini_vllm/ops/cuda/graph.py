"""CUDA graphs: a function's launches recorded once and replayed with one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy

from mini_vllm.ops.cuda.device import GPUAllocator


class CapturedGraph:
    """What `function` launches, as a graph.

    The function runs once eagerly (so that kernels are loaded and workspaces exist) and once under capture.
    It must read everything that changes from arrays that exist already, and may neither wait nor copy to
    pageable memory. Its arrays come from `allocator`, which must live as long as the graph; graphs that are
    never replayed at the same time may share one.

    result: what the function returned under capture: arrays that each replay fills again.
    """

    def __init__(self, function: Callable[[], Any], allocator: GPUAllocator) -> None:
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.get_current_stream().synchronize()  # the capture stream does not wait for this one by itself
        with stream, allocator.use():
            function()
            stream.synchronize()
            stream.begin_capture()
            try:
                self.result = function()
            finally:
                self._graph = stream.end_capture()

    def replay(self) -> None:
        """Enqueue the launches on the current stream: a few microseconds, however many there are."""
        self._graph.launch(cupy.cuda.get_current_stream())
