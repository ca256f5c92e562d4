"""When runs leave a plateau, and what the recall experiment says of it."""

import json
import math
import pathlib

import numpy as np
import pytest

from experiments.plateau import (
  difference_of_means,
  left_at,
  log_rank,
  restricted_difference,
  share_that_left,
)
from experiments.recall_verdicts import (
  remembers_at,
  sentences,
  solves_at,
  verdicts,
)


def test_a_run_has_left_where_it_stays_above_the_threshold():
  steps = [10, 20, 30, 40]
  assert left_at(steps, [0.1, 0.6, 0.7, 0.9], 0.5) == 20
  assert left_at(steps, [0.6, 0.4, 0.7, 0.9], 0.5) == 30
  assert left_at(steps, [0.6, 0.7, 0.8, 0.5], 0.5) is None
  assert left_at(steps, [0.1, 0.1, 0.1, 0.6], 0.5) == 40


def test_share_that_left_counts_the_censored_as_waiting():
  times = [10, None, 30, 10]
  assert share_that_left(times, [5, 10, 29, 30]) == [0.0, 0.5, 0.5, 0.75]


def test_restricted_means_count_a_censored_run_with_the_horizon():
  found = restricted_difference([100, 200], [None, 300], 400)
  assert found.effect == 150 - 350
  # Of the six ways to deal four runs, two are as far apart.
  assert found.p == pytest.approx(1 / 3)


def test_difference_of_equal_runs_has_no_width():
  found = difference_of_means([3.0] * 5, [1.0] * 5)
  assert found[:3] == (2.0, 2.0, 2.0)
  assert found.p == pytest.approx(2 / math.comb(10, 5))


def test_interval_of_few_runs_holds_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(1)
  held = 0
  for _ in range(150):
    found = difference_of_means(rng.normal(1, 1, 8), rng.normal(0, 1, 8))
    held += found.low <= 1 <= found.high
  # 0.95, less what the percentiles of eight runs lose, and three deviations.
  assert held / 150 > 0.87


def test_log_rank_is_that_of_a_textbook_and_exact_for_few_runs():
  # All of the first leave before any of the second.
  assert log_rank([1, 2, 3, 4, 5], [6, 7, 8, 9, None]) == pytest.approx(2 / 252)
  assert log_rank([1, 2, 3], [1, 2, 3]) == 1.0
  assert log_rank([None] * 3, [None] * 3) == 1.0


def run(seed, remembers, far):
  """A run that answers from step `remembers` on, of four evaluations."""
  steps = [25, 50, 75, 100]
  one = [1.0 if remembers and step >= remembers else 0.1 for step in steps]
  four = [0.25] * 4
  entry = {"from": 32, "below": 64, "right": far, "asked": 100}
  return {
    "seed": seed,
    "accuracy": {"1": one[-1], "4": 0.25},
    "curve": {"steps": steps, "1": one, "4": four},
    "distance": {"1": [{**entry, "from": 2, "below": 4, "right": 90}, entry]},
  }


def row(name, values):
  return {"row": name, "runs": [run(i, *v) for i, v in enumerate(values)]}


def test_runs_say_when_they_remember_and_when_they_solve():
  assert remembers_at(run(0, 50, 90)) == 50
  assert remembers_at(run(0, None, 90)) is None
  assert solves_at(run(0, 50, 90)) is None


def test_claims_are_shown_not_shown_or_contradicted_by_their_seeds():
  rows = [
    row("default-2", [(None, 10 + i) for i in range(5)]),
    row("both-2", [(50, 95 + i % 2) for i in range(5)]),
    row("zero-2", [(None, 10 + i) for i in range(5)]),
    row("one-2", [(None, 2) for i in range(5)]),
  ]
  both = next(v for v in verdicts(rows) if v["row"] == "both-2")
  assert [v["verdict"] for v in verdicts(rows) if v["row"] == "both-2"] == [
    "shown",
    "shown",
    "not shown",
  ]
  assert both["seeds"] == [0, 1, 2, 3, 4]
  zero = [v["verdict"] for v in verdicts(rows) if v["row"] == "zero-2"]
  assert zero == ["not shown", "not shown"]
  one = [v["verdict"] for v in verdicts(rows) if v["row"] == "one-2"]
  assert one == ["not shown", "contradicted"]
  # What is not there is not judged.
  assert not [v for v in verdicts(rows) if "matched" in v["row"]]
  assert "**contradicted**" in "\n".join(sentences(verdicts(rows)))


def test_two_seeds_say_nothing():
  rows = [
    row("default-2", [(None, 10)] * 2),
    row("both-2", [(50, 95)] * 2),
  ]
  assert verdicts(rows) == []


def test_committed_verdicts_are_those_of_the_committed_results():
  folder = pathlib.Path(__file__).parents[1] / "experiments" / "results"
  read = lambda name: json.loads((folder / name).read_text())
  found = verdicts(read("recall-cpu.json")["rows"])
  assert found == read("recall-verdicts.json")
  table = (folder / "README.md").read_text()
  assert all(line in table for line in sentences(found))
