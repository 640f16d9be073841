"""Secrets stay out of dumps, logs and error lines. Standard library only.

A secret is recognised three ways: by the name of the config key that holds it, by being the value of an environment
variable with such a name, and by a form that services give their keys (or a password inside an address).
"""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
_WORD = r"(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?)"
_KEY = re.compile(rf"(?:^|[_.-]){_WORD}$", re.IGNORECASE)  # hf_token yes; max_new_tokens, tokenizer no
_VARIABLE = re.compile(rf"(?:^|_){_WORD}(?:_|$)", re.IGNORECASE)  # AWS_SECRET_ACCESS_KEY yes; TOKENIZERS_PARALLELISM no
_FORM = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}")
_ADDRESS = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_MIN_LENGTH = 8  # a shorter value would blot out ordinary words


def is_secret_name(name: str) -> bool:
    """Whether a config key of this name holds a secret."""
    return bool(_KEY.search(name))


def redact_text(text: str) -> str:
    """text with every secret that it carries replaced by ***."""
    values = {v for k, v in os.environ.items() if len(v) >= _MIN_LENGTH and _VARIABLE.search(k)}
    for value in sorted(values, key=len, reverse=True):  # a secret may contain another
        text = text.replace(value, MASK)
    return _ADDRESS.sub(f"://{MASK}@", _FORM.sub(MASK, text))


def redact(tree: Any) -> Any:
    """A copy of nested dicts, lists and tuples with the secret strings in it replaced by ***."""
    if isinstance(tree, str):
        return redact_text(tree)
    if isinstance(tree, dict):
        return {k: MASK if isinstance(v, str) and v and is_secret_name(str(k)) else redact(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(redact(v) for v in tree)
    return tree
