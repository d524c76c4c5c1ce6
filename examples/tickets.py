"""The demo's task: a customer's message becomes a strict JSON ticket; `python -m examples.tickets OUT_DIR`.

Three files of OpenAI chat JSONL: `train.jsonl`, `validation.jsonl` and `held_out.jsonl`. They are apart *by construct*:
the splits share no sentence about the problem, no customer's name and no order number, so no message of one can be in
another. Only the shop's products, the wishes and the answer's vocabulary are common to all: those are what the tuned
model has to know.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

Split = Literal["train", "validation", "held_out"]

ROWS: Final[dict[Split, int]] = {"train": 480, "validation": 32, "held_out": 48}
SYSTEM: Final = "Reply with a JSON ticket: category, product, order_id, priority, action."

PRODUCTS: Final = (
    "kettle",
    "desk lamp",
    "office chair",
    "backpack",
    "headphones",
    "coffee grinder",
    "bike helmet",
    "water bottle",
    "tent",
    "keyboard",
    "toaster",
    "rain jacket",
)

# category -> split -> ways to say it. A sentence lives in one split only.
PROBLEMS: Final[dict[str, dict[Split, tuple[str, ...]]]] = {
    "damaged": {
        "train": (
            "The {product} from order {order} arrived broken.",
            "My {product} is damaged, order {order}.",
            "Order {order}: the {product} has a big crack.",
            "The {product} came in pieces. Order {order}.",
            "I opened order {order} and the {product} was smashed.",
            "There is a dent in the {product} of order {order}.",
        ),
        "validation": (
            "The {product} in order {order} got damaged on the way.",
            "Order {order}: my {product} came broken.",
        ),
        "held_out": (
            "My new {product} was cracked when it came, order {order}.",
            "Order {order}, the {product} is broken.",
        ),
    },
    "late": {
        "train": (
            "The {product} of order {order} has not arrived yet.",
            "I am still waiting for my {product}, order {order}.",
            "Order {order} is late. Where is my {product}?",
            "Two weeks and no {product}. Order {order}.",
            "When will order {order} arrive? It is a {product}.",
            "My {product} should be here by now, order {order}.",
        ),
        "validation": ("Still no {product} here, order {order}.", "Order {order}: the {product} did not arrive yet."),
        "held_out": (
            "I have been waiting for the {product} of order {order}.",
            "Where is order {order}? My {product} is late.",
        ),
    },
    "wrong_item": {
        "train": (
            "I ordered a {product} and got something else, order {order}.",
            "Order {order}: you sent the wrong thing, not a {product}.",
            "This is not the {product} I ordered. Order {order}.",
            "Wrong item in order {order}, it should be a {product}.",
            "The box of order {order} has another item, no {product}.",
            "You mixed up order {order}. I wanted a {product}.",
        ),
        "validation": (
            "Order {order} has the wrong item, I ordered a {product}.",
            "Not the {product} I wanted, order {order}.",
        ),
        "held_out": (
            "You sent me the wrong item, not the {product} of order {order}.",
            "I ordered a {product}, got another item. Order {order}.",
        ),
    },
    "billing": {
        "train": (
            "I was charged twice for the {product}, order {order}.",
            "My card shows two payments for order {order}, one {product}.",
            "The invoice of order {order} is wrong, the {product} cost less.",
            "You billed me too much for the {product}, order {order}.",
            "Order {order}: the price of the {product} on the bill is wrong.",
            "Why did I pay double for one {product}? Order {order}.",
        ),
        "validation": (
            "Order {order}: I paid twice for the {product}.",
            "The bill for the {product} of order {order} is too high.",
        ),
        "held_out": (
            "My card was charged two times for the {product}, order {order}.",
            "The invoice for order {order} is wrong, one {product}.",
        ),
    },
}

WISHES: Final[dict[str, tuple[str, ...]]] = {
    "refund": ("I want my money back.", "Please refund me.", "A refund, please."),
    "replace": ("Please send a new one.", "I would like a replacement.", "Send me another one."),
    "call": ("Please call me.", "Give me a call.", "Can someone phone me?"),
}
HASTE: Final[dict[str, tuple[str, ...]]] = {
    "high": ("It is urgent!", "I need this today.", "As fast as you can!"),
    "normal": ("", "Thank you.", "Kind regards."),
    "low": ("There is no rush.", "Take your time.", "No hurry."),
}
NAMES: Final[dict[Split, tuple[str, ...]]] = {
    "train": ("Anna", "Boris", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam"),
    "validation": ("Marta", "Noah", "Olga", "Paul"),
    "held_out": ("Quinn", "Rosa", "Samir", "Tessa", "Uwe", "Vera"),
}
GREETINGS: Final = ("Hi, {name} here.", "Hello, this is {name}.", "{name} writing.", "Hey, it's {name}.")
# The first digit of an order number tells the split.
ORDER_RANGES: Final[dict[Split, range]] = {
    "train": range(1000, 7000),
    "validation": range(7000, 8000),
    "held_out": range(8000, 10000),
}


@dataclass(frozen=True)
class Ticket:
    """The answer; its field order is the order of the keys."""

    category: str
    product: str
    order_id: str
    priority: str
    action: str

    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


def rows(split: Split, *, seed: int = 7) -> list[dict[str, object]]:
    """The split's rows in OpenAI's chat format; the same for the same seed. No message comes twice."""
    source = random.Random(f"{seed}/{split}")
    orders = source.sample(ORDER_RANGES[split], ROWS[split])
    return [_row(split, number=number, order=f"A{order}", source=source) for number, order in enumerate(orders)]


def _row(split: Split, *, number: int, order: str, source: random.Random) -> dict[str, object]:
    category = tuple(PROBLEMS)[number % len(PROBLEMS)]  # every category equally often
    action, priority = source.choice(tuple(WISHES)), source.choice(tuple(HASTE))
    ticket = Ticket(category, source.choice(PRODUCTS), order, priority, action)
    sentences = (
        source.choice(GREETINGS).format(name=source.choice(NAMES[split])),
        source.choice(PROBLEMS[category][split]).format(product=ticket.product, order=order),
        source.choice(WISHES[action]),
        source.choice(HASTE[priority]),
    )
    message = " ".join(sentence for sentence in sentences if sentence)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": ticket.text()},
        ]
    }


def write(out: Path, *, seed: int = 7) -> dict[Split, Path]:
    """Write every split below `out` and return where each lies."""
    out.mkdir(parents=True, exist_ok=True)
    written: dict[Split, Path] = {}
    for split in ROWS:
        written[split] = out / f"{split}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) for row in rows(split, seed=seed))
        written[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "tickets")).values():
        print(path)
