"""HiPPO: systems whose state holds the past in orthogonal polynomials.

Computed in float64 on the host: they are initial values and constants.
"""

import numpy as np

from ssmjax.types import (
  Complex,
  Float,
  check_number,
)

__all__ = ["hippo_legs", "hippo_legs_dplr", "hippo_legt"]


def hippo_legs(
  size: int,
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
  """Give A and B of HiPPO-LegS.

  A[n,k] = -√((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k;
  B[n] = √(2n+1)

  c'(t) = (A c + B x)/t keeps the coefficients of all of x's past, seen as a
  function on [0, t], in Legendre polynomials of norm 1. S4 leaves out 1/t,
  which makes the past fade exponentially, in units of 1/Δ tokens.

  Args:
    size: N, the number of polynomials.

  Returns:
    A `[N, N]` and B `[N]`, float64, per unit of time.

  Raises:
    ValueError: `size` below 1.

  Source: Gu et al. 2020 (arXiv 2008.07669), Theorem 2.

  >>> hippo_legs(2)[0].round(3).tolist()
  [[-1.0, 0.0], [-1.732, -2.0]]
  """
  _check("hippo_legs", size)
  n = np.arange(size)
  root = np.sqrt(2 * n + 1)
  return np.tril(-np.outer(root, root), -1) - np.diag(n + 1.0), root


def hippo_legs_dplr(
  size: int,
) -> tuple[
  Complex[np.ndarray, " N"],
  Float[np.ndarray, " N"],
  Float[np.ndarray, " N"],
  Complex[np.ndarray, "N N"],
]:
  """Give HiPPO-LegS in the basis in which it is diagonal plus rank one.

  𝐀 = V (diag(Λ) - P Pᴴ) Vᴴ,  𝐁 = V B,  V unitary,  Re Λ = -1/2

  for 𝐀 + p pᵀ, p[n] = √(n+1/2), is -1/2 plus a skew-symmetric matrix, whose
  eigenvectors are orthogonal, so that the change of basis is exact to
  rounding (that of 𝐀 itself has entries up to 2⁴ᴺᐟ³, ibid. Lemma 3.2).
  The phases of V's columns are those that make P and B positive; B = √2 P.

  Ordered by Im Λ: entry n and N-1-n are conjugate, columns of V too. For even
  N the last N/2 are one of each pair; S4D-LegS and S4 keep those.

  Args:
    size: N.

  Returns:
    Λ `[N]` complex128, P `[N]` and B `[N]` float64, V `[N, N]` complex128.

  Raises:
    ValueError: `size` below 1.

  Source: Gu et al. 2022, S4 (arXiv 2111.00396), Theorem 1 and §C.1; real part
  and phases: Gu et al. 2022, S4D (arXiv 2206.11893), §4.

  >>> hippo_legs_dplr(2)[0].round(3).tolist()
  [(-0.5-0.866j), (-0.5+0.866j)]
  """
  _check("hippo_legs_dplr", size)
  A, B = hippo_legs(size)
  p = B / np.sqrt(2)
  skew = A + np.outer(p, p)
  skew = (skew - skew.T) / 2
  # Hermitian: real eigenvalues in order, ±w in pairs.
  frequency, V = np.linalg.eigh(-1j * skew)
  frequency = (frequency - frequency[::-1]) / 2
  weight = V.conj().T @ p
  V = V * (weight / np.abs(weight))[None]
  # Rounding aside, the pairs are conjugate: make them so.
  V = (V + V[:, ::-1].conj()) / 2
  weight = np.abs(weight)
  weight = (weight + weight[::-1]) / 2
  return -0.5 + 1j * frequency, weight, np.sqrt(2) * weight, V


def hippo_legt(
  size: int, window: float = 1.0
) -> tuple[Float[np.ndarray, "N N"], Float[np.ndarray, " N"]]:
  """Give A and B of HiPPO-LegT, the system of the Legendre memory unit.

  A[n,k] = (2n+1)/θ · (-1 for n < k, (-1)ⁿ⁻ᵏ⁺¹ for n ≥ k),
  B[n] = (2n+1)/θ · (-1)ⁿ

  The state approximates the last θ of x by shifted Legendre polynomials:
  x(t - s) ≈ Σₙ hₙ(t) Pₙ(2s/θ - 1), 0 ≤ s ≤ θ. Constant x = 1 rests at
  h = (1, 0, …, 0).

  Args:
    size: N.
    window: θ > 0, in units of time; in tokens where Δ = 1.

  Returns:
    A `[N, N]` and B `[N]`, float64.

  Raises:
    ValueError: `size` below 1, or a window that is not positive.

  Source: Voelker et al. 2019, Eq. 2; Gu et al. 2020 (arXiv 2008.07669),
  Theorem 1.

  >>> hippo_legt(2)[0].tolist()
  [[-1.0, -1.0], [3.0, -3.0]]
  """
  _check("hippo_legt", size)
  check_number("hippo_legt", "window", window)
  if not window > 0:
    raise ValueError(
      f"hippo_legt: window is {window}, expected a length of time above 0."
    )
  n = np.arange(size)
  scale = (2 * n + 1) / window
  sign = np.where(n % 2, -1.0, 1.0)
  below = -np.outer(sign, sign)
  A = np.where(n[:, None] < n[None], -1.0, below) * scale[:, None]
  return A, scale * sign


def _check(function, size):
  check_number(function, "size", size, whole=True)
  if size < 1:
    raise ValueError(f"{function}: size is {size}, expected N >= 1.")
