"""Figs. 1 and 7 drawn from the influence experiment's results."""

import os
import pathlib
from typing import Any

import numpy as np

__all__ = ["draw_lags", "draw_last_token", "save"]

COLORS = (
  *("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#e377c2"),
  *("#7f7f7f", "#17becf", "#bcbd22"),
)
STYLES = {"default": "-", "attention": ":"}
STAGES = {
  "init": "initialisation",
  "during": "during training",
  "after": "after training",
}
INITS = {
  "mamba": "Mamba's initialisation",
  "authors": "authors' initialisation",
}


def draw_lags(models: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Draw Fig. 1: log influence against lag, a panel for each family."""
  plt = pyplot()
  panels = _panels(models)
  figure, axes = plt.subplots(
    1, len(panels), figsize=(5.4 * len(panels), 6.4), squeeze=False
  )
  for ax, (title, group) in zip(axes[0], panels, strict=True):
    names = list(dict.fromkeys(_color_key(m) for m in group))
    for model in group:
      # Beyond T/2 ever fewer t have such a lag: another average.
      lags = np.asarray(model["lags"], float)
      lags = lags[lags <= model["tokens"] // 2]
      curve = np.asarray(model["log_score"], float)[: len(lags)]
      color = COLORS[names.index(_color_key(model)) % len(COLORS)]
      ax.plot(
        lags[1:], curve[1:], color=color, linewidth=1.4,
        linestyle=STYLES.get(model["kind"], "--"), label=_label(model),
      )  # fmt: skip
    _draw_bound(ax, group)
    if ax.get_ylim()[0] < -60:
      ax.set_ylim(-60, None)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("lag t - s, tokens")
    ax.grid(alpha=0.3)
    ax.legend(
      fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )
    if group[0].get("trained_length"):
      ax.axvline(group[0]["trained_length"], color="black", linestyle=":",
                 linewidth=0.8)  # fmt: skip
  axes[0][0].set_ylabel("log ‖∂yₜ/∂xₛ‖, mean over t and rows")
  figure.suptitle("Influence against distance (Fig. 1 of Wang et al. 2025)",
                  fontsize=11)  # fmt: skip
  save(figure, path)


def draw_last_token(
  models: list[dict[str, Any]], fits: list[dict[str, Any]], path: pathlib.Path
) -> bool:
  """Draw Fig. 7: influence on the last token, and Mamba over attention.

  Returns:
    False if there are no models to compare.
  """
  del models
  if not fits:
    return False
  after = [fit for fit in fits if fit["mamba"]["stage"] == "after"]
  fits = after or _smallest(fits)
  plt = pyplot()
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
  drawn = []
  shown = [fits[0]["attention"], *(fit["mamba"] for fit in fits)]
  for index, model in enumerate(shown):
    if model["title"] in drawn:
      continue
    drawn.append(model["title"])
    lags = np.asarray(model["lags"])
    left.plot(
      model["tokens"] - 1 - lags, np.asarray(model["last"], float),
      color=COLORS[index % len(COLORS)], linewidth=1.1, label=model["title"],
    )  # fmt: skip
  left.set_xlabel("position s of the input token")
  left.set_ylabel("log share of the influence on the last token")
  floor = min(np.nanmin(np.asarray(m["last"], float)) for m in shown)
  left.set_ylim(max(floor, -40), 0.5)
  for index, fit in enumerate(fits, 1):
    near = (fit["lags"] >= 1) & (fit["lags"] <= 64)
    lags, color = fit["lags"][near], COLORS[index % len(COLORS)]
    right.plot(lags, fit["logs"][near], "o", markersize=2.5, color=color)
    right.plot(
      lags, fit["intercept"] + fit["slope"] * lags, "-", color=color,
      label=f"{fit['mamba']['title']}: exp({fit['slope']:+.3f} ℓ),"
      f" R² {fit['r_squared']:.2f}",
    )  # fmt: skip
  right.axhline(0, color="black", linewidth=0.6)
  right.set_xlabel("lag ℓ to the last token, tokens")
  right.set_ylabel("log ratio to attention's")
  left.set_title("(a) influence on the last token", fontsize=10)
  right.set_title("(b) ratio, near tokens, exponential fit", fontsize=10)
  for ax in (left, right):
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
  stage = STAGES[fits[0]["mamba"]["stage"]]
  figure.suptitle(f"Mamba against attention, {stage} (Fig. 7 of Wang et al."
                  " 2025)", fontsize=11)  # fmt: skip
  save(figure, path)
  return True


def pyplot() -> Any:
  """Give pyplot, drawing to files."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  return plt


def save(figure: Any, path: pathlib.Path) -> None:
  """Write all of a figure or nothing, and let it go."""
  figure.tight_layout()
  temporary = path.with_suffix(f".{os.getpid()}.png")
  figure.savefig(temporary, dpi=110, bbox_inches="tight")
  os.replace(temporary, path)
  pyplot().close(figure)


def _panels(models) -> list[tuple[str, list[dict[str, Any]]]]:
  """Fresh models by initialisation, runs by what they are."""
  panels = []
  models = [m for m in models if m["seed"] == models[0]["seed"]]
  fresh = [m for m in models if m["title"] == m["name"]]
  for init, words in INITS.items():
    group = [m for m in fresh if m["init"] == init]
    if group:
      others = [m for m in fresh if m["kind"] == "attention"]
      group += [m for m in others if m not in group]
      panels.append((f"fresh, {words}", group))
  runs = [m for m in models if m["title"] != m["name"]]
  if runs:
    length = runs[0]["trained_length"]
    panels.append((f"while trained, on rows of {length} tokens", runs))
  return panels


def _color_key(model):
  if model["title"] != model["name"]:
    return model["stage"], model["step"]
  return model["layers"], model["width"]


def _label(model) -> str:
  if model["title"] != model["name"]:
    return f"{model['kind']}-{model['layers']}, step {model['step']}"
  return f"{model['kind']} {model['layers']}x{model['width']}"


def _draw_bound(ax, group) -> None:
  """The theorem's slope, through the first fitted point of a default."""
  found = [m for m in group if m["kind"] == "default" and m["slope"]]
  if not found:
    return
  model = found[-1]
  first = model["lags"].index(model["slope"]["first"])
  lags = np.asarray(model["lags"], float)[first:]
  lags = lags[lags <= model["tokens"] // 2]
  line = model["log_score"][first] + model["log_a_max"] * (lags - lags[0])
  ax.plot(lags, line, color="black", linewidth=0.8, linestyle="-.",
          label=f"slope log A_max, {_label(model)}")  # fmt: skip


def _smallest(fits):
  """Those of the least depth and width: one size is enough for a figure."""
  size = lambda fit: (fit["mamba"]["layers"], fit["mamba"]["width"])
  return [fit for fit in fits if size(fit) == min(map(size, fits))]
