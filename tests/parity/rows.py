"""Inputs that both sides of a parity test build for themselves: short conversations and LoRA starting values.

Standard library and numpy only, so the environment with torch and the one with jax can both import it.
"""

from __future__ import annotations

import random

import numpy as np

THINGS = "apple lamp river bicycle violin candle window garden ladder kettle mirror tunnel anchor blanket".split()
COLOURS = "red green yellow purple silver orange brown white".split()
ANIMALS = "otter heron badger lizard salmon beetle walrus falcon".split()
PLACES = ["Oslo", "Lima", "Cairo", "São Paulo", "Kyoto", "Zürich", "New Delhi", "Perth"]
STYLES = ["Be brief.", "Use plain words.", "You are a sailor."]


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = 10 + rng.randrange(90), 10 + rng.randrange(90)
    return f"What is {a} + {b}?", f"{a} + {b} = {a + b}"


def _list(rng: random.Random) -> tuple[str, str]:
    first = rng.randrange(len(ANIMALS))
    names = [ANIMALS[(first + i) % len(ANIMALS)] for i in range(2 + rng.randrange(4))]
    return f"Name {len(names)} animals, one a line.", "\n".join(f"- {name}" for name in names)


def _json(rng: random.Random) -> tuple[str, str]:
    thing, colour = _pick(rng, THINGS), _pick(rng, COLOURS)
    return f'Write {{"thing", "colour"}} for: the {colour} {thing}', f'{{"thing": "{thing}", "colour": "{colour}"}}'


def _story(rng: random.Random) -> tuple[str, str]:
    animal, thing, place = _pick(rng, ANIMALS), _pick(rng, THINGS), _pick(rng, PLACES)
    answer = f"Once, in {place}, a young {animal} found a {_pick(rng, COLOURS)} {thing}."
    if rng.randrange(2):
        answer += " The whole town came to look – naïve, but happy."
    return f"A story about a {animal} and a {thing} in {place}, please.", answer


def _yes(rng: random.Random) -> tuple[str, str]:
    return f"Is a {_pick(rng, THINGS)} alive?", "No."


TOPICS = (_sum, _list, _json, _story, _yes)
SHORT = (_sum, _yes)


def conversations(seed: int, count: int) -> list[dict]:
    """`count` rows {"messages": [...]}: one or two turns, most with a system line; equal on every Python."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        if rng.randrange(8):
            messages.append({"role": "system", "content": _pick(rng, STYLES)})
        for topics in (SHORT, TOPICS) if rng.randrange(4) == 0 else (TOPICS,):
            question, answer = _pick(rng, topics)(rng)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        rows.append({"messages": messages})
    return rows


def prompt_completion(row: dict) -> dict:
    """The same conversation as {"prompt", "completion"}: the last message is the completion."""
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


MODULES = ("q", "k", "v", "o", "gate", "up", "down")


def lora_a(layer: int, module: str, in_features: int, rank: int) -> np.ndarray:
    """Starting value of a LoRA A matrix, f32[in_features, rank], uniform in ±1/sqrt(in_features).

    Made from the raw bits of PCG64, which numpy promises to keep; b starts at zero.
    """
    bits = np.random.PCG64([layer, MODULES.index(module)]).random_raw(in_features * rank)
    unit = (bits >> np.uint64(11)).astype(np.float64) / float(1 << 53)
    return ((2 * unit - 1) / np.sqrt(in_features)).astype(np.float32).reshape(in_features, rank)


def _pick(rng: random.Random, items):
    return items[rng.randrange(len(items))]
