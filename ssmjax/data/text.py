"""Text as documents: from files, from folders, and split by document.

A document is its bytes: nothing is decoded, normalised or joined here, so that
bits per byte are bits per byte of what is on disk. `encode_documents` makes
tokens of them, `TextSource` rows of a fixed length, `text_dataset` a pipeline.
"""

import bz2
import gzip
import hashlib
import lzma
import math
import os
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from ssmjax.data.recall import as_uint32

# What a folder is searched for, also with one of the endings below.
SUFFIXES = (".txt", ".md", ".rst", ".py")

type Path = str | os.PathLike[str]


def read_documents(
  *paths: Path,
  separator: str | None = "<|endoftext|>",
  suffixes: Sequence[str] = SUFFIXES,
) -> tuple[bytes, ...]:
  """Read files and folders as documents, a file being one or several.

  The files of a folder and below it come in the order of their paths, those
  that start with a dot are left out; links to folders are not followed. A
  file that is named itself is read whatever it is called. Files that end in
  .xz, .gz or .bz2 are unpacked. Documents without a byte are left out.

  Without paths: the sources of Python's standard library, some 8 MB of one
  document per module, which every machine has. What distributions leave out
  or install apart (tests, site-packages, Tk, IDLE, lib2to3, ensurepip) is not
  among them, nor is what a build generates; they differ between versions of
  Python, which `TextCorpus.fingerprint` tells.

  Args:
    *paths: files and folders.
    separator: a line that holds nothing else ends a document; "" takes empty
      lines, None makes every file one document.
    suffixes: endings of the files that are taken from folders.

  Returns:
    The documents, none empty.

  Raises:
    FileNotFoundError: if there is no such file or folder.
    ValueError: if nothing is found, or a packed file is damaged.

  >>> len(read_documents()) > 100
  True
  """
  if isinstance(suffixes, str) or not all(s.startswith(".") for s in suffixes):
    raise ValueError(
      f"read_documents: suffixes={suffixes!r}, expected several endings with "
      "their dots, as in ('.txt', '.md')."
    )
  if separator is not None and re.search("[\r\n]", separator):
    raise ValueError(
      f"read_documents: separator={separator!r} has a line end, expected the "
      "text of one line."
    )
  files = [
    file for path in paths for file in _files(pathlib.Path(path), suffixes)
  ]
  documents: list[bytes] = []
  for file in files if paths else _standard_library():
    text = read_file("read_documents", file)
    documents += [text] if separator is None else _split(text, separator)
  documents = [document for document in documents if document]
  if not documents:
    raise ValueError(
      f"read_documents: {len(files)} files of {', '.join(map(str, paths))} "
      "hold no text, expected at least one byte. Give other paths."
    )
  return tuple(documents)


def split_documents(
  documents: Sequence[bytes], validation: float = 0.05, seed: int = 0
) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
  """Split documents in two, none of which has a document of the other.

  Documents are drawn in an order that only their content and the seed set,
  until the next one would bring their bytes over the share that is asked for;
  one is always drawn and one always left. Copies of a document are on one
  side, all of them. Both sides keep the order that was given.

  Args:
    documents: at least two different ones.
    validation: share of the bytes, in (0, 1).
    seed: integer in [0, 2³²).

  Returns:
    The training and the validation documents.

  Raises:
    ValueError: if the share is not in (0, 1) or there is nothing to split.

  >>> split_documents([b"one", b"two", b"one"], validation=0.3)
  ((b'one', b'one'), (b'two',))
  """
  check_documents("split_documents", documents)
  if not 0 < validation < 1:
    raise ValueError(
      f"split_documents: validation={validation}, expected a share of the "
      "bytes between 0 and 1, as 0.05."
    )
  key = int(as_uint32("split_documents", "seed", seed)).to_bytes(4, "little")
  names = [hashlib.blake2b(d, key=key).digest() for d in documents]
  sizes = dict.fromkeys(names, 0)
  for name, document in zip(names, documents, strict=True):
    sizes[name] += len(document)
  if len(sizes) < 2:
    raise ValueError(
      f"split_documents: {len(documents)} documents with {len(sizes)} "
      "different content, expected at least 2. Read the text with another "
      "separator, or validate on another file."
    )
  most = math.floor(validation * sum(sizes.values()))
  drawn: set[bytes] = set()
  for name in sorted(sizes)[:-1]:
    most -= sizes[name]
    if drawn and most < 0:
      break
    drawn.add(name)
  sides: tuple[list[bytes], list[bytes]] = ([], [])
  for name, document in zip(names, documents, strict=True):
    sides[name in drawn].append(document)
  return tuple(sides[0]), tuple(sides[1])


def read_file(where: str, path: pathlib.Path) -> bytes:
  """Read a file, unpacked if its ending says that it is packed."""
  opened = _PACKED.get(path.suffix.lower(), open)
  try:
    with opened(path, "rb") as file:
      return file.read()
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{where}: there is no {str(path)!r}, expected a file."
    ) from None
  except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
    raise _damaged(where, path, error) from error
  except OSError as error:
    # bz2 has no exception of its own; one of the system's has a number.
    if error.errno is not None:
      raise
    raise _damaged(where, path, error) from error


def check_documents(where: str, documents: Sequence[bytes]) -> None:
  """Refuse what is no sequence of bytes."""
  if isinstance(documents, bytes | str):
    raise ValueError(
      f"{where}: documents is one {type(documents).__name__}, expected a "
      "sequence of bytes. Put it in a list."
    )
  if isinstance(documents, Iterator):
    # To look at them would use them up.
    raise ValueError(
      f"{where}: documents is a {type(documents).__name__}, expected a "
      "sequence of bytes. Pass list(documents)."
    )
  for number, document in enumerate(documents):
    if not isinstance(document, bytes):
      raise ValueError(
        f"{where}: document {number} is a {type(document).__name__}, expected "
        "bytes. Read it with read_documents, or encode it: text.encode()."
      )


_PACKED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}

# Folders of the standard library's path that are not on every machine, or not
# of the standard library.
_APART = {
  *("site-packages", "dist-packages", "test", "tests", "idle_test"),
  *("idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip"),
}


def _standard_library() -> list[pathlib.Path]:
  top = pathlib.Path(sysconfig.get_path("stdlib"))
  files = _walk(top, (".py",), _APART) if top.is_dir() else []
  # Generated at build time, with the paths of the machine that built it.
  files = [file for file in files if not file.name.startswith("_sysconfigdata")]
  if not files:
    raise ValueError(
      f"read_documents: {top}, the standard library of this Python, has no "
      "sources, expected .py files. Give a path to some text."
    )
  return files


def _files(path: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
  """The files that a path stands for."""
  if not path.is_dir():
    return [path]
  files = _walk(path, suffixes, frozenset())
  if not files:
    raise ValueError(
      f"read_documents: the folder {str(path)!r} has no file that ends in "
      f"{', '.join(suffixes)} (or these and {', '.join(_PACKED)}). Give its "
      "files themselves, or their endings as suffixes=."
    )
  return files


def _walk(top: pathlib.Path, suffixes, without) -> list[pathlib.Path]:
  found = []
  for folder, folders, names in os.walk(top):
    folders[:] = [n for n in folders if n not in without and n[0] != "."]
    for name in names:
      bare = pathlib.PurePath(name)
      if bare.suffix.lower() in _PACKED:
        bare = bare.with_suffix("")
      if name[0] != "." and bare.suffix.lower() in suffixes:
        found.append(pathlib.Path(folder, name))
  # By parts, which sort alike on systems with other path separators.
  return sorted(found, key=lambda file: file.relative_to(top).parts)


def _split(text: bytes, separator: str) -> list[bytes]:
  line = re.escape(separator.encode()) + rb"\r?(?:\n|\Z)"
  return re.split(rb"(?m)^" + line, text)


def _damaged(where: str, path: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(
    f"{where}: {str(path)!r} cannot be unpacked ({error}), expected a whole "
    f"{path.suffix} file. Fetch it again, or unpack it by hand."
  )
