"""What a mixer is: the layer of a `LanguageModel` that looks back in time.

A model is built of its configuration's `mixers`, each a `MixerConfig` that
builds a `Mixer`. The library's own keep what these two say, and so has a mixer
of your own. `models.register` gives its configuration a name in files; it is
then saved, loaded, trained and measured like the others. A whole one, an
exponential moving average of 16 channels::

    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ssmjax import models, ops
    from ssmjax.types import Recurrence

    @models.register
    @dataclasses.dataclass(frozen=True)
    class EMAConfig:
      channels: int = 16

      def build(self, d_model, n_layers, rngs):
        return EMA(d_model, self, rngs)

    class EMA(nnx.Module):
      def __init__(self, d_model, config, rngs):
        draw, size = nnx.initializers.lecun_normal(), config.channels
        self.config = config
        self.in_proj = nnx.Param(draw(rngs.params(), (d_model, size)))
        self.out_proj = nnx.Param(draw(rngs.params(), (size, d_model)))
        self.rate = nnx.Param(jnp.linspace(-4.0, 4.0, size))

      def __call__(self, x, state=None, segment_ids=None):
        a, dt, b = self._eq1(x, segment_ids)
        h, state = ops.linear_scan(
          a, dt * b, initial_state=state, segment_ids=segment_ids
        )
        return read(self.out_proj[...], h).astype(x.dtype), state

      def step(self, x, state, segment_ids=None):
        a, dt, b = self._eq1(x, segment_ids)
        h, state = ops.linear_step(
          a, dt * b, state=state, segment_ids=segment_ids
        )
        return read(self.out_proj[...], h).astype(x.dtype), state

      def init_state(self, batch_size, max_length=None):
        return jnp.zeros((batch_size, self.config.channels))

      def recurrence(self, x):
        a, dt, b = self._eq1(x)
        readout = jax.tree_util.Partial(read, self.out_proj[...])
        return Recurrence(a, dt, b, jnp.zeros_like(b[:, 0]), readout)

      def _eq1(self, x, segment_ids=None):
        if segment_ids is not None:  # A NaN in the padding stays there.
          x = jnp.where(segment_ids[..., None] > 0, x, 0)
        b = x.astype(jnp.float32) @ self.in_proj[...]
        dt = jnp.broadcast_to(jax.nn.sigmoid(self.rate[...]), b.shape)
        return 1 - dt, dt, b

    def read(weight, h, t=None):
      return h @ weight

In a model that takes one step of training, is saved and loaded::

    config = models.ModelConfig(16, 8, 2, mixers=(EMAConfig(),))
    model = models.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12).reshape(2, 6)

    def loss(model):
      logits, _ = model(tokens[:, :-1])
      likelihood = jax.nn.log_softmax(logits)
      return -jnp.take_along_axis(likelihood, tokens[:, 1:, None], -1).mean()

    gradient = jax.jit(jax.grad(loss))(model)
    model = jax.tree.map(lambda p, g: p - 0.1 * g, model, gradient)
    models.save("ema", model)
    again = models.load("ema")  # Where `EMAConfig` has been imported.

Letters: B batch, T time, M the model's width (`d_model`).
"""

from typing import Any, Protocol, runtime_checkable

from flax import nnx

from ssmjax.types import Array, Float, Int, Recurrence

__all__ = ["Mixer", "MixerConfig"]


@runtime_checkable
class MixerConfig(Protocol):
  """The configuration of a mixer, which builds it.

  A frozen dataclass, so that it is compared and hashed by its fields: a model
  is compiled once for all equal configurations. A field holds an int, a float,
  a bool, a str, None, a tuple or a dataclass of these, or, if its name is
  `dtype`, a floating dtype: then files can hold it too. Annotate each with
  its type. `__post_init__` raises ValueError for what cannot be built, and
  names class, field, what was found and what was expected.

  What some functions look for where it is there: the fields `dtype`, of
  activations, which `models.load` sets, and `polarization`; the class
  variables `polarizes` (`"channels"` or `"heads"`, whose decays `polarization`
  holds) and `op` (the function of `ssmjax.ops` that runs it).
  """

  def build(self, d_model: int, n_layers: int, rngs: nnx.Rngs) -> Any:
    """Make the mixer for a model of this width and depth.

    It is traced, and mapped over the layers of one place in the pattern by
    `jax.vmap`: shapes depend on the configuration alone, and no value is
    looked at.

    Args:
      d_model: M.
      n_layers: depth of the model, by which some scale what they write.
      rngs: `rngs.params()` gives keys; it is not kept.
    """


class Mixer(Protocol):
  """A layer that maps `[B, T, M]` to `[B, T, M]` and looks only back.

  An `nnx.Module` whose arrays are `nnx.Param`s, float32 as they are made.
  Whatever else it holds is static and hashable: its configuration, sizes, None,
  functions of a module. No arrays, rngs, lambdas or partials: each would be
  another structure, and compiled again.

  Nothing is changed in a call. The same inputs give the same outputs, and what
  is to be remembered is the state that goes in and comes out. Python's control
  flow asks shapes, dtypes, the configuration, and whether an argument is None.

  A *state* is a pytree of arrays `[B, …]` without a time axis, float32, or
  complex64 where decays are complex. What a call or a step returns has the
  structure, shapes and dtypes of what `init_state` makes, so that a loop can
  carry it.

  *Segments*: `segment_ids` number the documents in a row from 1 on, 0 is
  padding, which may stand anywhere. Padding leaves the state untouched, y is 0
  there, and nothing that stands in x there, a NaN included, reaches another
  token, the state or a gradient. The state restarts where an id differs from
  the one of the last token before that is no padding; the first token that is
  no padding goes on from the given state. Without them all is one document.

  Errors are ValueErrors for inputs of another shape or dtype, which name layer,
  argument, what was found and what was expected.

  Attributes:
    config: what built it.
  """

  config: Any

  def __call__(
    self,
    x: Float[Array, "B T M"],
    state: Any = None,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T M"], Any]:
    """Mix over time.

    A sequence in pieces of any lengths, each from the state after the one
    before, gives what the whole gives.

    Args:
      x: `[B, T, M]`, T ≥ 1.
      state: to go on from; None for the beginning.
      segment_ids: `[B, T]` int; None for one document without padding.

    Returns:
      y `[B, T, M]` of x's dtype, where y at t depends on x up to t, and the
      state after the last token that is no padding. The block adds y to x.
    """

  def step(
    self,
    x: Float[Array, "B M"],
    state: Any,
    segment_ids: Int[Array, " B"] | None = None,
  ) -> tuple[Float[Array, "B M"], Any]:
    """Mix one token: what a call on it alone would give.

    Args:
      x: `[B, M]`.
      state: of the tokens before.
      segment_ids: `[B]`, 0 for rows whose token is padding. A step never
        begins a document.

    Returns:
      y `[B, M]` of x's dtype and the new state.
    """

  def init_state(self, batch_size: int, max_length: int | None = None) -> Any:
    """Make the state before any token.

    It is also called on a stack of layers, whose parameters have an axis more:
    take sizes from the configuration, not from parameters.

    Args:
      batch_size: B.
      max_length: tokens that there must be room for, for layers whose state
        grows with them; others pass it over.
    """

  def recurrence(self, x: Float[Array, "B T M"]) -> Recurrence:
    """Show the layer's own Eq. 1 on `x`, from the beginning, as one document.

    h_t = a_t h_{t-1} + Δ_t b_t,  y_t = readout(h_t, t), with y as a call has
    it. By this alone `ssmjax.diagnostics` and `ssmjax.theory` know a layer.

    Raises:
      NotImplementedError: it has no diagonal Eq. 1, and why.
    """
