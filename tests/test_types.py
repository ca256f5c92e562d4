"""Shape checks say what is wrong, and records hold together."""

import jax
import jax.numpy as jnp
import pytest

from ssmjax.types import (
  Polarization,
  Recurrence,
  check_choice,
  check_shapes,
  real_dtype,
  state_dtype,
)


def test_check_shapes_binds_letters_in_order_and_names_the_misfit():
  x, y = jnp.zeros((2, 3)), jnp.zeros((3, 5))
  sizes = check_shapes("f", {"x": (x, "B T"), "y": (y, "T 5"), "z": (None, "")})
  assert (sizes["B"], sizes["T"]) == (2, 3)
  with pytest.raises(ValueError, match=r"f: y has shape \(3, 5\), expected"):
    check_shapes("f", {"x": (x, "B T"), "y": (y, "B=2 N=4")})
  with pytest.raises(ValueError, match=r"expected \(T=3, 4\)\. Transpose it\."):
    check_shapes(
      "f", {"x": (x, "B T"), "y": (y, "T 4")}, {"y": "Transpose it."}
    )
  with pytest.raises(ValueError, match=r"x has shape \(2, 3\), expected \(B\)"):
    check_shapes("f", {"x": (x, "B")})


def test_check_choice_lists_what_may_be_passed():
  check_choice("f", "mode", "a", ("a", "b"))
  with pytest.raises(ValueError, match="f: mode is 'c', expected one of 'a', "):
    check_choice("f", "mode", "c", ("a", "b"))


@pytest.mark.usefixtures("x64")
def test_state_dtype_is_the_widest_but_never_below_float32():
  half, wide = jnp.zeros(1, jnp.bfloat16), jnp.zeros(1, jnp.float64)
  narrow_complex = jnp.zeros(1, jnp.complex64)
  assert state_dtype(half, None) == real_dtype(half) == jnp.float32
  assert state_dtype(half, wide) == jnp.float64
  assert state_dtype(half, narrow_complex) == jnp.complex64
  assert state_dtype(wide, narrow_complex) == jnp.complex128
  assert real_dtype(narrow_complex) == jnp.float32


def test_polarization_counts_the_channels_of_the_state():
  assert Polarization(ones=1, zeros=2).total(4) == 7
  assert Polarization(ones=1, zeros=2, placement="replace").total(4) == 4
  with pytest.raises(ValueError, match="more channels than the 2 learned ones"):
    Polarization(ones=1, zeros=2, placement="replace").total(2)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(ones=-1), "Polarization: ones is -1, expected an integer of"),
    (dict(zeros=1.0), "Polarization: zeros is 1.0, expected an integer"),
    (dict(placement="swap"), "placement is 'swap', expected one of 'add'"),
    (dict(zero_decay="-100"), "zero_decay is '-100', expected one of 'exact'"),
  ],
)
def test_polarization_refuses_what_it_cannot_mean(fields, message):
  with pytest.raises(ValueError, match=message):
    Polarization(**fields)


def scaled(weight, h, t):
  return weight * h


def test_recurrence_is_a_pytree_of_its_arrays_and_its_readouts():
  x = jnp.ones((1, 2, 3))
  readout = jax.tree_util.Partial(scaled, jnp.float32(3.0))
  layer = Recurrence(x, x, x, x[:, 0], readout)
  doubled = jax.jit(lambda r: jax.tree.map(lambda leaf: 2 * leaf, r))(layer)
  assert len(jax.tree.leaves(layer)) == 5
  assert float(doubled.a.sum()) == 12
  assert float(doubled.readout(1.0, 0)) == 6
