"""What every reader of tokenizers gives: see tokenizer_files.py and sentencepiece_file.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxpost.errors import CheckpointError, ConfigError, DataError


@dataclasses.dataclass
class TokenizerParts:
    """What a file says: a `tokenizers.Tokenizer`, special tokens by name, templates by name, extra stop ids."""

    backend: Any
    specials: dict[str, str]
    templates: dict[str, str] = dataclasses.field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    check: Callable[[str], None] | None = None  # raises DataError for text that backend would encode otherwise


@contextlib.contextmanager
def tokenizers_errors(what: str) -> Iterator[None]:
    """Whatever reading foreign files raises becomes DataError(what: ..): the tokenizers library raises bare Exception
    and, where its Rust code gives up, a panic that is no Exception at all."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise DataError(f"{what}: {error}") from None
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {type(error).__name__}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a terminal."""
    return " ".join(str(error).split())[:300]


def add_bos(backend: Any, token: str) -> None:
    """Makes plain text begin with token, as a post-processor does."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, backend.token_to_id(token))]
    )


def byte_tokens(backend: Any, vocab: Mapping[str, int]) -> dict[int, int]:
    """Id -> byte of the 256 byte tokens, if the decoder joins them to UTF-8; otherwise empty."""
    if backend.decoder is None or b'"ByteFallback"' not in backend.decoder.__getstate__():
        return {}
    ids = {vocab.get(f"<0x{value:02X}>"): value for value in range(256)}
    return {} if None in ids else ids


def mend_bytes(ids: list[int], values: Mapping[int, int]) -> list[int]:
    """ids with each byte token that is no UTF-8 where it stands replaced by those of U+FFFD.

    The library would give up the whole run: a text cut inside of a character would lose those before it too.
    """
    if not any(index in values for index in ids):
        return ids
    index_of = {value: index for index, value in values.items()}
    mended: list[int] = []
    for is_byte, run in itertools.groupby(ids, lambda index: index in values):
        run = list(run)
        if is_byte:
            raw, text = bytes(values[index] for index in run), ""
            while raw:
                try:
                    raw, text = b"", text + raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raw, text = raw[error.start + 1 :], text + raw[: error.start].decode("utf-8") + "\ufffd"
            run = [index_of[value] for value in text.encode("utf-8")]
        mended += run
    return mended
