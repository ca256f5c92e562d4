"""The programs that are held to a budget, and the chips.

A case is one call of a public op, so what is compiled is what a user gets:
the op's own choice of tiles, with XLA's casts and sums around the kernel. Some
ops have no kernel (`XLA_ALONE`): their cases say what one could win.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import ssmjax.ops

__all__ = [
  "CHIPS",
  "XLA_ALONE",
  "Case",
  "build",
  "quick_cases",
  "table_cases",
]

# Chip by compiler. A TPU's value is the topology that its compiler knows, a
# GPU's the description of it in experiments/targets.
CHIPS = {
  "tpu": {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
  },
  "cuda": {"a100": "a100", "h200": "h200", "b200": "b200"},
}
# Ops of matrix states, which are products of matrices in chunks.
XLA_ALONE = ("delta_rule", "gated_linear_attention", "ssd")


@dataclasses.dataclass(frozen=True)
class Case:
  """One program, compiled for one chip (or for several, as one program).

  Attributes:
    chip: a name of `CHIPS`.
    op: the public function.
    program: "forward", "gradient" for value and gradients, or "definition" for
      what XLA makes of it by itself.
    dtype: of u, delta, z, B and C, or of q, k and v; A, D, the bias, log-decays
      and β are float32.
    shape: B, T, D, N of the selective scan; B, T, D of the linear one; B, D, N
      of the selective step; B, T, H, K, V of matrix states.
    form: "bare" for the recurrence alone (delta is positive as it comes);
      "mamba" for that with softplus, bias, skip and gate; "layers" for the step
      in a loop over a stack of layers, as a model decodes; "head" and "key" for
      what has a decay of its own in linear attention; "" elsewhere.
    topology: other than the chip's own, for a program over all its devices:
      `shard_map` over the batch.
  """

  chip: str
  op: str
  program: str
  dtype: str
  shape: tuple[int, ...]
  form: str = ""
  topology: str = ""

  @property
  def platform(self) -> str:
    """Whose compiler: "tpu" or "cuda"."""
    return "tpu" if self.chip in CHIPS["tpu"] else "cuda"

  def __str__(self) -> str:
    sizes = "x".join(map(str, self.shape))
    words = (self.op, self.program, self.dtype, sizes, self.form)
    return " ".join(filter(None, (self.chip, *words, self.topology)))


def table_cases(chips: Iterable[str]) -> list[Case]:
  """Every case of the committed table, for some of the chips."""
  return [
    Case(chip, op, program, *variant)
    for chip in chips
    for op, variants in _variants(chip).items()
    for variant in variants
    for program in _PROGRAMS[op]
  ]


def quick_cases() -> list[Case]:
  """The few of the table that are compared on every change."""
  found = []
  for chip, length in (("v5e", 256), ("h200", 1024)):
    # A gradient has both of an op's kernels.
    shape = (1, length, 1024, 16)
    found += [
      Case(chip, "selective_scan", "gradient", "bfloat16", shape, "mamba"),
      Case(chip, "linear_scan", "gradient", "float32", (1, 1024, 1024)),
    ]
  return found


def _variants(chip):
  """dtype, shape and form of what is in the table, by op."""
  # The estimate of a TPU's cycles follows every trip through every loop: what
  # has no reference at T = 1024 is estimated at less, as it takes minutes and
  # gigabytes. Of a GPU's figures none depends on T.
  is_tpu = chip in CHIPS["tpu"]
  short, shorter = (256, 128) if is_tpu else (1024, 1024)
  selective = [
    ("float32", (1, short, 1024, 16), "mamba"),
    ("bfloat16", (1, short, 1024, 16), "mamba"),
  ]
  if chip in ("v5e", "h200"):
    # One chip of each kind tells the shapes apart, all tell the chips apart.
    selective += [
      ("float32", (1, 1024, 1024, 16), "bare"),
      ("bfloat16", (1, shorter, 1024, 64), "mamba"),
      ("float32", (1, short, 1024, 17), "mamba"),
      ("bfloat16", (1, short, 1536, 16), "mamba"),
    ]
  if not is_tpu:
    # The largest state there is, which the backward kernel takes in passes.
    selective += [
      ("float32", (1, 1024, 1024, 256), "mamba"),
      ("bfloat16", (1, 1024, 1024, 256), "mamba"),
    ]
  linear = [
    ("float32", (1, 1024, 1024), ""),
    ("bfloat16", (1, 1024, 1024), ""),
  ]
  found = {"selective_scan": selective, "linear_scan": linear}
  if is_tpu:
    rows = (1, 8, 64) if chip == "v5e" else (8,)
    found["selective_step"] = [
      ("bfloat16", (batch, 2048, 16), form)
      for form in ("mamba", "layers")
      for batch in rows
    ]
  if chip == "v5e":
    narrow, wide = (1, 2048, 8, 64, 64), (1, 2048, 8, 128, 128)
    sizes = [("float32", narrow), ("bfloat16", wide)]
    for op, forms in (
      ("gated_linear_attention", ("head", "key")),
      ("ssd", ("mamba",)),
      ("delta_rule", ("head",)),
    ):
      found[op] = [(*size, form) for form in forms for size in sizes]
  return found


def build(
  case: Case,
  devices: Sequence[jax.Device],
  implementation: str | None = "pallas",
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Give a function to compile, and its arguments without their values.

  Args:
    case: the program.
    devices: all that it runs on; the batch is divided over them.
    implementation: of the op, where it has a kernel.
  """
  if case.program == "definition":
    implementation = "reference"
  elif case.op in XLA_ALONE:
    implementation = "chunked"
  forward, arguments = _OPS[case.op](case, implementation)
  spec = {
    name: P("data") if x.ndim > 2 else P() for name, x in arguments.items()
  }

  def gradient(args, d_y):
    y, pull = jax.vjp(forward, args)
    return y, pull(d_y)[0]

  function: Callable[..., Any] = forward
  args: tuple[Any, ...] = (arguments,)
  specs: tuple[Any, ...] = (spec,)
  out: Any = P("data")
  if case.program == "gradient":
    d_y = jax.eval_shape(forward, arguments)
    function, args, specs = gradient, (arguments, d_y), (spec, P("data"))
    out = (P("data"), spec)
  if len(devices) == 1:
    place = jax.sharding.SingleDeviceSharding(devices[0])
    return function, jax.tree.map(lambda x: _on(x, place), args)
  mesh = jax.sharding.Mesh(
    list(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  divided = lambda x, spec: _on(x, jax.sharding.NamedSharding(mesh, spec))
  return (
    jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out),
    jax.tree.map(divided, args, specs),
  )


def _on(x, sharding):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _selective_scan(case, implementation):
  batch, length, channels, states = case.shape
  dtype = jnp.dtype(case.dtype)
  wide = jax.ShapeDtypeStruct((batch, length, channels), dtype)
  narrow = jax.ShapeDtypeStruct((batch, length, states), dtype)
  row = jax.ShapeDtypeStruct((channels,), jnp.float32)
  arguments = dict(u=wide, delta=wide, B=narrow, C=narrow)
  arguments["A"] = jax.ShapeDtypeStruct((channels, states), jnp.float32)
  if case.form == "mamba":
    arguments |= dict(D=row, z=wide, delta_bias=row)
  elif case.form != "bare":
    raise ValueError(f"static: {case.op} has no form {case.form!r}.")

  def forward(args):
    return ssmjax.ops.selective_scan(
      **args,
      delta_softplus=case.form == "mamba",
      implementation=implementation,
    )[0]

  return forward, arguments


def _linear_scan(case, implementation):
  both = jax.ShapeDtypeStruct(case.shape, jnp.dtype(case.dtype))

  def forward(args):
    return ssmjax.ops.linear_scan(**args, implementation=implementation)[0]

  return forward, dict(a=both, b=both)


def _gated_linear_attention(case, implementation):
  batch, length, heads, keys, _ = case.shape
  decay = {"head": (), "key": (keys,)}[case.form]
  log_a = jax.ShapeDtypeStruct((batch, length, heads, *decay), jnp.float32)

  def forward(args):
    return ssmjax.ops.gated_linear_attention(
      **args, implementation=implementation
    )[0]

  return forward, _queries_keys_values(case) | dict(log_a=log_a)


def _delta_rule(case, implementation):
  of_head = jax.ShapeDtypeStruct(case.shape[:3], jnp.float32)

  def forward(args):
    return ssmjax.ops.delta_rule(**args, implementation=implementation)[0]

  return forward, _queries_keys_values(case) | dict(beta=of_head, log_a=of_head)


def _queries_keys_values(case):
  *lead, keys, values = case.shape
  array = lambda width: jax.ShapeDtypeStruct(
    (*lead, width), jnp.dtype(case.dtype)
  )
  return dict(q=array(keys), k=array(keys), v=array(values))


def _ssd(case, implementation):
  """As Mamba-2 calls it: one group, softplus and skip; its gate is outside."""
  batch, length, heads, states, width = case.shape
  array = lambda *shape: jax.ShapeDtypeStruct(
    (batch, length, *shape), jnp.dtype(case.dtype)
  )
  arguments = dict(x=array(heads, width), dt=array(heads))
  arguments |= dict.fromkeys("BC", array(1, states))
  of_head = jax.ShapeDtypeStruct((heads,), jnp.float32)
  arguments |= dict.fromkeys(("A", "D", "dt_bias"), of_head)

  def forward(args):
    return ssmjax.ops.ssd(
      **args, dt_softplus=True, implementation=implementation
    )[0]

  return forward, arguments


def _selective_step(case, implementation):
  batch, channels, states = case.shape
  layers = () if case.form == "mamba" else (_LAYERS,)
  dtype = jnp.dtype(case.dtype)
  whole = lambda *shape: jax.ShapeDtypeStruct((*layers, *shape), jnp.float32)
  wide = jax.ShapeDtypeStruct((batch, channels), dtype)
  arguments = dict(u=wide, z=wide)
  arguments |= dict.fromkeys("BC", jax.ShapeDtypeStruct((batch, states), dtype))
  stacked = dict(
    A=whole(channels, states), state=whole(batch, channels, states)
  )
  stacked |= dict.fromkeys(("D", "delta_bias"), whole(channels))

  def step(u, args, of_layer):
    return ssmjax.ops.selective_step(
      u=u, delta=u, **args, **of_layer, delta_softplus=True,
      implementation=implementation,
    )  # fmt: skip

  def forward(args):
    rest = {name: args[name] for name in "zBC"}
    of_layers = {name: args[name] for name in stacked}
    if case.form == "mamba":
      return step(args["u"], rest, of_layers)
    # What a layer makes of u stands here for a model's projections.
    body = lambda u, of_layer: step(jnp.tanh(u), rest, of_layer)
    return jax.lax.scan(body, args["u"], of_layers)

  return forward, arguments | stacked


_LAYERS = 4
_PROGRAMS = {
  "selective_scan": ("forward", "gradient"),
  "linear_scan": ("forward", "gradient"),
  "selective_step": ("forward", "definition"),
} | dict.fromkeys(XLA_ALONE, ("forward", "gradient"))
_OPS = {
  "selective_scan": _selective_scan,
  "selective_step": _selective_step,
  "linear_scan": _linear_scan,
  "gated_linear_attention": _gated_linear_attention,
  "ssd": _ssd,
  "delta_rule": _delta_rule,
}
