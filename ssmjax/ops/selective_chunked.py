"""The selective scan for CPUs: blocks of channels, chunks of time.

One block is one batch row and so many channels that its state stays in the
first-level cache. Time is cut into chunks; the forward pass keeps the state
at the chunks' starts only, the backward pass recomputes the inside of a chunk
from there. `[B, T, D, N]` is never in memory.
"""

from ssmjax.ops.selective_chunked_backward import backward_blocks
from ssmjax.ops.selective_chunked_forward import forward_blocks
from ssmjax.ops.selective_fused import fused

__all__ = ["selective_scan_chunked"]

# y `[B, T, D]` in u's dtype and the state after the last step `[B, D, N]`.
selective_scan_chunked = fused(forward_blocks, backward_blocks)
