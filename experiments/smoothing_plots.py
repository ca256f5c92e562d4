"""Figs. 5 and 6 drawn from the smoothing experiment's results."""

import pathlib
from typing import Any

import numpy as np

from experiments.influence_plots import COLORS, STAGES, pyplot, save
from experiments.smoothing_measure import GRID

__all__ = ["draw_sharpness", "draw_spread"]

MEASURES = {
  "mean": "mean pairwise distance",
  "relative": "… over the mean norm",
}


def draw_sharpness(models: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draw Fig. 5: sharpness of b and h, mixer and block output, by layer.

  The trained models after training and the deepest fresh ones; above the
  measure of the figure's caption, below the same free of scale.
  """
  plt = pyplot()
  chosen = _chosen(models)
  figure, axes = plt.subplots(2, 3, figsize=(14.5, 8))
  for row, (measure, words) in zip(axes, MEASURES.items(), strict=True):
    for index, model in enumerate(chosen):
      color = COLORS[index % len(COLORS)]
      style = "--" if model["stage"] == "after" else "-"
      values = lambda layers, m=measure: np.asarray(
        [layer[m] for layer in layers], float
      )
      depth = lambda v: np.arange(1, len(v) + 1) / len(v)
      # Thinner on top, where curves are the same.
      shown: Any = {"color": color, "linestyle": style, "markersize": 3.5}
      shown["linewidth"] = max(3.5 - 0.6 * index, 1.0)
      if all(model["eq1"]):
        b = values([layer["b"] for layer in model["eq1"]])
        h = values([layer["h"] for layer in model["eq1"]])
        row[0].plot(
          depth(b), b, marker="o", markerfacecolor="none", **shown
        )  # fmt: skip
        row[0].plot(depth(h), h, marker="s", **shown)
      mixer, block = values(model["mixer"]), values(model["block"])
      row[1].plot(
        depth(mixer), mixer, marker="o", label=model["title"], **shown
      )
      block = np.concatenate([[model["input"][measure]], block])
      row[2].plot(
        np.linspace(0, 1, len(block)), block, marker="o",
        label=model["title"], **shown,
      )  # fmt: skip
    row[0].set_ylabel(words)
    for ax in row:
      ax.grid(alpha=0.3)
      if measure == "mean":
        ax.set_yscale("log")
  titles = ("(a) inputs b (open) and states h (filled)", "(b) mixer's output",
            "(c) block's output, from the embedding on")  # fmt: skip
  for ax, title in zip(axes[0], titles, strict=True):
    ax.set_title(title, fontsize=10)
  for ax in axes[1]:
    ax.set_xlabel("layer / depth")
  handles, labels = axes[0][1].get_legend_handles_labels()
  figure.legend(
    handles, labels, fontsize=8, ncols=3, loc="upper center",
    bbox_to_anchor=(0.5, 0.0),
  )  # fmt: skip
  figure.suptitle(
    "Sharpness of tokens along the layers (Fig. 5 of Wang et al. 2025);"
    " dashed: after training",
    fontsize=11,
  )
  save(figure, path)


def draw_spread(models: list[dict[str, Any]], path: pathlib.Path) -> bool:
  """Draw Fig. 6: share of channels against A_max - A_min.

  Returns:
    False if no model has an A.
  """
  models = [m for m in _chosen(models) if m["spread"]]
  if not models:
    return False
  plt = pyplot()
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
  for index, model in enumerate(models):
    color = COLORS[index % len(COLORS)]
    style = "--" if model["stage"] == "after" else "-"
    # Thinner on top, where curves are the same.
    width = max(3.5 - 0.6 * index, 1.0)
    for ax, name in ((left, "spread"), (right, "token_spread")):
      ax.plot(
        GRID, 100 * np.asarray(model[name], float), color=color,
        linestyle=style, linewidth=width, label=_title(model),
      )  # fmt: skip
  for ax, words in (
    (left, "over all t and n of a channel"),
    (right, "over n at one t, mean over t"),
  ):
    ax.axvline(0.5, color="black", linewidth=0.7, linestyle=":")
    ax.axhline(60, color="black", linewidth=0.7, linestyle=":")
    ax.set_title(words, fontsize=10)
    ax.set_xlabel("A_max - A_min")
    ax.grid(alpha=0.3)
  left.set_ylabel("channels at or below, %")
  right.legend(fontsize=7.5)
  figure.suptitle(
    "Spread of a channel's learned decays (Fig. 6 of Wang et al. 2025, who"
    " find over 60 % of channels below 0.5)",
    fontsize=11,
  )
  save(figure, path)
  return True


def _chosen(models) -> list[dict[str, Any]]:
  """The deepest fresh models and the trained ones, of the first seed."""
  models = [m for m in models if m["seed"] == models[0]["seed"]]
  fresh = [m for m in models if m["title"] == m["name"]]
  if fresh:
    size = lambda m: (m["layers"], m["width"])
    deepest = max(map(size, fresh))
    fresh = [m for m in fresh if size(m) == deepest]
  return fresh + [m for m in models if m["stage"] == "after"]


def _title(model) -> str:
  if model["stage"] == "after":
    return f"{model['title']} ({STAGES['after']})"
  return model["title"]
