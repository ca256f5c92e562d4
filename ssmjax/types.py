"""Axis letters, array types, shape checks and the records rooms share.

Letters: B batch, T time, D channels, N state per channel, H heads, K key
width, P value width, G groups, V vocabulary. Time is axis 1; states have no
time axis and are float32 (complex64 where the decay is complex).
"""

import dataclasses
import functools
import importlib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact, Int

__all__ = [
  "Array",
  "Bool",
  "Complex",
  "Count",
  "Float",
  "FloatingDType",
  "Inexact",
  "Int",
  "Polarization",
  "Positive",
  "Range",
  "Recurrence",
  "Seed",
  "Size",
  "check_arrays",
  "check_choice",
  "check_fields",
  "check_inexact",
  "check_number",
  "check_polarization",
  "check_segment_ids",
  "check_shapes",
  "check_value",
  "describe_model",
  "field_annotations",
  "gathered",
  "read_description",
  "real_dtype",
  "register_model",
  "state_dtype",
]


@dataclasses.dataclass(frozen=True)
class Range:
  """Which numbers a field may hold: `Annotated[float, Range(above=0)]`.

  Attributes:
    least: the smallest one, itself allowed; None for no such bound.
    above: a bound that is not itself allowed, as `below`.
    most: the largest one, itself allowed.
    below: a bound that is not itself allowed.
  """

  least: float | None = None
  above: float | None = None
  most: float | None = None
  below: float | None = None

  def __contains__(self, value: float) -> bool:
    return (
      (self.least is None or value >= self.least)
      and (self.above is None or value > self.above)
      and (self.most is None or value <= self.most)
      and (self.below is None or value < self.below)
    )

  def __str__(self) -> str:
    bounds = {
      " of at least": self.least,
      " above": self.above,
      " of at most": self.most,
      " below": self.below,
    }
    found = [f"{k} {v}" for k, v in bounds.items() if v is not None]
    return " and".join(found)


class _Floating:
  """Marks a field that holds a floating dtype."""


# What the fields of configurations hold, see `check_fields`.
Size = Annotated[int, Range(least=1)]
Count = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Positive = Annotated[float, Range(above=0)]
FloatingDType = Annotated[Any, _Floating()]


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

  ones: Count = 0
  zeros: Count = 0
  placement: Literal["add", "replace"] = "add"
  zero_decay: Literal["exact", "authors", "paper"] = "exact"

  def __post_init__(self):
    check_fields(self)

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


def check_fields(config: Any) -> None:
  """Check every field of a dataclass against its annotation.

  For `__post_init__` of a configuration, a user's own too. A field is `int`
  (NumPy's integers too, but no bool), `float` (any finite real number but a
  bool), `bool`, `str`, a `Literal`, a tuple, a class, one of those or None; an
  `Annotated` number has a `Range`, and `FloatingDType` takes a dtype or its
  name. What is written otherwise but means the same is put in one form, so
  that equal configurations are equal and hashable: a float for an integer's
  value, a tuple for a list, a NumPy dtype for `jnp.float32`.

  Raises:
    ValueError: `MambaConfig: d_state is 0, expected an integer of at least 1.`

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   rates: tuple[Positive, ...]
  ...   __post_init__ = check_fields
  >>> Config(rates=[1, 2])
  Config(rates=(1.0, 2.0))
  """
  kind: type = type(config)
  for field, annotation in field_annotations(kind).items():
    value = check_value(
      f"{kind.__name__}: {field}", annotation, getattr(config, field)
    )
    object.__setattr__(config, field, value)


def check_value(where: str, annotation: Any, value: Any) -> Any:
  """Give a value in the form that an annotation wants, see `check_fields`.

  Args:
    where: names the value in the message: `"MambaConfig: d_state"`.
    annotation: as `field_annotations` gives it.
    value: what was found.

  Raises:
    ValueError: the value is not what the annotation says.
  """
  for option in _options(annotation):
    found = _converted(where, option, value)
    if found is not _MISFIT:
      return found
  raise ValueError(f"{where} is {value!r}, expected {_described(annotation)}.")


@functools.cache
def field_annotations(kind: type) -> dict[str, Any]:
  """Give the annotation of each field of a dataclass, with its `Range`."""
  hints = typing.get_type_hints(kind, include_extras=True)
  return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


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


_MISFIT = object()


def _options(annotation) -> tuple[Any, ...]:
  """The alternatives of an annotation; of most, itself alone."""
  if isinstance(annotation, typing.TypeAliasType):
    return _options(annotation.__value__)
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return sum(map(_options, arguments), ())
  if origin is Annotated:
    base, *marks = arguments
    return tuple(Annotated[(option, *marks)] for option in _options(base))
  return (annotation,)


def _split(option) -> tuple[Any, tuple[Any, ...]]:
  """One alternative without its marks, and these."""
  if typing.get_origin(option) is Annotated:
    base, *marks = typing.get_args(option)
    return base, tuple(marks)
  return option, ()


def _converted(where, option, value):
  """The value as one alternative has it, or `_MISFIT`."""
  base, marks = _split(option)
  origin = typing.get_origin(base)
  number = isinstance(value, int | float | np.integer | np.floating)
  number = number and not isinstance(value, bool)
  if any(isinstance(mark, _Floating) for mark in marks):
    return _floating_dtype(value)
  if base is Any:
    return value
  if base in (int, float):
    whole = isinstance(value, int | np.integer)
    if not number or (base is int and not whole):
      return _MISFIT
    try:
      value = base(value)
    except OverflowError:
      return _MISFIT
    limits = [mark for mark in marks if isinstance(mark, Range)]
    fits = math.isfinite(value) and all(value in limit for limit in limits)
  elif origin is Literal:
    choices = typing.get_args(base)
    # Not by `in` alone: 1 is equal to True, an array has no truth.
    fits = any(type(value) is type(c) and value == c for c in choices)
  elif origin is tuple and isinstance(value, tuple | list):
    return _converted_tuple(where, typing.get_args(base), value)
  else:
    # A class is no instance of the protocol that its instances fulfil.
    kind = types.NoneType if base is None else origin or base
    fits = isinstance(value, kind) and not isinstance(value, type)
  return value if fits else _MISFIT


def _converted_tuple(where, entries, values):
  if entries[1:] == (...,):
    entries = entries[:1] * len(values)
  if len(entries) != len(values):
    return _MISFIT
  return tuple(
    check_value(f"{where}[{index}]", entry, value)
    for index, (entry, value) in enumerate(zip(entries, values, strict=True))
  )


def _floating_dtype(value):
  # NumPy takes None and float for float64, and an array for its own.
  if value is float or not isinstance(value, str | type | np.dtype):
    return _MISFIT
  try:
    dtype = jnp.dtype(value)
  except (TypeError, ValueError):
    return _MISFIT
  return dtype if jnp.issubdtype(dtype, jnp.floating) else _MISFIT


def _described(annotation) -> str:
  """An annotation as an error says it."""
  options = _options(annotation)
  literals = [o for o in options if typing.get_origin(o) is Literal]
  if literals:
    choices = sum(map(typing.get_args, literals), ())
    none = (None,) if types.NoneType in options else ()
    return f"one of {', '.join(map(repr, none + choices))}"
  if len(options) > 1:
    return " or ".join(map(_described, options))
  base, marks = _split(options[0])
  if any(isinstance(mark, _Floating) for mark in marks):
    return "a floating dtype, as jnp.float32"
  limits = "".join(str(mark) for mark in marks if isinstance(mark, Range))
  entries = typing.get_args(base)
  if typing.get_origin(base) is tuple and entries[1:] == (...,):
    return f"a tuple, each entry {_described(entries[0])}"
  if typing.get_origin(base) is tuple:
    return f"a tuple ({', '.join(map(_described, entries))})"
  names = {types.NoneType: "None", int: "an integer", float: "a finite number"}
  names |= {bool: "True or False", str: "a string"}
  name = getattr(base, "__name__", str(base))
  article = "an" if name[0] in "AEIOUaeiou" else "a"
  return names.get(base, f"{article} {name}") + limits


def gathered[**P, R](function: Callable[P, R]) -> Callable[P, R]:
  """Call a function with arrays of which every device has a copy.

  Arrays that explicit axes divide carry that division in their types, and most
  of `jax.numpy` refuses what it cannot divide in the same way. What measures a
  model looks at every pair of tokens or every channel, so it gets the whole of
  each array. Automatic axes are left to the compiler.
  """

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> R:
    args, kwargs = jax.tree.map(_whole, (args, kwargs))
    return function(*args, **kwargs)

  return call


def _whole(x: Any) -> Any:
  if not isinstance(x, jax.Array):
    return x
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes or not any(sharding.spec):
    return x
  return jax.sharding.reshard(x, jax.NamedSharding(sharding.mesh, jax.P()))
