"""Which implementation of an op runs, and where that is decided.

A name is that implementation or an error. Without a name, what dtype and
shape allow is settled while tracing, and the platform when the program is
lowered (`platform_passes`): code that is compiled ahead of time for a chip on
a host without one takes the chip's kernel. No globals, no environment
switches.
"""

from collections.abc import Callable, Mapping
from typing import Any

import kernels_pallas
from ssmjax.ops.platform_passes import Passes, PlatformPass
from ssmjax.types import check_choice

__all__ = ["IMPLEMENTATIONS", "run"]

IMPLEMENTATIONS = ("reference", "associative", "chunked", "pallas")


def run(
  op: str,
  implementation: str | None,
  *args: Any,
  forms: Mapping[str, Callable[..., Any]],
  chunked: Mapping[str, Passes],
  results: tuple[Callable[..., Any], Callable[..., Any]],
  fuse: Callable[..., Callable[..., Any]],
  no_kernel: str | None = None,
  adapt: Callable[[Any], Passes] = lambda kernel: Passes(*kernel),
  **static: Any,
) -> Any:
  """Call an implementation on `args`.

  Args:
    op: the public function, for messages and to find its kernels.
    implementation: a name of `IMPLEMENTATIONS`, or None to choose.
    *args: arrays and None.
    forms: the implementations that are one function for all platforms, called
      `form(*args, **static)`.
    chunked: the passes of `"chunked"` by platform, with an entry for `OTHERS`,
      where it is not one of `forms`.
    results: the shapes and dtypes of what the forward and the backward pass
      return, as `PlatformPass` has them.
    fuse: makes a differentiable function of the two passes.
    no_kernel: why the kernels cannot take these arguments, or None if they
      can.
    adapt: brings a kernel to the contract of the op's passes.
    **static: keyword arguments of every form.

  Raises:
    ValueError: for a name that does not exist.
    NotImplementedError: for `"pallas"` where the arguments have no kernel
      (here), or where the platform has none (when it is lowered).
  """
  if implementation is not None:
    check_choice(op, "implementation", implementation, IMPLEMENTATIONS)
  if implementation == "pallas" and no_kernel is not None:
    raise NotImplementedError(
      f"{op}: implementation='pallas' {no_kernel}. Pass"
      " implementation='chunked', or None to choose."
    )
  if implementation is None and no_kernel is not None:
    implementation = "chunked"
  if implementation is not None and implementation in forms:
    return forms[implementation](*args, **static)
  table: dict[str, Passes] = {}
  if implementation != "pallas":
    table |= chunked
  if implementation != "chunked":
    kernels = kernels_pallas.kernels(op)
    table |= {name: adapt(kernel) for name, kernel in kernels.items()}
  passes = (
    PlatformPass(op, backward, shapes, tuple(table.items()))
    for backward, shapes in zip((False, True), results, strict=True)
  )
  return fuse(*passes)(*args, **static)
