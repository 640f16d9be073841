"""Text and chats to ids and trainable masks. Every doubt about a mask is an error with the decoded strings."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxpost.data import masks, template
from jaxpost.data.tokenizer_files import read_parts
from jaxpost.data.tokenizer_parts import TokenizerParts, byte_tokens, mend_bytes, tokenizers_errors
from jaxpost.errors import DataError

LossOn = Literal["assistant", "last", "completion", "all"]
Messages = Sequence[Mapping[str, Any]]

MAX_VOCABULARY = 1 << 24  # a sixteenth of it is large; a damaged file may give a token any id

# End-of-turn tokens of public chat models. Folders without a generation_config.json name only the end of text; one of
# these counts as a stop token where it is a special token that the model's own template writes.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|return|>")


class _Span(NamedTuple):
    """Characters [start, end) to train on. exact: start is where generation would begin, so no token may cross it."""

    start: int
    end: int
    exact: bool


class _Encoded(NamedTuple):
    """One encoding of a whole text. Token i covers characters [starts[i], ends[i]); the first `lead` ids none."""

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    lead: int


class Tokenizer:
    """Ids of text and chats. Pickles by path; equal content has an equal fingerprint.

    pad_id may equal eos_id: nothing in jaxpost derives a mask from an id. date: ISO date for templates that write
    today's; None: today's.
    """

    def __init__(
        self,
        parts: TokenizerParts,
        source: tuple[str, str | None, str | None] | None = None,
        date: str | None = None,
    ):
        self.date = date
        self._backend = parts.backend
        self._templates = parts.templates
        self._source = source
        self._check = parts.check
        self.specials = dict(parts.specials)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        for name, token in self.specials.items():
            if token not in vocab:
                raise DataError(f"tokenizer: {name} {token[:100]!r} is not in its vocabulary")
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCABULARY:
            raise DataError(f"tokenizer: {self.vocab_size} tokens; expected 1 to {MAX_VOCABULARY}")
        self.bos_id, self.eos_id = (
            vocab[self.specials[name]] if name in self.specials else None for name in ("bos_token", "eos_token")
        )
        pad = next((self.specials[n] for n in ("pad_token", "eos_token", "unk_token") if n in self.specials), None)
        self.pad_id: int = vocab[pad] if pad is not None else 0
        added = self._backend.get_added_tokens_decoder()
        self._added = np.asarray(list(added), np.int32)
        self._bytes = byte_tokens(self._backend, vocab)
        self.stop_ids: tuple[int, ...] = self._find_stops(parts.stop_ids, added)

    def _find_stops(self, named: Sequence[int], added: Mapping[int, Any]) -> tuple[int, ...]:
        special = {t.content: i for i, t in added.items() if t.special}
        written = "".join(self._templates.values())
        turns = [special[token] for token in END_OF_TURN if token in special and token in written]
        first = [] if self.eos_id is None else [self.eos_id]
        stops = tuple(dict.fromkeys([*first, *named, *turns]))
        for index in stops:
            if not 0 <= index < self.vocab_size:
                raise DataError(f"tokenizer: stop token {index} is outside its vocabulary of {self.vocab_size}")
        for index in named:
            self.check_special("eos_token_id", index, "the configs beside it")
        return stops

    def __reduce__(self):
        if self._source is None:
            raise TypeError("a Tokenizer made from parts cannot be pickled; save it and load it by path")
        return load_tokenizer, self._source

    @property
    def chat_template(self) -> str | None:
        """The template for chats without tools."""
        return self._templates.get("default")

    @property
    def renders_tool_calls(self) -> bool:
        """Whether some template of this tokenizer ever looks at tool calls."""
        return any("tool_calls" in text for text in self._templates.values())

    @property
    def adds_bos(self) -> bool:
        """Whether plain text begins with BOS for this model."""
        with tokenizers_errors("the tokenizer's post-processor fails"):
            return self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids and templates."""
        content = [self._backend.to_str(), self._templates, self.specials, self.stop_ids]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _encode(self, text: str) -> Any:
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeError) as error:
            raise DataError(f"text that is not valid Unicode cannot be encoded: {error}") from None
        with tokenizers_errors("text that the tokenizer cannot encode"):
            if self._check is not None:
                self._check(text)
            return self._backend.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Ids of text; special tokens written in the text become their ids, none is added."""
        return self._encode(text).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; each byte that is no UTF-8 becomes U+FFFD."""
        ids = mend_bytes([int(i) for i in ids], self._bytes)
        with tokenizers_errors("ids that the tokenizer cannot decode"):
            return self._backend.decode(ids, skip_special_tokens=skip_special)

    def token(self, index: int) -> str | None:
        """The vocabulary's own spelling of one id."""
        return self._backend.id_to_token(int(index))

    def _template(self, tools: Any) -> str:
        found = self._templates.get("tool_use") if tools else None
        found = found or self._templates.get("default")
        if found is None:
            raise DataError("the tokenizer has no chat template: set model.chat_template to a .jinja file")
        return found

    def _variables(self, tools: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"documents": None, **self.specials, "tools": list(tools) if tools else tools, **variables}

    def render(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The chat as text, as transformers' apply_chat_template gives it; variables reach the template by name."""
        return template.render(
            self._template(tools),
            messages,
            self._variables(tools, variables),
            add_generation_prompt=add_generation_prompt,
            date=self.date,
        ).text

    def encode_chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        loss_on: LossOn = "assistant",
        prompt_messages: int | None = None,
        **variables: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids i32[n], trainable bool[n]) of a whole chat, encoded once, so that ids equal transformers'.

        loss_on: assistant, all assistant turns; last, the last of them; completion, everything behind the first
        prompt_messages messages (by default: behind those before the last assistant turn); all, every token.
        The first prompt_messages messages are never trained, except by all. Trained are a turn's text and its stop
        token, not the white space that a template writes behind it. Raises DataError when no token would be trained,
        the prompt is not a prefix (of the text or of the ids), BOS is doubled, or a turn does not end in a stop token.
        """
        source = self._template(tools)
        given = prompt_messages or 0
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= given]
        if loss_on in ("assistant", "last") and not turns:
            raise DataError("no trainable token: no assistant turn" + (" in the completion" if given else ""))
        if loss_on == "last":
            turns = turns[-1:]
        elif loss_on == "completion":
            turns = [given] if prompt_messages is not None else turns[-1:]
            if not turns:
                raise DataError("no trainable token: no assistant turn")
        elif loss_on == "all":
            turns = []
        ends = [len(messages) if loss_on == "completion" else turn + 1 for turn in turns]
        rendered = template.render(
            source,
            messages,
            self._variables(tools, variables),
            mark=loss_on in ("assistant", "last"),
            prefixes=[place for turn, end in zip(turns, ends) for place in ((turn, True), (end, False))],
            prefixes_with_marks=[(given, True)] if given else [],
            date=self.date,
        )
        if loss_on == "all":
            spans = [_Span(0, len(rendered.text), exact=False)]
        elif rendered.spans is not None:
            after = rendered.prefixes[0] if rendered.prefixes else 0
            spans = [_Span(a, b, exact=True) for a, b in rendered.spans if b > a >= after]
            spans = spans[-1:] if loss_on == "last" else spans
        else:
            spans = [_Span(a, b, exact=True) for a, b in zip(rendered.prefixes[::2], rendered.prefixes[1::2])]
        return self._mask(rendered.text, spans)

    def encode_pair(
        self, prompt: str, completion: str, *, loss_on: LossOn = "completion"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids i32[n], trainable bool[n]) of plain prompt + completion + EOS; only loss_on=all trains the prompt.

        BOS goes first where the model wants one. Raises DataError as encode_chat does.
        """
        ending = self.specials.get("eos_token")
        if ending is None:
            raise DataError("the tokenizer has no eos_token, which must end a completion")
        text = prompt + completion + ("" if completion.endswith(ending) else ending)
        start = 0 if loss_on == "all" else len(prompt)
        return self._mask(text, [_Span(start, len(text), exact=start > 0)], bos=self.adds_bos)

    def encode_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids i32[n], trainable bool[n]) of running text + EOS, all trained; BOS first where the model wants one."""
        return self.encode_pair("", text, loss_on="all")

    def _mask(self, text: str, spans: Sequence[_Span], *, bos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Encodes text once (behind BOS if asked) and marks the tokens of each span up to its last stop token."""
        encoding = self._encode(text)
        lead = [self.bos_id] if bos else []  # as an id: behind a written BOS some tokenizers drop the first space
        ids = np.asarray(lead + encoding.ids, np.int32)
        encoded = _Encoded(text, ids, *masks.token_spans([(0, 0)] * len(lead) + encoding.offsets), len(lead))
        trainable = np.zeros(len(ids), bool)
        if len(ids) > 1 and self.bos_id is not None and ids[0] == ids[1] == self.bos_id:
            raise DataError(f"doubled BOS: the text begins with {self.decode(ids[:6])!r}")
        for span in spans:
            first, last = masks.tokens_between(encoded.starts, encoded.ends, span.start, span.end)
            if span.exact:
                self._check_prefix(encoded, span.start, first)
            stop = masks.last_stop(ids, self.stop_ids, first, last)
            behind = text[encoded.ends[stop] if stop is not None else span.start : span.end]
            if stop is None or behind.strip():
                raise DataError(self._no_stop(ids, first, last))
            trainable[first : stop + 1] = True
        if len(trainable):
            trainable[0] = False  # nothing predicts the first token
        if not trainable.any():
            raise DataError(f"no trainable token in {self._around(ids, 0)}")
        return ids, trainable

    def _check_prefix(self, encoded: _Encoded, at: int, first: int) -> None:
        """The prompt text[:at] alone must give ids[:first], or generation would see other tokens than training."""
        text, ids, starts, ends, base = encoded
        crossing = masks.straddling(starts, ends, at)
        if crossing is not None:
            raise DataError(
                f"the prompt is not a prefix: one token covers its end and what follows, {self._around(ids, crossing)}"
            )
        # Added tokens are split off before anything else, so what stands before the last of them cannot matter.
        added = base + np.flatnonzero(np.isin(ids[base:first], self._added))
        base = int(added[-1]) if len(added) else base
        alone = np.asarray(self.encode(text[starts[base] if len(added) else 0 : at]), np.int32)
        whole = ids[base:first]
        if not np.array_equal(alone, whole):
            k = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
            raise DataError(
                f"the prompt is not a prefix: alone it is {self._around(alone, k)}, in the whole "
                f"{self._around(ids, base + k)}"
            )

    def _no_stop(self, ids: np.ndarray, first: int, last: int) -> str:
        stops = ", ".join(repr(self.token(i)) for i in self.stop_ids)
        return f"the last trained target is not a stop token ({stops}): {self._around(ids, max(first, last - 1))}"

    def _around(self, ids: np.ndarray, at: int, width: int = 8) -> str:
        """Decoded text around token `at`, that token between >> and <<."""
        low = max(0, at - width)
        left, middle, right = ids[low:at], ids[at : at + 1], ids[at + 1 : at + 1 + width]
        return repr(f"{self.decode(left)}>>{self.decode(middle)}<<{self.decode(right)}")

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, its config, the templates and the stop ids as a folder that transformers loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"), pretty=False)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),  # transformers' "no limit": the model's config knows it
            **self.specials,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        for name, text in self._templates.items():
            if name != "default":
                (folder / "additional_chat_templates").mkdir(exist_ok=True)
                (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")
        generation = {"eos_token_id": list(self.stop_ids), "pad_token_id": self.pad_id}
        if self.bos_id is not None:
            generation["bos_token_id"] = self.bos_id
        for name, value in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", self.specials),
            ("generation_config.json", generation),
        ):
            (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    def check_special(self, name: str, index: int, where: str) -> None:
        """Raises DataError if `where` gives as `name`, eos_token_id say, an id that is plain text to this tokenizer."""
        own = [self._backend.token_to_id(token) for token in self.specials.values()]
        if index in own or index in self._added:
            return
        role = name.removesuffix("_id")
        mine = self.specials.get(role)
        has = f"its own {role} is {self._backend.token_to_id(mine)}, {mine!r}" if mine else f"it names no {role}"
        token = self.token(index) if 0 <= index < self.vocab_size else None
        reads = f"outside its vocabulary of {self.vocab_size}" if token is None else f"plain text to it, {token!r}"
        raise DataError(f"tokenizer: {where}: {name} {index} is {reads}; {has}: they do not belong together")

    def check_model(self, embedding_rows: int) -> None:
        """Raises DataError if an id of this tokenizer has no row in the model's embedding."""
        if self.vocab_size > embedding_rows:
            raise DataError(
                f"the tokenizer has {self.vocab_size} tokens, the model's embedding only {embedding_rows} rows: "
                "they do not belong together"
            )


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None, date: str | None = None) -> Tokenizer:
    """Tokenizer of a Hugging Face folder, FILE.gguf, a sentencepiece FILE.model or `smollm2-135m`; read once a process.

    chat_template is the path of a .jinja file to use instead of the tokenizer's own; date as in Tokenizer. Raises
    DataError.
    """
    return _load(str(path), None if chat_template is None else str(chat_template), date)


@functools.lru_cache(maxsize=8)
def _load(path: str, chat_template: str | None, date: str | None) -> Tokenizer:
    parts = read_parts(path)
    if chat_template is not None:
        try:
            parts.templates = {"default": Path(chat_template).expanduser().read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat template {chat_template!r} cannot be read: {error}") from error
    try:
        return Tokenizer(parts, (path, chat_template, date), date)
    except DataError as error:
        raise DataError(f"tokenizer {path!r}: {str(error).removeprefix('tokenizer: ')}") from None
