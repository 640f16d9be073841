"""The quickstart's task: a sentence about an order in, one line of JSON with six fixed keys out.

    python -m jaxpost.evals.orders --out DIR      writes train.jsonl, heldout.jsonl and unseen.jsonl

Rows are {"prompt": [system, user], "completion": [assistant]}. `heldout` holds orders that are never in `train`;
`unseen` holds names and cities that are never in `train` either. Both hold for every seed and count: the split of an
order follows from a checksum of its answer. Standard library only; equal on every Python version.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import zlib

from jaxpost.evals import order_words as words

KEYS = ("item", "colour", "quantity", "name", "city", "day")
SYSTEM = f"Reply with one line of JSON: {', '.join(KEYS)}."
SPLITS = ("train", "heldout", "unseen")
HELDOUT_SHARE = 16  # one order in so many belongs to heldout
MAX_ANSWER_CHARACTERS = 1000  # longer text is no answer and is not parsed

WHAT = ("{n} {colour} {items}", "{n} {colour} {items}", "{n} {items} in {colour}")
WHERE = ("in", "from", "of")
# One order, many ways to say it. {who} may open a sentence; {where} is "in", "from" or "of".
SENTENCES = (
    "{who} {where} {city} ordered {what} for {day}.",
    "{who} {where} {city} would like {what} on {day}.",
    "{who} {where} {city} needs {what} by {day}.",
    "{who} bought {what} on {day}; please send them to {city}.",
    "{who} called on {day} and asked for {what}, to be shipped to {city}.",
    "{who}, who lives in {city}, ordered {what} last {day}.",
    "{who} will collect {what} at our shop in {city} on {day}.",
    "On {day} {who} from {city} ordered {what}.",
    "In {city}, {who} reserved {what} for {day}.",
    "For {who} in {city}: {what}, {day}.",
    "Please send {what} to {who} in {city} on {day}.",
    "Hello, this is {who} from {city}. Could I have {what} on {day}?",
    "Hi, {who} here. I live in {city} and need {what} by {day}.",
    "Can {who} get {what} in {city} before {day}?",
    "New order from {city}: {who} wants {what} on {day}.",
    "Order for {day}: {what}. Name: {who}. Place: {city}.",
    "The customer {who} of {city} has asked for {what} by {day}.",
)


def generate_rows(seed: int, n: int, split: str) -> list[dict]:
    """`n` different rows of a split ("train", "heldout", "unseen"); same seed, same rows."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    rng = random.Random(zlib.crc32(f"orders/{split}/{seed}".encode()))
    names, cities = (words.UNSEEN_NAMES, words.UNSEEN_CITIES) if split == "unseen" else (words.NAMES, words.CITIES)
    rows, seen = [], set()
    while len(rows) < n:
        order = _draw_order(rng, names, cities)
        sentence = _say(rng, order)
        answer = json.dumps(order, ensure_ascii=False, separators=(",", ":"))
        heldout = zlib.crc32(answer.encode()) % HELDOUT_SHARE == 0
        if answer in seen or heldout != (split != "train"):
            continue
        seen.add(answer)
        rows.append(
            {
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return rows


def score(completion: str, row: dict) -> float:
    """1.0 where the completion is one line with exactly the row's JSON object (spacing and key order are free)."""
    text = completion.strip()
    if len(text) > MAX_ANSWER_CHARACTERS or "\n" in text:
        return 0.0
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(pairs, _Pairs) or len(pairs) != len(KEYS):
        return 0.0
    wanted = json.loads(row["completion"][0]["content"])
    got = dict(pairs)
    # 3.0 and True equal 3 and 1 in Python; they are not the answer.
    return float(got == wanted and all(type(got[key]) is type(wanted[key]) for key in wanted))


def main(argv: list[str] | None = None) -> None:
    """Write the three files of the task."""
    parser = argparse.ArgumentParser(prog="python -m jaxpost.evals.orders", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for the three jsonl files")
    parser.add_argument("--train", type=int, default=4000, help="training rows")
    parser.add_argument("--test", type=int, default=64, help="rows in each of heldout.jsonl and unseen.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.train < 1 or args.test < 1:
        parser.error("--train and --test must be at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for split, count in (("train", args.train), ("heldout", args.test), ("unseen", args.test)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in generate_rows(args.seed, count, split))
            path = args.out / f"{split}.jsonl"
            partial = path.with_name(f"{path.name}.part")  # a file that is there is whole: others go by that
            partial.write_text(text, encoding="utf-8", newline="\n")
            partial.replace(path)
            print(f"{path}: {count} rows")
    except OSError as error:
        parser.error(f"--out: {error}")


class _Pairs(list):
    """A JSON object as its pairs, so that a repeated key is seen."""


def _draw_order(rng: random.Random, names, cities) -> dict:
    return {
        "item": _pick(rng, words.ITEMS),
        "colour": _pick(rng, words.COLOURS),
        "quantity": 2 + rng.randrange(29),
        "name": _pick(rng, names),
        "city": _pick(rng, cities),
        "day": _pick(rng, words.DAYS),
    }


def _say(rng: random.Random, order: dict) -> str:
    what = _pick(rng, WHAT).format(n=order["quantity"], colour=order["colour"], items=order["item"] + "s")
    sentence = _pick(rng, SENTENCES).format(
        what=what, who=order["name"], where=_pick(rng, WHERE), city=order["city"], day=order["day"]
    )
    return sentence[0].upper() + sentence[1:]


def _pick(rng: random.Random, items):
    return items[rng.randrange(len(items))]


if __name__ == "__main__":
    main()
