"""Tokens of documents, and the bytes of text that each stands for."""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ssmjax.data.text import check_documents, read_file


class Tokenizer(Protocol):
  """What `encode_documents` needs, and a sampler to show its text.

  Attributes:
    vocab_size: V, one more than the largest id.
    boundary: the id that stands at both ends of every document; no document
      holds it.
  """

  vocab_size: int
  boundary: int

  def encode(self, documents: Any) -> Any:
    """Encode documents, or one text.

    Args:
      documents: a sequence of bytes; or a `str`.

    Returns:
      An iterator of (ids, bytes of each) of every document, None if all are 1;
      of a text its ids, `[N]` int32, without boundaries.
    """

  def decode(self, ids: Iterable[int]) -> str:
    """Give the text, with � for bytes that are no UTF-8; no boundaries."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """Take every byte as its own token: ids 0 … 255, and 256 the boundary.

  >>> ByteTokenizer().encode("hi")
  array([104, 105], dtype=int32)
  >>> ByteTokenizer().decode([256, 104, 105, 256])
  'hi'
  """

  vocab_size = 257
  boundary = 256

  @typing.overload
  def encode(self, documents: str) -> np.ndarray: ...

  @typing.overload
  def encode(
    self, documents: Sequence[bytes]
  ) -> Iterator[tuple[np.ndarray, None]]: ...

  def encode(self, documents):
    """Encode documents, or one text.

    Args:
      documents: a sequence of bytes, not one alone; or a `str`.

    Returns:
      An iterator of (ids, None) of every document; of a text its ids, `[N]`
      int32, without boundaries.

    Raises:
      ValueError: if a document is not bytes.
    """
    if isinstance(documents, str):
      return np.frombuffer(documents.encode(), np.uint8).astype(np.int32)
    check_documents("ByteTokenizer.encode", documents)
    return ((np.frombuffer(item, np.uint8), None) for item in documents)

  def decode(self, ids: Iterable[int]) -> str:
    """Give the text, with � for bytes that are no UTF-8; no boundaries."""
    ids = [int(i) for i in ids if i != self.boundary]
    wrong = [i for i in ids if not 0 <= i < 256]
    if wrong:
      raise ValueError(
        f"ByteTokenizer.decode: id {wrong[0]}, expected 0 to {self.boundary}."
      )
    return bytes(ids).decode(errors="replace")


class FileTokenizer:
  """Take the tokens of a `tokenizer.json`, as published checkpoints have it.

  A file's truncation and padding are switched off and special tokens that are
  written in a text are taken as its letters, so that all text and only text
  is encoded. A token's bytes are those from the end of the token before it to
  its own end; where several tokens make one character the first has them all,
  and what follows the last token (a tokenizer may strip spaces) is counted at
  the boundary: the sum is the document's size, always.

  Args:
    path: the file, also as .gz, .xz or .bz2.
    boundary: the token that stands at both ends of a document.

  Raises:
    ImportError: if `tokenizers` is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if it holds no tokenizer, or not that token.
  """

  def __init__(
    self, path: str | os.PathLike[str], boundary: str = "<|endoftext|>"
  ):
    try:
      import tokenizers
    except ImportError as error:
      raise ImportError(
        "FileTokenizer: tokenizers is not installed. `pip install "
        "'ssmjax[interop]'`, or use ByteTokenizer, which does without it."
      ) from error
    content = read_file("FileTokenizer", pathlib.Path(path))
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises no narrower type
      raise ValueError(
        f"FileTokenizer: {str(path)!r} cannot be read as a tokenizer "
        f"({error}), expected a tokenizer.json of the tokenizers library."
      ) from error
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._tokenizer.encode_special_tokens = True
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if boundary not in vocabulary:
      added = self._tokenizer.get_added_tokens_decoder().values()
      special = [token.content for token in added if token.special]
      raise ValueError(
        f"FileTokenizer: {str(path)!r} has no token boundary={boundary!r}, "
        f"expected one of its special tokens: {special[:20]}."
      )
    self.vocab_size = max(vocabulary.values()) + 1
    self.boundary = vocabulary[boundary]

  @typing.overload
  def encode(self, documents: str) -> np.ndarray: ...

  @typing.overload
  def encode(
    self, documents: Sequence[bytes]
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...

  def encode(self, documents):
    """Encode documents, or one text.

    Args:
      documents: a sequence of bytes, not one alone; or a `str`.

    Returns:
      An iterator of (ids, bytes of each) of every document, int64; of a text
      its ids, `[N]` int32, without boundaries.

    Raises:
      ValueError: if a document is not bytes; while iterating, if it is not
        UTF-8, or holds the boundary's id.
    """
    if isinstance(documents, str):
      ((ids, _),) = self._encode([documents.encode()])
      return ids.astype(np.int32)
    check_documents("FileTokenizer.encode", documents)
    return self._encode(documents)

  def _encode(self, documents):
    numbered = list(enumerate(documents))
    for some in itertools.batched(numbered, _AT_ONCE):
      texts = [_text(number, document) for number, document in some]
      # Special tokens of a template would be tokens without text.
      encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
      for (number, _), text, encoding in zip(
        some, texts, encodings, strict=True
      ):
        ids = np.array(encoding.ids, np.int64)
        if (ids == self.boundary).any():
          raise ValueError(
            f"FileTokenizer: document {number} holds the boundary's id "
            f"{self.boundary}, expected it at its ends only. Take another "
            "boundary, or take it out of the text."
          )
        yield ids, _token_bytes(text, encoding.offsets)

  def decode(self, ids: Iterable[int]) -> str:
    """Give the text, with � for bytes that are no UTF-8; no boundaries."""
    ids = [int(i) for i in ids if i != self.boundary]
    return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TextCorpus:
  """Hold the tokens of all documents, end to end.

  Attributes:
    tokens: `[N]`, without boundaries, of the smallest unsigned type.
    token_bytes: `[N]`, the bytes of text of each; None if all are 1.
    lengths: `[n]` int64, tokens of each document.
    sizes: `[n]` int64, bytes of each document.
    tails: `[n]` int64, those of them that no token has.
    vocab_size: V of the tokenizer.
    boundary: the id at both ends of a document.
  """

  tokens: np.ndarray
  token_bytes: np.ndarray | None
  lengths: np.ndarray
  sizes: np.ndarray
  tails: np.ndarray
  vocab_size: int
  boundary: int

  @property
  def num_bytes(self) -> int:
    """Bytes of text of all documents."""
    return int(self.sizes.sum())

  @property
  def bytes_per_token(self) -> float:
    """Mean bytes of a token, boundaries not counted."""
    return self.num_bytes / len(self.tokens)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of all that the corpus holds, in hexadecimal."""
    digest = hashlib.sha256(f"{self.vocab_size} {self.boundary} ".encode())
    for array in (self.lengths, self.sizes, self.tokens, self.token_bytes):
      if array is not None:
        little = array.dtype.newbyteorder("<")
        digest.update(np.ascontiguousarray(array, little).data)
    return digest.hexdigest()

  def __repr__(self) -> str:
    return (
      f"TextCorpus(documents={len(self.lengths)}, bytes={self.num_bytes}, "
      f"tokens={len(self.tokens)}, vocab_size={self.vocab_size}, "
      f"fingerprint={self.fingerprint[:16]!r})"
    )


def encode_documents(
  documents: Sequence[bytes], tokenizer: Tokenizer | None = None
) -> TextCorpus:
  """Make tokens of documents.

  Args:
    documents: bytes each, as `read_documents` gives them.
    tokenizer: bytes by default.

  Returns:
    A `TextCorpus`; its memory is N tokens in the smallest type, and as much
    again for their bytes if tokens are not bytes.

  Raises:
    ValueError: if a document is not bytes, or there is no token at all.

  >>> encode_documents([b"ab", b"c"]).tokens
  array([97, 98, 99], dtype=uint8)
  """
  check_documents("encode_documents", documents)
  tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
  # The boundary is in no document: bytes fit in one byte.
  largest = 255 if tokenizer == ByteTokenizer() else tokenizer.vocab_size - 1
  kind = np.min_scalar_type(largest)
  ids: list[np.ndarray] = []
  parts: list[np.ndarray] = []
  tails: list[int] = []
  single = True
  for document, (tokens, widths) in zip(
    documents, tokenizer.encode(documents), strict=True
  ):
    single = single and widths is None
    if widths is None:
      widths = np.broadcast_to(np.uint8(1), tokens.shape)
    ids.append(tokens.astype(kind, copy=False))
    widest = np.min_scalar_type(int(widths.max(initial=0)))
    parts.append(widths.astype(widest, copy=False))
    tails.append(len(document) - int(widths.sum(dtype=np.int64)))
  lengths = [len(tokens) for tokens in ids]
  if not sum(lengths):
    raise ValueError(
      f"encode_documents: {len(documents)} documents without a token, expected "
      "at least one."
    )
  return TextCorpus(
    tokens=np.concatenate(ids),
    token_bytes=None if single else np.concatenate(parts),
    lengths=np.array(lengths, np.int64),
    sizes=np.array([len(document) for document in documents], np.int64),
    tails=np.array(tails, np.int64),
    vocab_size=tokenizer.vocab_size,
    boundary=tokenizer.boundary,
  )


# Documents that are encoded in one call, by as many threads as there are.
_AT_ONCE = 16


def _text(number: int, document: bytes) -> str:
  try:
    return document.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"FileTokenizer: document {number} is not UTF-8 ({error.reason} at byte "
      f"{error.start}). Leave it out, recode it, or use ByteTokenizer."
    ) from error


def _token_bytes(text: str, offsets: Any) -> np.ndarray:
  """Bytes of each token, from the characters that each covers."""
  ends = np.array(offsets, np.int64).reshape(-1, 2)[:, 1]
  if not text.isascii():
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + sum((letters >= least) for least in (0x80, 0x800, 0x10000))
    ends = np.concatenate([[0], np.cumsum(widths)])[ends]
  # A special token may be without an extent, at 0.
  ends = np.maximum.accumulate(ends)
  return np.diff(ends, prepend=0)
