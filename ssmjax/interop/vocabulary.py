"""How many tokens a checkpoint's tokenizer has."""

import json
import pathlib

__all__ = ["count_tokens"]


def count_tokens(folder: pathlib.Path) -> int | None:
  """One more than the largest id of `tokenizer.json`; None if it is not known.

  A table of embeddings may have more rows, which only pad it. A file that
  cannot be read is for `load_tokenizer` to refuse: the model is whole without.
  """
  try:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    fields = json.loads(text)
    vocabulary = fields["model"]["vocab"]
    # By token; or a list in the order of ids, as Unigram has it.
    ids = (
      vocabulary.values()
      if isinstance(vocabulary, dict)
      else range(len(vocabulary))
    )
    added = [token["id"] for token in fields.get("added_tokens") or ()]
    return max([*ids, *added]) + 1
  except _UNREADABLE:
    return None


_UNREADABLE = (
  *(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError),
)
