"""Axis letters, array types, shape checks and the records rooms share.

Letters: B batch, T time, D channels, N state per channel, H heads, K key
width, P value width, G groups, V vocabulary. Time is axis 1; states have no
time axis and are float32 (complex64 where the decay is complex).
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int

__all__ = [
  "Array",
  "Bool",
  "Complex",
  "Float",
  "Inexact",
  "Int",
  "Polarization",
  "Recurrence",
  "check_arrays",
  "check_choice",
  "check_inexact",
  "check_number",
  "check_polarization",
  "check_segment_ids",
  "check_shapes",
  "describe_model",
  "read_description",
  "real_dtype",
  "register_model",
  "state_dtype",
]


@dataclasses.dataclass(frozen=True)
class Polarization:
  """Which channels of a diagonal recurrence have their decay held fixed.

  Channels are ordered `ones`, learned, `zeros` (Wang et al. 2025, §6 and App.
  E.5.1: the first decay is 1, the last is 0).

  Attributes:
    ones: number of channels whose decay is exactly 1 (running sums).
    zeros: number of channels whose decay is exactly 0 (no memory).
    placement: `"add"` puts them beside the learned channels, so the state has
      ones + learned + zeros channels (the paper); `"replace"` lets them take
      the place of learned channels, so the state keeps its size (the
      matched-state control).
    zero_decay: `"exact"` makes the decay of a zero-channel exactly 0;
      `"authors"` and `"paper"` are compatibility modes for an S6 layer that
      set A = -100 (the released code) and A = -1000 (the text), whose decay
      exp(ΔA) leaks at small Δ: 0.905 and 0.37 at Δ = 1e-3.
  """

  ones: int = 0
  zeros: int = 0
  placement: Literal["add", "replace"] = "add"
  zero_decay: Literal["exact", "authors", "paper"] = "exact"

  def __post_init__(self):
    for name in ("ones", "zeros"):
      if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
        raise ValueError(
          f"Polarization: {name} is {getattr(self, name)!r}, expected a"
          " number of channels, 0 or more."
        )
    check_choice(
      "Polarization", "placement", self.placement, ("add", "replace")
    )
    check_choice(
      "Polarization",
      "zero_decay",
      self.zero_decay,
      ("exact", "authors", "paper"),
    )

  def total(self, learned: int) -> int:
    """Channels of the state when the decay has `learned` channels."""
    if self.placement == "add":
      return self.ones + learned + self.zeros
    if self.ones + self.zeros > learned:
      raise ValueError(
        f"Polarization: ones={self.ones} and zeros={self.zeros} replace more"
        f" channels than the {learned} learned ones. Use fewer, or"
        ' placement="add".'
      )
    return learned

  @property
  def finite_zero(self) -> float | None:
    """The A of a zero-channel in a compatibility mode; None where exact."""
    return {"exact": None, "authors": -100.0, "paper": -1000.0}[self.zero_decay]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrence:
  """A layer's own Eq. 1 on a given input, channel by channel.

  hₜ = aₜ ∘ hₜ₋₁ + dtₜ ∘ bₜ,  yₜ = readout(hₜ, t)   (Wang et al. 2025, Eq. 1)

  Attributes:
    a: decays, `[B, T, *S]`.
    dt: step sizes Δ, broadcastable to `[B, T, *S]`.
    b: inputs bₜ(xₜ), `[B, T, *S]`.
    initial_state: h₀, `[B, *S]`.
    readout: maps a state `[B, *S]` and a time index (an int or a traced
      scalar) to the mixer's output at that time, `[B, D]`, with whatever
      follows the recurrence: gate, skip, projection. It is itself a pytree, a
      `jax.tree_util.Partial` of a module-level function over the arrays that
      it reads, so that a `Recurrence` passes through `jax.jit`.
  """

  a: Inexact[Array, "B T *S"]
  dt: Inexact[Array, "B T *R"]
  b: Inexact[Array, "B T *S"]
  initial_state: Inexact[Array, "B *S"]
  readout: Callable[[Array, Any], Array]


# Kinds of whole models, by the names that files have for them.
_MODELS: dict[str, Any] = {}
_VERSION = 1


def register_model(kind: str) -> Callable[[type], type]:
  """Make models of a class ones that files can describe; a decorator.

  What trains or saves a model writes its description, a JSON object, and what
  loads it has it built of that. The class offers both ways:

      def description(self) -> dict | None
          What `from_description` builds an equal one of, but for the values
          of its arrays; None where this one cannot be described.
      @classmethod
      def from_description(cls, description, *, rngs)
          The model, with fresh parameters by `rngs`, an `nnx.Rngs`;
          ValueError for a description that is wrong.

  `LanguageModel` and `Classifier` have them. A file names its kind, never a
  module: whoever loads it has to have imported the one that registers it.

  Args:
    kind: its name in files.

  Raises:
    ValueError: the class lacks one of the two, or another has the name.

  >>> @register_model("scale")
  ... class Scale:
  ...   description = lambda self: {}
  ...   from_description = classmethod(lambda cls, description, *, rngs: cls())
  """

  def register(model: type) -> type:
    for name in ("description", "from_description"):
      if not callable(getattr(model, name, None)):
        raise ValueError(
          f"register_model: {model.__qualname__} has no method {name}, expected"
          " description() and from_description(description, *, rngs)."
        )
    known = _MODELS.get(kind, model)
    place = lambda c: (c.__module__, c.__qualname__)
    if known is not model and place(known) != place(model):
      raise ValueError(
        f"register_model: {kind!r} is a kind already, of"
        f" {'.'.join(place(known))}, expected another name."
      )
    _MODELS[kind] = model
    return model

  return register


def describe_model(model: Any) -> dict[str, Any] | None:
  """Describe a model as JSON; None for one that has no description.

  That is a model whose very class is not registered (see `register_model`):
  one derived of it may be another.

  Returns:
    `version` of this form, the kind as `model`, and what the class itself
    says of it as `config`.
  """
  for kind, known in _MODELS.items():
    if type(model) is known:
      config = model.description()
      if config is None:
        return None
      return {"version": _VERSION, "model": kind, "config": config}
  return None


def read_description(function: str, found: Any) -> Callable[..., Any]:
  """Give what builds the model of a description, `build(rngs=…)`.

  Args:
    function: name of the public function, for the message.
    found: what a file has, as `describe_model` wrote it.

  Raises:
    ValueError: it is no description, of a later version, or of a kind that is
      not registered.
  """
  if not isinstance(found, dict):
    raise ValueError(
      f"{function}: the description is {found!r:.60}, expected an object."
    )
  version, kind = found.get("version"), found.get("model")
  if type(version) is not int or version < 1:
    raise ValueError(
      f"{function}: version is {version!r:.60}, expected the number of the"
      " description's form. Not ssmjax wrote this."
    )
  if version > _VERSION:
    raise ValueError(
      f"{function}: version is {version}, expected {_VERSION} at most. A later"
      " version of ssmjax wrote this: install that one."
    )
  if found.keys() != {"version", "model", "config"}:
    raise ValueError(
      f"{function}: the description has the fields {', '.join(found):.200},"
      " expected version, model and config."
    )
  known = lambda: isinstance(kind, str) and kind in _MODELS
  if not known():
    # The library's own register themselves there. A name that a file has is
    # never imported.
    importlib.import_module("ssmjax.models")
  if not known():
    raise ValueError(
      f"{function}: model is {kind!r:.60}, expected one of"
      f" {', '.join(_MODELS)}. A model of your own is known once the module"
      " that registers it (ssmjax.types.register_model) is imported."
    )
  build = _MODELS[str(kind)].from_description
  return functools.partial(build, found["config"])


def check_arrays(function: str, **arguments: Any) -> None:
  """Raise ValueError for a required argument that is None or is no array.

  A number is no array either: no argument that is checked here broadcasts.
  """
  for name, value in arguments.items():
    if value is None:
      raise ValueError(
        f"{function}: {name} is None, expected an array. It is required."
      )
    if isinstance(value, (bool, int, float, complex)):
      raise ValueError(
        f"{function}: {name} is {value!r}, expected an array. Pass"
        f" jnp.full(shape, {value!r})."
      )
    _dtype(function, name, value)


def check_shapes(
  function: str,
  arguments: Mapping[str, tuple[Any, str]],
  hints: Mapping[str, str] | None = None,
) -> dict[str, int]:
  """Bind axis letters to sizes; raise where an argument does not fit.

  Args:
    function: name of the public function, for the message.
    arguments: name -> (array or None, letters such as `"B T D"`), in the order
      in which letters are bound. None is skipped. A letter may be a number,
      or `N=16`, which binds it.
    hints: name -> a sentence added to the message of that argument.

  Returns:
    The size of each letter.

  Raises:
    ValueError: `selective_scan: B has shape (2, 8, 32), expected (B=2, T=8,
      N=16).`
  """
  sizes: dict[str, int] = {}
  for name, (value, letters) in arguments.items():
    if value is None:
      continue
    _dtype(function, name, value)
    shape = jnp.shape(value)
    wanted: list[tuple[str, int | None]] = []
    for letter in letters.split():
      if letter.isdigit():
        wanted.append((letter, int(letter)))
      elif "=" in letter:
        letter, size = letter.split("=")
        wanted.append((letter, int(size)))
      else:
        wanted.append((letter, sizes.get(letter)))
    fits = len(shape) == len(wanted) and all(
      size is None or size == found
      for (_, size), found in zip(wanted, shape, strict=True)
    )
    if not fits:
      expected = ", ".join(
        letter if size is None or letter.isdigit() else f"{letter}={size}"
        for letter, size in wanted
      )
      hint = (hints or {}).get(name)
      raise ValueError(
        f"{function}: {name} has shape {shape}, expected ({expected})."
        + (f" {hint}" if hint else "")
      )
    for (letter, _), found in zip(wanted, shape, strict=True):
      sizes[letter] = found
  return sizes


def check_choice(function: str, name: str, value: Any, choices) -> None:
  """Raise ValueError unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(
      f"{function}: {name} is {value!r}, expected one of"
      f" {', '.join(map(repr, choices))}."
    )


def check_number(
  function: str, name: str, value: Any, *, whole: bool = False
) -> None:
  """Raise ValueError unless `value` is a Python or NumPy number, no bool.

  What is a number here is fixed when a function is traced.
  """
  kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
  if isinstance(value, bool) or not isinstance(value, kinds):
    raise ValueError(
      f"{function}: {name} is {value!r}, expected"
      f" {'a whole' if whole else 'a Python'} number."
    )


def check_polarization(function: str, value: Any) -> None:
  """Raise ValueError unless `value` is a `Polarization` or None."""
  if value is not None and not isinstance(value, Polarization):
    raise ValueError(
      f"{function}: polarization is {value!r}, expected a Polarization or"
      " None. Pass ssmjax.types.Polarization(ones=1, zeros=1)."
    )


def check_inexact(function: str, **arguments: Any) -> None:
  """Raise ValueError for an argument that is not float or complex."""
  for name, value in arguments.items():
    if value is None:
      continue
    dtype = _dtype(function, name, value)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise ValueError(
        f"{function}: {name} has dtype {dtype.name}, expected a floating"
        f" type. Pass {name}.astype(jnp.float32)."
      )


def check_segment_ids(function: str, segment_ids: Any) -> None:
  """Raise ValueError unless `segment_ids` is None or of an integer dtype."""
  if segment_ids is None:
    return
  dtype = _dtype(function, "segment_ids", segment_ids)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(
      f"{function}: segment_ids has dtype {dtype.name}, expected int32:"
      " 1-based segment numbers, 0 for padding. From a mask, pass"
      " mask.astype(jnp.int32)."
    )


def _dtype(function, name, value):
  """The dtype of an array or a number; ValueError for what is neither."""
  if not _is_array(value):
    lists = isinstance(value, (list, tuple))
    raise ValueError(
      f"{function}: {name} is a {type(value).__name__}, expected an array."
      f" Pass {f'jnp.asarray({name})' if lists else 'a JAX or NumPy array'}."
    )
  try:
    return jnp.result_type(value)
  except TypeError as error:
    raise ValueError(
      f"{function}: {name} has dtype {value.dtype}, expected numbers. Pass a"
      " JAX or NumPy array of them."
    ) from error


def _is_array(value):
  # Variables of flax stand for the array that they hold.
  arrays = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)
  return isinstance(value, arrays) or hasattr(value, "__jax_array__")


def real_dtype(*values: Any):
  """The real dtype to compute in: float64 if any value has it, or float32."""
  wide = (jnp.dtype("float64"), jnp.dtype("complex128"))
  if any(v is not None and jnp.result_type(v) in wide for v in values):
    return jnp.dtype("float64")
  return jnp.dtype("float32")


def state_dtype(*values: Any):
  """The dtype of a state: `real_dtype`, or complex where any value is."""
  real = real_dtype(*values)
  if any(v is not None and jnp.iscomplexobj(v) for v in values):
    return jnp.dtype("complex128" if real == "float64" else "complex64")
  return real
