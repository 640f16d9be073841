"""Reads a sentencepiece FILE.model into a `tokenizers.Tokenizer` that gives sentencepiece's own ids and text.

Two differences are meant, both as in transformers: control symbols written in a text become their ids (chat templates
write them), and what follows one goes on without a dummy prefix; a user-defined symbol at the very start takes none.
Models and texts that cannot be exact are refused: see _check_supported and _charsmap_check. (Kudo and Richardson,
arXiv:1808.06226.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpost.data.tokenizer_parts import TokenizerParts, add_bos, one_line, tokenizers_errors
from jaxpost.errors import DataError

SPACE = "\u2581"  # how sentencepiece writes a space in its pieces
MAX_BYTES = 64 << 20  # the largest public models have 5 MB
MAX_PIECES = 1 << 20
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def read_sentencepiece(file: Path) -> TokenizerParts:
    """A BPE or unigram model. Raises DataError where it is damaged or cannot be read exactly."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    proto = _parse(file)
    kinds = type(proto.pieces[0]).Type
    _check_supported(proto, kinds, file)
    backend = Backend(_model(proto, kinds))
    _text_steps(backend, proto, file)
    for piece in proto.pieces:
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            backend.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == kinds.USER_DEFINED:
            # normalized: the text on both sides is then normalised as one, as sentencepiece does
            backend.add_tokens([AddedToken(piece.piece, normalized=True)])
    trainer = proto.trainer_spec
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == kinds.UNKNOWN)
    ids = {"bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id, "unk": unknown}
    specials = {f"{name}_token": proto.pieces[i].piece for name, i in ids.items() if i >= 0}
    if "bos_token" in specials:
        add_bos(backend, specials["bos_token"])  # sentencepiece models are used with BOS in front of plain text
    check = _charsmap_check(proto, file) if proto.normalizer_spec.precompiled_charsmap else None
    return TokenizerParts(backend, specials, check=check)


def _parse(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    size = file.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{file}: {size} bytes, more than a sentencepiece model has ({MAX_BYTES})")
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, RuntimeError, ValueError) as error:
        raise DataError(f"{file}: not a sentencepiece model: {one_line(error)}") from None
    if not 0 < len(proto.pieces) <= MAX_PIECES:
        raise DataError(f"{file}: not a sentencepiece model: it has {len(proto.pieces)} pieces")
    return proto


def _check_supported(proto: Any, kinds: Any, file: Path) -> None:
    """Raises DataError for what is damaged, and for what the tokenizers library cannot do as sentencepiece does it."""
    trainer, spec, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces

    def refuse(reason: str) -> DataError:
        return DataError(f"{file}: {reason}")

    if trainer.model_type not in (trainer.ModelType.UNIGRAM, trainer.ModelType.BPE):
        raise refuse("only BPE and unigram sentencepiece models are supported")
    if trainer.treat_whitespace_as_suffix:
        raise refuse("sentencepiece's treat_whitespace_as_suffix is not supported")
    if not spec.escape_whitespaces:
        raise refuse("sentencepiece's escape_whitespaces=false is not supported")
    if proto.denormalizer_spec.precompiled_charsmap:
        raise refuse("sentencepiece's denormalizer is not supported")
    if len({piece.piece for piece in pieces}) < len(pieces) or not all(piece.piece for piece in pieces):
        raise refuse("damaged: a piece is empty or appears twice")
    if not all(math.isfinite(piece.score) for piece in pieces):
        raise refuse("damaged: a score is not a finite number")
    if sum(piece.type == kinds.UNKNOWN for piece in pieces) != 1:
        raise refuse("damaged: there must be one piece for unknown text")
    if any(piece.type == kinds.UNUSED for piece in pieces):
        raise refuse("unused pieces are not supported")
    for name in ("bos_id", "eos_id", "pad_id"):
        index = getattr(trainer, name)
        if index >= len(pieces) or (index >= 0 and pieces[index].type in (kinds.NORMAL, kinds.BYTE)):
            raise refuse(f"damaged: {name} {index} is no control symbol of its {len(pieces)} pieces")
    byte_pieces = [piece.piece for piece in pieces if piece.type == kinds.BYTE]
    wanted = [f"<0x{value:02X}>" for value in range(256)] if trainer.byte_fallback else []
    if sorted(byte_pieces) != wanted:
        raise refuse(f"damaged: {len(byte_pieces)} byte pieces, expected {len(wanted)}")
    merges = trainer.model_type == trainer.ModelType.BPE
    characters = {piece.piece for piece in pieces if piece.type == kinds.NORMAL and len(piece.piece) == 1}
    for piece in pieces:
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN) and {" ", SPACE} & {*piece.piece}:
            raise refuse(f"the control symbol {piece.piece[:50]!r} holds white space")
        if piece.type == kinds.NORMAL and wanted and "<0" in piece.piece:
            raise refuse(f"the piece {piece.piece[:50]!r} cannot be told from a byte piece")
        if piece.type == kinds.NORMAL and merges and not characters >= {*piece.piece}:
            raise refuse(f"damaged: {piece.piece[:50]!r} holds a character that is no piece")
        if piece.type not in (kinds.USER_DEFINED, kinds.CONTROL, kinds.NORMAL, kinds.BYTE, kinds.UNKNOWN):
            raise refuse(f"damaged: {piece.piece[:50]!r} has the unknown type {piece.type}")


def _model(proto: Any, kinds: Any) -> Any:
    from tokenizers import models

    trainer, pieces = proto.trainer_spec, proto.pieces
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN)
    if trainer.model_type == trainer.ModelType.UNIGRAM:
        # The shortest decimals of the float32 scores: they survive tokenizer.json exactly.
        scored = [(piece.piece, float(str(np.float32(piece.score)))) for piece in pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    return models.BPE(
        {piece.piece: i for i, piece in enumerate(pieces)},
        bpe_merges([(p.piece, p.score) for p in pieces if p.type == kinds.NORMAL]),
        unk_token=pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _text_steps(backend: Any, proto: Any, file: Path) -> None:
    """Normaliser, pre-tokenizer and decoder.

    A dummy prefix is put before every text, " a" too, unless extra white space is removed: then a text that begins
    with spaces keeps one of them as its prefix. Metaspace never doubles its own character, so the first one works with
    a plain space, and in the former case no plain space is left when it runs.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    prefix, trims = spec.add_dummy_prefix, spec.remove_extra_whitespaces
    steps = [_charsmap(spec.precompiled_charsmap, file)] if spec.precompiled_charsmap else []
    if _joins_lines(proto, file):
        steps.insert(0, normalizers.Replace("\r\n", "\n"))
    if trims:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), "")]
        steps += [] if prefix else [normalizers.Replace(Regex(r"\A +"), "")]
    else:
        steps += [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence(steps)
    first = [pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)] if prefix else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)]
    )
    if trainer.byte_fallback and trainer.model_type == trainer.ModelType.UNIGRAM:
        # "<0x41>" in a text is six characters; no piece crosses this cut, see _check_supported.
        cut = pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")
        backend.pre_tokenizer = pre_tokenizers.Sequence([backend.pre_tokenizer, cut])
    leading = 1 << 20 if trims else 1 if prefix else 0
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", leading, 0)]
    )
    for piece in proto.pieces:
        if piece.type == type(piece).Type.USER_DEFINED:
            _check_symbol(backend, piece.piece, prefix, file)


def _check_symbol(backend: Any, symbol: str, prefix: bool, file: Path) -> None:
    """A user-defined symbol is cut out of normalised text, so it must be normal itself."""
    if backend.normalizer.normalize_str(symbol) != symbol or " " in symbol or (prefix and symbol.startswith(SPACE)):
        raise DataError(f"{file}: the user-defined symbol {symbol[:50]!r} is changed by the model's own normaliser")


def _charsmap(blob: bytes, file: Path) -> Any:
    from tokenizers import normalizers

    with tokenizers_errors(f"{file}: damaged character map"):
        return normalizers.Precompiled(blob)


def _joins_lines(proto: Any, file: Path) -> bool:
    """Whether CR LF ends as one space. The character map does not know the two as one cluster, so LF stands for it."""
    spec = proto.normalizer_spec
    return bool(spec.precompiled_charsmap) and spec.remove_extra_whitespaces and _theirs(proto, file)("\r\n") == "  "


def _theirs(proto: Any, file: Path) -> Callable[[str], str]:
    """sentencepiece's own character map, white space left alone."""
    from sentencepiece import SentencePieceNormalizer

    plain = {"add_dummy_prefix": False, "escape_whitespaces": False, "remove_extra_whitespaces": False}
    try:
        return SentencePieceNormalizer(model_proto=proto.SerializeToString(), **plain).normalize
    except RuntimeError as error:
        raise DataError(f"{file}: damaged character map: {one_line(error)}") from None


def _charsmap_check(proto: Any, file: Path) -> Callable[[str], None]:
    """check(text) raises DataError where the character map gives other text here than in sentencepiece.

    tokenizers looks up whole grapheme clusters, sentencepiece the longest match: they differ for rare sequences, such
    as a letter with two accents of which the map knows one. And a control symbol made by the map (of full-width
    letters, say) would become its id here.
    """
    theirs, joins = _theirs(proto, file), _joins_lines(proto, file)
    ours = _charsmap(proto.normalizer_spec.precompiled_charsmap, file)
    kinds = type(proto.pieces[0]).Type
    symbols = [piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]

    def check(text: str) -> None:
        text = text.replace("\r\n", "\n") if joins else text
        mine = ours.normalize_str(text)
        if made := next((symbol for symbol in symbols if mine.count(symbol) > text.count(symbol)), None):
            raise DataError(f"{file}: this text becomes the control symbol {made[:50]!r} by the model's own normaliser")
        if (want := theirs(text)) != mine:
            at = next((i for i, (a, b) in enumerate(zip(mine, want)) if a != b), min(len(mine), len(want)))
            raise DataError(
                f"{file}: this text cannot be encoded as sentencepiece does: near {want[max(0, at - 10) : at + 10]!r} "
                "its character map meets combined characters; normalise the text first (NFKC)"
            )

    return check


def bpe_merges(scored: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """The merge list of a BPE known only by its pieces and scores: every split into two pieces, best result first."""
    ids = {piece: i for i, (piece, _) in enumerate(scored)}
    merges = []
    for piece, score in scored:
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in ids and piece[k:] in ids]
        splits.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(score, pair) for pair in splits]
    merges.sort(key=lambda item: item[0], reverse=True)  # stable: equal scores keep the order of the pieces
    return [pair for _, pair in merges]
