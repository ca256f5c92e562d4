"""The layers of Wang et al. 2025, App. B, as bare A, Δ, b and c of Eq. 1.

A form maps parameters `[8, 3, 4]` and tokens x `[B, T, 3]` to a, dt, b, c,
all `[B, T, 4]`: one token channel with four states. Each is written from its
own paper, not through any module of the library.
"""

import contextlib

import jax
import jax.numpy as jnp

from ssmjax.theory import from_arrays
from ssmjax.types import Recurrence

TOKENS, STATES, WEIGHTS = 3, 4, 8


def s4d_real(p, x):
  """S4D-Real: Aₙ = -n, exact zero-order hold. Gu et al. 2022, §3."""
  return _continuous(p, x, -jnp.arange(1.0, STATES + 1), "zoh")


def s4d_lin(p, x):
  """S4D-Lin: Aₙ = -1/2 + iπn."""
  imaginary = jnp.pi * jnp.arange(STATES)
  return _continuous(p, x, -0.5 + 1j * imaginary, "zoh")


def s4d_inv(p, x):
  """S4D-Inv: Aₙ = -1/2 + i(N/π)(N/(2n+1) - 1), bilinear as in S4."""
  n = jnp.arange(STATES)
  imaginary = STATES / jnp.pi * (STATES / (2 * n + 1) - 1)
  return _continuous(p, x, -0.5 + 1j * imaginary, "bilinear")


def dss(p, x):
  """DSS-EXP: Re A = -exp(Λ), Im A free; Eq. 2 with its Euler input."""
  a = -jnp.exp(p[0, 0]) + 1j * p[0, 1]
  return _continuous(p, x, a, "euler")


def h3(p, x):
  """H3's diagonal SSM on k·v, read by q. Fu et al. 2022."""
  a, dt, _, c = s4d_lin(p, x)
  k, v, q = (x @ p[i][:, :1] for i in (4, 5, 6))
  b = (k * v) * p[1, 0]
  return a, dt, b.astype(a.dtype), q.astype(a.dtype) * c


def s6(p, x):
  """Mamba: Δ = softplus(W_Δ x), A = exp(-nΔ), b = (W_B x) x. Eq. 3."""
  dt = jax.nn.softplus(x @ p[0][:, :1])
  a = jnp.exp(-dt * jnp.arange(1.0, STATES + 1)[None, None])
  return a, dt, (x @ p[1]) * x[..., :1], x @ p[2]


def mamba2(p, x):
  """Mamba-2: one decay for a head, A = exp(-αΔ). Dao & Gu 2024."""
  dt = jax.nn.softplus(x @ p[0][:, :1])
  a = jnp.exp(-dt * jnp.exp(p[3, 0, 0]))
  return a, dt, (x @ p[1]) * x[..., :1], x @ p[2]


def linear_attention(p, x):
  """Its denominator ignored, as in App. B: A = 1, Δ = 1, φ linear."""
  return _linear_attention(p, x, lambda v: v)


def linear_attention_elu(p, x):
  """φ = 1 + ELU. Katharopoulos et al. 2020."""
  return _linear_attention(p, x, lambda v: 1 + jax.nn.elu(v))


def performer(p, x):
  """Positive random features, φ(v) = exp(v - |x|²/2). Choromanski 2020."""
  half = jnp.sum(x**2, -1, keepdims=True) / 2
  return _linear_attention(p, x, lambda v: jnp.exp(v - half))


def retnet(p, x):
  """RetNet: A = γ. Sun et al. 2023."""
  gamma = 1 - 2.0 ** (-5 - jnp.abs(p[3, 0, :1]))
  a = jnp.broadcast_to(gamma, (1, 1, 1))
  return a, jnp.ones_like(a), (x @ p[0]) * (x @ p[4][:, :1]), x @ p[1]


def gla(p, x):
  """GLA: A = σ(g(x))^{1/16}. Yang et al. 2023."""
  a = jax.nn.sigmoid(x @ p[3]) ** (1 / 16)
  return a, jnp.ones_like(a), (x @ p[0]) * (x @ p[4][:, :1]), x @ p[1]


def gla_of_the_paper(p, x):
  """GLA as App. B reads: A = σ(g(x))."""
  _, dt, b, c = gla(p, x)
  return jax.nn.sigmoid(x @ p[3]), dt, b, c


def hgrn(p, x):
  """HGRN: h = λe^{iθ} h + (1 - λ) x, complex. Qin et al. 2023."""
  forget = jax.nn.sigmoid(x @ p[3])
  turn = jnp.exp(1j * p[2, 0])[None, None]
  b = x @ p[0] + 1j * (x @ p[1])
  return forget * turn, 1 - forget, b, (x @ p[4]).astype(b.dtype)


def hgrn2(p, x):
  """HGRN2: A = f, k = 1 - f. Qin et al. 2024."""
  forget = jax.nn.sigmoid(x @ p[3])
  value = jnp.broadcast_to(x @ p[4][:, :1], forget.shape)
  return forget, 1 - forget, value, x @ p[1]


def rg_lru(p, x):
  """Griffin: log a = -8 softplus(Λ) σ(W_a x), √(1-a²) (i ∘ x). De 2024."""
  log_a = -8 * jax.nn.softplus(p[3, 0] - 4) * jax.nn.sigmoid(x @ p[0])
  gated = jax.nn.sigmoid(x @ p[1]) * (x @ p[4])
  return jnp.exp(log_a), jnp.sqrt(-jnp.expm1(2 * log_a)), gated, _ones(gated)


def lru(p, x):
  """LRU: λ = exp(-e^ν + iθ), input scaled by √(1-|λ|²). Orvieto 2023."""
  size, turn = jnp.exp(-jnp.exp(p[3, 0] - 2)), jnp.exp(1j * p[3, 1])
  a = (size * turn)[None, None]
  b = x @ p[0] + 1j * (x @ p[1])
  return a, jnp.sqrt(1 - size**2)[None, None], b, _ones(b)


def mingru(p, x):
  """The minGRU: h = (1-z) h + z h̃. Feng et al. 2024."""
  z = jax.nn.sigmoid(x @ p[3])
  return 1 - z, z, x @ p[4], _ones(z)


def minlstm(p, x):
  """The minLSTM: f/(f+i) and i/(f+i). Feng et al. 2024."""
  f, i = jax.nn.sigmoid(x @ p[3]), jax.nn.sigmoid(x @ p[2])
  return f / (f + i), i / (f + i), x @ p[4], _ones(f)


def rwkv4(p, x):
  """RWKV-4, normalised: App. B, whose Dₜ is a sum over the past."""
  decay, key = jnp.exp(-jnp.exp(p[3, 0])), jnp.exp(x @ p[0])
  past, a, dt = jnp.zeros_like(key[:, 0]), [], []
  for t in range(x.shape[1]):
    total = decay[None] * past + key[:, t]
    a.append(decay[None] * past / total)
    dt.append(key[:, t] / total)
    past = total
  receptance = jax.nn.sigmoid(x @ p[1])
  return jnp.stack(a, 1), jnp.stack(dt, 1), x @ p[4], receptance


def rwkv5(p, x):
  """RWKV-5, no normaliser: a learned decay for each channel."""
  a = jnp.exp(-jnp.exp(p[3, 0]))[None, None]
  return a, jnp.ones_like(a), (x @ p[0]) * (x @ p[4][:, :1]), x @ p[1]


def rwkv6(p, x):
  """RWKV-6: the decay exp(-exp(w(x))) of the token. Peng et al. 2024."""
  a = jnp.exp(-jnp.exp(x @ p[3]))
  return a, jnp.ones_like(a), (x @ p[0]) * (x @ p[4][:, :1]), x @ p[1]


def mlstm(p, x):
  """A row of xLSTM's matrix memory, its normaliser left out. Beck 2024."""
  forget = jax.nn.sigmoid(x @ p[3][:, :1])
  gate = jnp.exp(x @ p[2][:, :1])
  return forget, gate, (x @ p[0]) * (x @ p[4][:, :1]), x @ p[1]


def mega(p, x):
  """Mega's damped EMA: h = (1 - αδ) h + α β x. Ma et al. 2022."""
  alpha, delta = jax.nn.sigmoid(p[2, 0]), jax.nn.sigmoid(p[3, 0])
  b = x[..., :1] * p[0, 0]
  return (1 - alpha * delta)[None, None], alpha[None, None], b, _ones(b)


def megalodon(p, x):
  """Megalodon's complex EMA: h = (1 - αδ)e^{iθ} h + α e^{iθ} β x."""
  a, dt, b, c = mega(p, x)
  turn = jnp.exp(1j * p[4, 0])[None, None]
  return a * turn, dt, b * turn, c.astype(turn.dtype)


def longhorn(p, x):
  """Longhorn: A = 1 - Δ k∘k, Δ = β/(1 + β kᵀk), b = k x. Liu 2024."""
  k, beta = x @ p[0], jax.nn.sigmoid(x @ p[3][:, :1])
  dt = beta / (1 + beta * jnp.sum(k**2, -1, keepdims=True))
  return 1 - dt * k**2, dt, k * x[..., :1], x @ p[1]


# Name: (form, what its A + Δ is: "equal" to 1, "above" it, or "either").
FORMS = {
  "s4d_real": (s4d_real, "either"),
  "s4d_lin": (s4d_lin, "either"),
  "s4d_inv": (s4d_inv, "either"),
  "dss": (dss, "either"),
  "h3": (h3, "either"),
  "s6": (s6, "either"),
  "mamba2": (mamba2, "either"),
  "linear_attention": (linear_attention, "above"),
  "linear_attention_elu": (linear_attention_elu, "above"),
  "performer": (performer, "above"),
  "retnet": (retnet, "above"),
  "gla": (gla, "above"),
  "gla_of_the_paper": (gla_of_the_paper, "above"),
  "hgrn": (hgrn, "equal"),
  "hgrn2": (hgrn2, "equal"),
  "rg_lru": (rg_lru, "above"),
  "lru": (lru, "above"),
  "mingru": (mingru, "equal"),
  "minlstm": (minlstm, "equal"),
  "rwkv4": (rwkv4, "equal"),
  "rwkv5": (rwkv5, "above"),
  "rwkv6": (rwkv6, "above"),
  "mlstm": (mlstm, "either"),
  "mega": (mega, "above"),
  "megalodon": (megalodon, "above"),
  "longhorn": (longhorn, "either"),
}
# Not of Eq. 1, so not here: Hyena (a free convolution), TTT and the delta
# rule (A is not diagonal), sLSTM (its gates read its own state).

COMPLEX = {"s4d_lin", "s4d_inv", "dss", "h3", "hgrn", "lru", "megalodon"}
# Aₜ depends on more than token t.
NOT_LOCAL = {"rwkv4"}


def arrays(name, p, x):
  """The form's a, dt, b, c, each `[B, T, 4]`; complex only where it is."""
  with usual_promotion():
    shape = (*x.shape[:2], STATES)
    return tuple(jnp.broadcast_to(v, shape) for v in FORMS[name][0](p, x))


def layer(name, p, x):
  """The form as a recurrence whose output is Σ c h, or its real part."""
  return _real_output(from_arrays(*arrays(name, p, x)))


def any_layer(names, index, p, x):
  """The layer of `names[index]`, compiled once for all, in one dtype."""
  wide = jax.lax.complex(x, x).dtype if COMPLEX & set(names) else x.dtype

  def branch(name):
    def run(p, x):
      a, dt, b, c = arrays(name, p, x)
      return a.astype(wide), dt, b.astype(wide), c.astype(wide)

    return run

  a, dt, b, c = jax.lax.switch(index, [branch(name) for name in names], p, x)
  return _real_output(from_arrays(a, dt, b, c))


@contextlib.contextmanager
def usual_promotion():
  """Strictness is asked of the theory, not of what it is tried on."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


def rwkv4_pair(p, x):
  """RWKV-4 as Eq. 1 of tokens: numerator and denominator, read as a ratio."""
  decay, key = jnp.exp(-jnp.exp(p[3, 0])), jnp.exp(x @ p[0])
  b = jnp.stack([x @ p[4], jnp.ones_like(key)], -2)
  a = jnp.broadcast_to(decay[None, None, None], b.shape)
  dt = jnp.broadcast_to(key[:, :, None], b.shape)
  readout = jax.tree_util.Partial(_ratio, jax.nn.sigmoid(x @ p[1]))
  return Recurrence(a, dt, b, jnp.zeros_like(b[:, 0]), readout)


def mlstm_pair(p, x):
  """A mLSTM head's value row with its normaliser: Cq / max(|n·q|, 1)."""
  a, dt, b, q = mlstm(p, x)
  b = jnp.stack([b, x @ p[0]], -2)
  wide = lambda v: jnp.broadcast_to(v[:, :, None], b.shape)
  readout = jax.tree_util.Partial(_normalised, q)
  return Recurrence(wide(a), wide(dt), b, jnp.zeros_like(b[:, 0]), readout)


def _continuous(p, x, a, rule):
  dt = jnp.exp(p[3, 2, :1])[None, None]
  rate = jnp.broadcast_to(a[None, None], (1, 1, STATES))
  step = dt.astype(rate.dtype) * rate
  if rule == "bilinear":
    decay = (1 + step / 2) / (1 - step / 2)
    gain = 1 / (1 - step / 2)
  else:
    decay = jnp.exp(step)
    gain = jnp.ones_like(step) if rule == "euler" else (decay - 1) / step
  b = gain * (x[..., :1] * p[1, 0]).astype(gain.dtype)
  return decay, dt, b, p[2, 0][None, None].astype(gain.dtype)


def _linear_attention(p, x, feature):
  key, query = feature(x @ p[0]), feature(x @ p[1])
  ones = _ones(key)
  return ones, ones, key * (x @ p[4][:, :1]), query


def _ones(like):
  return jnp.ones_like(like)


def _real_output(r):
  readout = jax.tree_util.Partial(_real_part, r.readout)
  return Recurrence(r.a, r.dt, r.b, r.initial_state, readout)


def _real_part(readout, h, t):
  return readout(h, t).real


def _ratio(receptance, h, t):
  r = jax.lax.dynamic_index_in_dim(receptance, t, 1, keepdims=False)
  return r * h[:, 0] / h[:, 1]


def _normalised(query, h, t):
  q = jax.lax.dynamic_index_in_dim(query, t, 1, keepdims=False)
  top, norm = (h * q[:, None]).sum(-1).T
  return (top / jnp.maximum(jnp.abs(norm), 1.0))[:, None]
