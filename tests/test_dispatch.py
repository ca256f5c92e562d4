"""Which form runs is settled by dtype when traced, by platform when lowered."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close, quick
from jax import export, lax

import kernels_pallas
from ssmjax.ops import linear_scan, platform_passes, selective_scan
from ssmjax.types import Polarization

OPS = {
  "linear_scan": lambda **options: functools.partial(linear_scan, **options),
  "selective_scan": lambda **options: (
    lambda u, x: selective_scan(u, u, -x[0, :2].T, x, x, **options)
  ),
}


PASSES = ("forward", "backward")
KERNELS = {
  (op, platform): [f"{name}_{x}" for x in PASSES]
  for op, platform, name in [
    ("linear_scan", "tpu", "linear_scan"),
    ("linear_scan", "cuda", "linear_scan"),
    ("selective_scan", "tpu", "selective_scan_tpu"),
    ("selective_scan", "cuda", "selective_scan_gpu"),
  ]
}


def arguments():
  x = jnp.asarray(np.random.default_rng(0).random((1, 4, 2)), jnp.float32)
  return x, x


def call(marker, a, b):
  """A custom call that stands for a kernel."""
  shape = jax.ShapeDtypeStruct(b.shape, b.dtype)
  return jax.ffi.ffi_call(marker, shape, vmap_method="broadcast_all")(a, b)


def fake_selective(marker):
  """The two passes of a selective scan."""

  def forward(rows, shared, *, keep, **static):
    u, N = rows["u"], rows["B"].shape[-1]
    state = jnp.zeros((u.shape[0], N, u.shape[2]), jnp.float32)
    return call(marker, u, rows["delta"]), state, state if keep else None

  def backward(rows, shared, **static):
    grads = {k: v for k, v in rows.items() if v is not None}
    grads["u"] = call(marker, rows["d_y"], rows["delta"])
    grads["initial_state"] = rows["d_final"]
    rows_of = lambda x: jnp.zeros((rows["u"].shape[0], *x.shape[1:]), x.dtype)
    return grads | jax.tree.map(rows_of, shared)

  def saved(rows, shared, **static):
    R, _, D = rows["u"].shape
    return jax.ShapeDtypeStruct((R, rows["B"].shape[-1], D), jnp.float32)

  return kernels_pallas.Kernel(forward, backward, saved)


def fake_linear(marker):
  """The two passes of a linear scan."""

  def forward(a, b, state, valid, restart, *, reverse, keep):
    return call(marker, b, b), state, state if keep else None

  def backward(a, b, states, valid, restart, dy, dfinal, *, reverse):
    return a, call(marker, b, dy), dfinal

  def saved(a, b, **static):
    return jax.ShapeDtypeStruct((b.shape[0], b.shape[2]), jnp.float32)

  return kernels_pallas.Kernel(forward, backward, saved)


@pytest.fixture
def with_kernels(monkeypatch):
  """Fake kernels for TPU and CUDA; the caches do not know of them."""
  make = {"linear_scan": fake_linear, "selective_scan": fake_selective}
  found = lambda op: {
    platform: make[op](f"fake_{platform}_kernel")
    for platform in ("tpu", "cuda")
  }
  monkeypatch.setattr(kernels_pallas, "kernels", found)
  jax.clear_caches()
  yield monkeypatch
  jax.clear_caches()


def lowered(function, *args, platform):
  traced = jax.jit(lambda *args: function(*args)).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def gradient(function):
  return jax.grad(lambda *args: function(*args)[0].sum(), (0, 1))


@pytest.mark.parametrize("op", OPS)
def test_none_takes_the_kernel_of_the_platform_it_is_lowered_for(
  op, with_kernels
):
  run = OPS[op]()
  for function, calls in ((run, 1), (gradient(run), 2)):
    for platform in ("tpu", "cuda"):
      text = lowered(function, *arguments(), platform=platform)
      assert f"fake_{platform}_kernel" in text
      assert text.count("@fake_") >= calls
    assert "fake" not in lowered(function, *arguments(), platform="cpu")
  # And here, with TPU and GPU branches at hand, chunked runs.
  actual = quick(gradient(run))(*arguments())
  expected = quick(gradient(OPS[op](implementation="reference")))(*arguments())
  assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_pallas_is_refused_when_lowered_for_a_platform_without_a_kernel(
  op, with_kernels
):
  run = OPS[op](implementation="pallas")
  single = arguments()
  for function, args in (
    (run, single),
    (gradient(run), single),
    (jax.vmap(run), jax.tree.map(lambda x: x[None], single)),
  ):
    traced = jax.jit(lambda *a, f=function: f(*a)).trace(*args)
    assert (
      "fake_tpu_kernel" in traced.lower(lowering_platforms=("tpu",)).as_text()
    )
    message = (
      rf"{op}: implementation='pallas' has no kernel for cpu; it has kernels"
      r" for cuda, tpu.*Pass implementation='chunked'"
    )
    with pytest.raises(NotImplementedError, match=message):
      traced.lower(lowering_platforms=("cpu",))
  with pytest.raises(NotImplementedError, match="no kernel for cpu"):
    run(*arguments())


@pytest.mark.parametrize("op", OPS)
def test_pallas_without_any_kernel_says_so(op, monkeypatch):
  monkeypatch.setattr(kernels_pallas, "kernels", lambda op: {})
  with pytest.raises(NotImplementedError, match="it has none here"):
    OPS[op](implementation="pallas")(*arguments())


@pytest.mark.parametrize("op", OPS)
def test_pallas_with_complex_numbers_is_refused_when_traced(op, with_kernels):
  x, _ = arguments()
  args = (x, lax.complex(x, x))
  with pytest.raises(NotImplementedError, match=f"{op}: .*complex.*'chunked'"):
    jax.eval_shape(OPS[op](implementation="pallas"), *args)
  text = lowered(OPS[op](), *args, platform="tpu")
  assert "fake" not in text


def test_pallas_in_float64_is_refused_when_traced(with_kernels, x64):
  args = jax.tree.map(lambda x: x.astype(jnp.float64), arguments())
  assert jax.eval_shape(linear_scan, *args)[0].dtype == jnp.float64
  with pytest.raises(NotImplementedError, match="no kernel for float64"):
    jax.eval_shape(OPS["linear_scan"](implementation="pallas"), *args)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_float32_data_have_their_kernel_under_x64(op, platform, x64):
  text = lowered(gradient(OPS[op]()), *arguments(), platform=platform)
  for name in KERNELS.get((op, platform), ()):
    assert name in text


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda u: u.astype(jnp.float16), "no kernel for float16"),
    (lambda u: u, "no kernel without a state"),
  ],
)
def test_pallas_names_what_a_selective_scan_has_that_no_kernel_takes(
  change, message
):
  u = change(jnp.ones((1, 4, 2)))
  zeros = Polarization(zeros=2, placement="replace")
  run = functools.partial(
    selective_scan, u, u, -jnp.ones((2, 2)), u, u,
    polarization=zeros if message.endswith("state") else None,
  )  # fmt: skip
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(functools.partial(run, implementation="pallas"))
  assert run()[0].shape == u.shape


def test_an_old_gpu_takes_the_fall_back(with_kernels):
  with_kernels.setattr(platform_passes, "visible_gpu_is_old", lambda: True)
  run = OPS["linear_scan"]()
  assert "fake" not in lowered(run, *arguments(), platform="cuda")
  assert "fake_tpu" in lowered(run, *arguments(), platform="tpu")
  named = OPS["linear_scan"](implementation="pallas")
  with pytest.raises(NotImplementedError, match=r"for cuda.*sm_80 and newer"):
    lowered(named, *arguments(), platform="cuda")


@pytest.mark.parametrize(
  ("capabilities", "old"),
  [(["7.5"], True), (["8.0", "9.0"], False), ([], False)],
)
def test_a_gpu_is_old_below_sm_80(capabilities, old, monkeypatch):
  device = lambda c: type("Device", (), dict(compute_capability=c))()
  devices = lambda backend: [device(c) for c in capabilities]
  monkeypatch.setattr(jax, "local_devices", devices)
  assert platform_passes.visible_gpu_is_old() == old


def test_without_a_gpu_none_is_old():
  assert not platform_passes.visible_gpu_is_old()


@pytest.mark.parametrize("op", OPS)
def test_none_survives_vmap_remat_and_a_scan_over_layers(op, with_kernels):
  run = OPS[op]()

  def deep(x, y):
    layer = jax.checkpoint(lambda h, _: (run(h, h)[0], None))
    return jax.vmap(lambda x: lax.scan(layer, x + y, None, length=2)[0])(x)

  args = (arguments()[0][None], arguments()[1])
  total = lambda x, y: (deep(x, y), None)
  reference = OPS[op](implementation="reference")
  actual = quick(gradient(total))(*args)
  run = reference
  assert_close(actual, quick(gradient(total))(*args))


def test_what_a_kernel_saves_takes_no_memory_on_other_platforms(monkeypatch):
  # What other platforms would save leaves the forward pass as zeros; the
  # compiler must find that nobody reads them.
  shape = (1, 64, 8, 64)

  def forward(rows, shared, *, keep, **static):
    u = rows["u"]
    saved = jnp.broadcast_to(u[..., None], shape) if keep else None
    return u, jnp.zeros((1, 64, 8)), saved

  def backward(rows, shared, **static):
    slope = rows["d_y"] * rows["states"].sum(-1)
    state = rows["d_final"]
    return rows | dict(u=slope, A=shared["A"], initial_state=state)

  def saved(rows, shared, **static):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  def loss(A, u):
    def layer(u, A):
      BC = jnp.ones((1, 64, 64))
      return selective_scan(u, u, A, BC, BC)[0], None

    return lax.scan(layer, u, A)[0].sum()

  def temporary(kernels):
    monkeypatch.setattr(kernels_pallas, "kernels", lambda op: kernels)
    jax.clear_caches()
    args = (-jnp.ones((4, 8, 64)), jnp.ones((1, 64, 8)))
    compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  kernel = kernels_pallas.Kernel(forward, backward, saved)
  alone = temporary({})
  beside = temporary(dict.fromkeys(("tpu", "cuda"), kernel))
  jax.clear_caches()
  assert beside < alone + 4 * np.prod(shape)


@pytest.mark.parametrize("op", OPS)
def test_one_export_for_all_platforms_has_their_kernels_and_runs_here(op):
  pull = gradient(OPS[op]())
  exported = export.export(jax.jit(pull), platforms=("cpu", "tpu", "cuda"))
  exported = exported(*arguments())
  text = exported.mlir_module()
  for name in KERNELS[op, "tpu"] + KERNELS[op, "cuda"]:
    assert name in text
  expected = quick(gradient(OPS[op](implementation="reference")))(*arguments())
  assert_close(exported.call(*arguments()), expected)


@pytest.mark.parametrize(
  ("op", "platform"),
  [
    ("linear_scan", "tpu"),
    ("linear_scan", "cuda"),
    ("selective_scan", "tpu"),
    # By day the kernel's own test lowers it inside a shard_map.
    pytest.param("selective_scan", "cuda", marks=pytest.mark.nightly),
  ],
)
def test_kernels_lower_inside_shard_map_differentiated_there_or_outside(
  op, platform
):
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  rows, shared = jnp.ones((8, 20, 2)), jnp.full((20, 2), 0.5)

  def loss(rows, shared):
    wide = jnp.broadcast_to(shared[None], (rows.shape[0], *shared.shape))
    if op == "linear_scan":
      y, state = linear_scan(wide, rows, implementation="pallas")
    else:
      y, state = selective_scan(
        rows, wide, -shared[:2], rows, rows, implementation="pallas"
      )
    return y.sum() + state.sum()

  specs = (jax.P("data"), jax.P())
  inside = jax.shard_map(
    jax.grad(loss, (0, 1)), mesh=mesh, in_specs=specs, out_specs=specs
  )
  total = lambda *a: lax.psum(loss(*a), "data")
  outside = jax.grad(
    jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=jax.P()), (0, 1)
  )
  for run in (inside, outside):
    text = lowered(run, rows, shared, platform=platform)
    for name in KERNELS[op, platform]:
      assert name in text


@pytest.mark.parametrize("op", OPS)
def test_a_name_that_does_not_exist_is_refused(op):
  with pytest.raises(ValueError, match=f"{op}: implementation is 'triton'"):
    OPS[op](implementation="triton")(*arguments())


def test_first_use_of_an_op_does_not_compile_its_program_twice():
  code = (
    "import jax, jax.numpy as jnp, ssmjax.ops as ops\n"
    "run = jax.jit(lambda x: ops.selective_scan(x, x, -x[0].T, x, x)[0])\n"
    "x = jnp.ones((1, 2, 2))\n"
    "run(x), run(x)\n"
    "assert run._cache_size() == 1, run._cache_size()\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_program_for_a_cpu_imports_no_kernel_and_no_pallas():
  code = (
    "import sys, jax, jax.numpy as jnp\n"
    "from ssmjax import models, ops\n"
    "x = jnp.ones((1, 2, 2))\n"
    "scan = lambda x: ops.selective_scan(x, x, -x[0].T, x, x)[0].sum()\n"
    "jax.grad(scan)(x)\n"
    "jax.grad(lambda x: ops.linear_scan(x, x)[0].sum())(x)\n"
    "ops.selective_step(*[x[0]] * 5, state=jnp.ones((2, 2, 2)))\n"
    "found = {'jax.experimental.pallas', 'jax._src.pallas.pallas_call'}\n"
    "found |= {f'kernels_pallas.selective_scan_{p}' for p in ('tpu', 'gpu')}\n"
    "found |= {f'kernels_pallas.linear_scan_{p}' for p in ('tpu', 'gpu')}\n"
    "found |= {'kernels_pallas.selective_step_tpu'}\n"
    "found &= set(sys.modules)\n"
    "assert not found, found\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
