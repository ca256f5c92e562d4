"""The language model experiment, from its command line to table and plot."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import lm, lm_measure, lm_report, lm_runs, lm_settings
from ssmjax import data, models, training

# Cheap to compile, for what does not depend on the mixer.
SMALL = {
  "rows": ("attention-1",), "width": 8, "steps": 8, "max_bytes": 60_000,
}  # fmt: skip
# The preset's polarized row, on less text.
SMOKE = {"preset": "smoke", "rows": ("both-2",), "max_bytes": 60_000}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  """The smoke preset's polarized row, run once."""
  out = tmp_path_factory.mktemp("lm")
  arguments = lm.Arguments(out=out, spectra=True, **SMOKE)
  assert lm.main(arguments) == 0
  return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A small run that was never stopped."""
  out = tmp_path_factory.mktemp("whole")
  assert lm.main(lm.Arguments(preset="smoke", out=out, **SMALL)) == 0
  return out


def test_smoke_run_leaves_results_table_and_plot(smoke):
  results = json.loads((smoke / "results.json").read_text())
  (row,) = results["rows"]
  (run,) = row["runs"]
  assert (row["row"], row["layers"], run["seed"]) == ("both-2", 2, 0)
  bits = [value for _, value in run["curve"]["held_out"]]
  # From 257 equal guesses downwards: it learns, and predicts no boundaries.
  assert 8.1 > bits[0] > bits[-1] == run["held_out"]["bits_per_byte"] > 3
  assert run["curve"]["train"][-1][0] == run["steps"] * 8 * 32
  assert run["commit"]
  assert run["versions"]["jax"] == jax.__version__
  assert run["sample"]["prompt"]
  assert run["sample"]["text"]
  assert all(0 < code < 8 for code in results["baselines"].values())
  table = (smoke / "table.md").read_text()
  assert "| both-2 |" in table
  assert "lzma that has read the training text" in table
  assert (smoke / "lm.png").read_bytes().startswith(b"\x89PNG")


def test_preset_has_the_default_to_compare_with():
  for preset in ("smoke", "cpu", "full"):
    names = [row.name for row in lm_settings.setting(preset).rows]
    for name in names:
      assert f"default-{name.split('-')[-1]}" in names


def test_rows_of_one_depth_have_nearly_one_size():
  made = lm_settings.setting("cpu")
  sizes = {}
  for kind in lm_settings.KINDS:
    config = lm_settings.model_config(made, lm_settings.Row(kind, 4), 257)
    shapes = jax.eval_shape(
      lambda c=config: models.LanguageModel(c, rngs=nnx.Rngs(0))
    )
    blocks = jax.tree.leaves(shapes.blocks)
    sizes[kind] = sum(leaf.size for leaf in blocks)
  assert max(sizes.values()) < 1.25 * min(sizes.values()), sizes
  assert sizes["both-matched"] < sizes["both"]


def test_finished_row_is_not_run_again(smoke, monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("fit was called")

  monkeypatch.setattr(lm.training, "fit", refuse)
  arguments = lm.Arguments(out=smoke, **SMOKE)
  assert lm.main(arguments) == 0


def test_every_checkpoint_is_kept_and_loads_from_the_folder_alone(smoke):
  folder = smoke / "both-2/seed-0"
  assert lm_runs.saved_steps(folder) == (0, 4, 8, 12, 16, 20, 24)
  config, seeds, text = lm_runs.read_model(folder)
  assert seeds == (0,)
  assert config.mixers[0].polarization.ones == 1
  wanted = lm_settings.setting("smoke").text
  assert text == dataclasses.replace(wanted, max_bytes=60_000)
  first = lm_runs.load_model(folder, 0)
  fresh = models.LanguageModel(config, rngs=nnx.Rngs(0))
  assert same(first, fresh)
  steps = [lm_runs.load_model(folder, step) for step in (4, 12)]
  assert not same(first, steps[0])
  assert not same(*steps)


def test_loaded_model_has_the_bits_per_byte_of_the_result(smoke):
  folder = smoke / "both-2/seed-0"
  _, _, settings = lm_runs.read_model(folder)
  text = lm_runs.read_text(settings)
  source = data.TextSource(text.held_out, settings.length, 8)
  model = lm_runs.load_model(folder)
  again = lm_measure.held_out_metrics(model, source, training.data_mesh())
  result = json.loads((smoke / "both-2/seed-0.json").read_text())
  assert again == result["held_out"]


def test_spectra_are_recorded_from_the_initialisation_on(smoke, whole):
  path = smoke / "both-2/seed-0/spectra.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  steps = [record["step"] for record in records[::2]]
  assert steps == [0, 4, 8, 12, 16, 20, 24]
  assert {record["layer"] for record in records} == {"layer 0", "layer 1"}
  for record in records:
    assert (record["a_min"], record["a_max"]) == (0, 1)
  assert not list(whole.rglob("spectra.jsonl"))


@pytest.mark.nightly
def test_run_that_crashes_goes_on_to_the_same_bits(
  whole, tmp_path, monkeypatch
):
  arguments = lm.Arguments(preset="smoke", out=tmp_path, **SMALL)
  measure, calls = lm_measure.held_out_metrics, []

  def crash(*args):
    calls.append(0)
    if len(calls) == 2:  # after the first checkpoint, before the second
      raise MemoryError
    return measure(*args)

  monkeypatch.setattr(lm_measure, "held_out_metrics", crash)
  with pytest.raises(MemoryError):
    lm.main(arguments)
  folders = [out / "attention-1/seed-0" for out in (whole, tmp_path)]
  assert lm_runs.saved_steps(folders[1]) == (0, 4)
  monkeypatch.undo()
  assert lm.main(arguments) == 0
  assert same(*map(lm_runs.load_model, folders))
  lines = [training.read_metrics(f, wall_clock=False) for f in folders]
  assert lines[0] == lines[1]
  files = [out / "attention-1/seed-0.json" for out in (whole, tmp_path)]
  results = [json.loads(path.read_text()) for path in files]
  for result in results:
    del result["tokens_per_second"]
  assert results[0] == results[1]


def test_run_stopped_by_minutes_is_reported_as_unfinished(tmp_path, capsys):
  arguments = lm.Arguments(preset="smoke", out=tmp_path, minutes=1e-9, **SMALL)
  assert lm.main(arguments) == 75
  assert "same command goes on" in capsys.readouterr().out


def test_folder_with_another_text_is_refused(whole, tmp_path):
  for name in ("one.txt", "two.txt"):
    (tmp_path / name).write_bytes(name.encode() * 500)
  arguments = lm.Arguments(preset="smoke", out=whole, data=tmp_path, **SMALL)
  with pytest.raises(SystemExit, match=r"(?s)another configuration:.*corpus"):
    lm.main(arguments)


def write_tokenizer(folder):
  tokenizers = pytest.importorskip("tokenizers")
  words = {"<|endoftext|>": 0, "<unk>": 1, "of": 2, "a": 3, " ": 4}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token="<unk>")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


def test_tokenizer_makes_the_tokens_and_bytes_stay_bytes(tmp_path):
  path = write_tokenizer(tmp_path)
  (tmp_path / "text.txt").write_text(
    "\n<|endoftext|>\n".join(f"a {word} of a" * 20 for word in "xyzw")
  )
  made = lm_settings.setting(
    "smoke", text={"data": str(tmp_path), "tokenizer": str(path)}
  )
  text = lm_runs.read_text(made.text)
  assert text.train.vocab_size == 5
  size = sum(map(len, text.train_documents))
  assert text.train.num_bytes == size > 2 * len(text.train.tokens)


def test_bad_input_is_refused_with_what_was_expected(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "none.txt").touch()
  (tmp_path / "short.txt").write_text("ab\n<|endoftext|>\ncd")
  (tmp_path / "one.txt").write_text("all of it one document" * 99)
  (tmp_path / "packed.gz").write_bytes(b"not gzip")
  for arguments, error in (
    ({"data": tmp_path / "nowhere"}, "there is no .*nowhere"),
    ({"data": tmp_path / "empty"}, "has no file that ends in .txt"),
    ({"data": tmp_path / "none.txt"}, "hold no text, expected at least one"),
    ({"data": tmp_path / "short.txt"}, "fills 1 rows.*batch_size=8"),
    ({"data": tmp_path / "one.txt"}, "different content, expected at least 2"),
    ({"data": tmp_path / "packed.gz"}, "cannot be unpacked"),
    ({"tokenizer": tmp_path / "one.txt"}, "tokenizers is not|as a tokenizer"),
    ({"rows": ("two-2",)}, "'two-2', expected <kind>-<layers>.*both-matched"),
    ({"rows": ("both-0",)}, "'both-0'"),
    ({"rows": ("both",)}, "'both'"),
    ({"rows": ()}, "rows has no name"),
    ({"seeds": ()}, "seeds is"),
    ({"steps": 1}, "steps is 1"),
    ({"width": 0}, "width is 0, expected 1 or more"),
    ({"length": 0}, "length is 0"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0, expected above 0"),
    ({"max_bytes": 0}, "max_bytes is 0"),
    ({"validation": 1.5}, "validation=1.5"),
    ({"batch_size": 10_000}, "expected at least batch_size=10000"),
    ({"batch_size": 12, **SMALL}, "12 examples does not divide among 8"),
  ):
    with pytest.raises(SystemExit, match=rf"^lm: (?s:.*)({error})"):
      lm.main(lm.Arguments(preset="smoke", out=tmp_path / "out", **arguments))


def test_text_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_text("text")

  def forbid(where, path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(data.text, "read_file", forbid)
  with pytest.raises(SystemExit, match=r"^lm: .*Permission denied.*a.txt"):
    lm.main(lm.Arguments(preset="smoke", out=tmp_path, data=tmp_path))


def test_folder_that_is_no_run_is_refused_by_name(smoke, tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "empty").mkdir()
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged/model.json").write_text('{"model": {}')
  (tmp_path / "other").mkdir()
  (tmp_path / "other/model.json").write_text('{"weights": 3}')
  for folder, error in (
    (tmp_path / "nowhere", "nowhere' is not there"),
    (tmp_path / "file", "file' is a file"),
    (tmp_path / "empty", "is no run: it has no model.json"),
    (smoke, "no run itself, but .*both-2/seed-0 below it are"),
    (tmp_path / "damaged", "damaged/model.json cannot be read"),
    (tmp_path / "other", "expected the fields model, seeds and text"),
  ):
    for read in (lm_runs.read_model, lm_runs.saved_steps, lm_runs.load_model):
      with pytest.raises(ValueError, match=error):
        read(folder)


def test_step_or_seed_that_is_not_there_is_refused_with_those_that_are(smoke):
  folder = smoke / "both-2/seed-0"
  with pytest.raises(ValueError, match=r"step 5, expected one of 0, 4, 8"):
    lm_runs.load_model(folder, 5)
  with pytest.raises(ValueError, match=r"seed 7, expected one of 0\."):
    lm_runs.load_model(folder, seed=7)


def test_guessing_costs_what_a_uniform_code_costs():
  documents = (b"abcdef" * 7, b"xy")
  corpus = data.encode_documents(documents)
  config = models.ModelConfig(257, 8, 1, mixers=(models.AttentionConfig(),))
  model = models.LanguageModel(config, rngs=nnx.Rngs(0))
  model.embedding = nnx.Param(jnp.zeros_like(model.embedding[...]))
  source = data.TextSource(corpus, 10, 8)
  found = lm_measure.held_out_metrics(model, source, training.data_mesh())
  # Every byte and the two ends, however rows are cut and filled up.
  expected = math.log2(257) * (44 + 2) / 44
  assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_baselines_are_codes_of_the_held_out_text():
  noise = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
  corpus = data.encode_documents([noise])
  text = lm_runs.Text(
    data.ByteTokenizer(), corpus, corpus, (noise,), (noise[:2000],)
  )
  found = lm_measure.baselines(text)
  # Noise has no shorter code, unless one has read it before.
  assert found["lzma"] > 8
  assert found["zlib"] > 8
  assert found["lzma_after_train"] < 1
  assert 7.9 < found["unigram"] < 8.2


def test_sample_goes_on_with_the_prompt_it_is_given(whole):
  folder = whole / "attention-1/seed-0"
  model = lm_runs.load_model(folder)
  text = lm_runs.read_text(lm_runs.read_model(folder)[2])
  draw = lambda seed: lm_measure.sample(
    model, text, seed, prompt="def f", tokens=20
  )
  first = draw(0)
  assert first["prompt"] == "def f"
  assert len(first["text"]) > 0
  assert draw(0) == first != draw(1)


def row(name, values):
  kind, _, layers = name.rpartition("-")
  runs = [{"held_out": {"bits_per_byte": value}} for value in values]
  return {"row": name, "kind": kind, "layers": int(layers), "runs": runs}


def results(*rows):
  codes = {"unigram": 5.0, "lzma": 2.0, "lzma_after_train": None}
  return {"rows": list(rows), "baselines": codes}


def test_verdict_of_three_seeds_says_where_an_effect_is_seen():
  lines = lm_report.verdict(
    results(
      row("default-2", (2.50, 2.51, 2.52)),
      row("one-2", (2.40, 2.50, 2.65)),
      row("both-2", (2.25, 2.24, 2.26)),
      row("zero-2", (2.75, 2.74, 2.76)),
      row("attention-4", (1.9, 1.9, 1.9)),
    )
  )
  assert "one-2 against default-2" in lines[0]
  assert "no effect shown" in lines[0]
  assert "-0.260 ± 0.023 bits per byte (better)" in lines[1]
  assert "+0.240 ± 0.023 bits per byte (worse)" in lines[2]
  assert len(lines) == 4  # nothing to hold attention-4 against
  assert "attention-4 with 1.900 bits per byte, 3.10 fewer" in lines[3]
  assert "0.10 fewer than lzma (2.00)." in lines[3]


def test_verdict_of_single_seeds_claims_nothing():
  lines = lm_report.verdict(
    results(row("default-2", (2.5,)), row("both-2", (2.25,)))
  )
  text = "\n".join(lines)
  assert "-0.250 bits per byte" in text
  assert "not an effect, neither its size nor its sign" in text
  assert "better" not in text


def same(left, right):
  leaves = [jax.tree.leaves(model) for model in (left, right)]
  return all(map(np.array_equal, *leaves))
