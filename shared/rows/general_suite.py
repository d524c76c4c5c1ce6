"""The suite `general`: everyday questions that have nothing to do with what a model is tuned for.

A tuned model that does worse here than its base has forgotten something. Written for this project; the references are
short and plain, so that a loss on them means the same for every model.
"""

from __future__ import annotations

from typing import Any, Final

from shared.contract.evaluation_run import PartName
from shared.rows import evaluation_items
from shared.rows.evaluation_items import EvaluationItem

# (topic, question, reference)
_GENERAL: Final[tuple[tuple[str, str, str], ...]] = (
    ("arithmetic", "What is 17 plus 25?", "17 plus 25 is 42."),
    ("arithmetic", "What is 9 times 8?", "9 times 8 is 72."),
    ("arithmetic", "What is half of 90?", "Half of 90 is 45."),
    ("arithmetic", "A train leaves at 14:20 and arrives at 15:05. How long does it take?", "It takes 45 minutes."),
    ("arithmetic", "Three pens cost 6 euros. What do five pens cost?", "Five pens cost 10 euros."),
    ("facts", "What is the capital of France?", "The capital of France is Paris."),
    ("facts", "Which planet is closest to the Sun?", "Mercury is the planet closest to the Sun."),
    ("facts", "How many legs does a spider have?", "A spider has eight legs."),
    ("facts", "What gas do plants take in from the air?", "Plants take in carbon dioxide from the air."),
    ("facts", "In which ocean does the island of Iceland lie?", "Iceland lies in the Atlantic Ocean."),
    ("facts", "Who wrote the play Hamlet?", "William Shakespeare wrote Hamlet."),
    ("facts", "At what temperature does water boil at sea level?", "Water boils at 100 degrees Celsius at sea level."),
    ("facts", "How many days does a leap year have?", "A leap year has 366 days."),
    ("language", "What is the plural of the word 'mouse', the animal?", "The plural of mouse is mice."),
    ("language", "Give a word that means the opposite of 'ancient'.", "Modern is the opposite of ancient."),
    ("language", "Translate into French: Good morning.", "Bonjour."),
    ("language", "Translate into German: Thank you very much.", "Vielen Dank."),
    ("language", "Translate into Spanish: Where is the station?", "¿Dónde está la estación?"),
    ("language", "Correct this sentence: She don't like apples.", "She doesn't like apples."),
    ("language", "Write 'the dog chased the cat' in the passive.", "The cat was chased by the dog."),
    ("instruction", "List three primary colors, separated by commas.", "Red, yellow, blue"),
    ("instruction", "Answer with one word only: what color is fresh snow?", "White"),
    ("instruction", "Write the numbers from one to five in words, one a line.", "one\ntwo\nthree\nfour\nfive"),
    (
        "instruction",
        'Give a JSON object with the keys "name" and "age" for Ann, who is 30.',
        '{"name": "Ann", "age": 30}',
    ),
    ("instruction", "Sort these words by the alphabet: pear, apple, fig.", "apple, fig, pear"),
    ("instruction", "Repeat this word three times, separated by spaces: echo.", "echo echo echo"),
    (
        "writing",
        "Sum up in one sentence: The shop opens at nine. On Sundays it is closed. In summer it opens at eight.",
        "The shop opens at nine, at eight in summer, and is closed on Sundays.",
    ),
    (
        "writing",
        "Write one polite sentence that asks a colleague to send a report by Friday.",
        "Could you please send me the report by Friday?",
    ),
    ("writing", "Finish the proverb: Better late than …", "Better late than never."),
    (
        "writing",
        "Explain in one sentence what a library is.",
        "A library is a place where people can read and borrow books.",
    ),
    ("reasoning", "Ann is taller than Bob. Bob is taller than Cem. Who is the shortest?", "Cem is the shortest."),
    ("reasoning", "If today is Tuesday, what day is it in three days?", "In three days it is Friday."),
    (
        "reasoning",
        "All birds have feathers. A robin is a bird. Does a robin have feathers?",
        "Yes, a robin has feathers, because it is a bird.",
    ),
    ("reasoning", "Which weighs more, a kilogram of iron or a kilogram of feathers?", "They weigh the same."),
    ("reasoning", "What comes next: 2, 4, 8, 16?", "32 comes next."),
    ("code", "Write a Python expression for the length of a list named items.", "len(items)"),
    ("code", "What does this Python code print? print(2 ** 3)", "It prints 8."),
    ("code", "Which HTML tag makes a link?", "The a tag makes a link."),
    ("code", "Write an SQL query for all rows of the table users.", "SELECT * FROM users;"),
    (
        "conversation",
        "Hello! How are you today?",
        "Hello! I am doing well, thank you. How can I help you?",
    ),
    (
        "conversation",
        "I am sad because I lost my keys.",
        "I am sorry to hear that. Where did you see them last?",
    ),
    ("conversation", "What is today's weather where I am?", "I cannot see the weather where you are."),
)


def rows() -> list[dict[str, Any]]:
    """The suite as rows of a chat file; `topic` is a key to slice by."""
    return [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reference}],
            "topic": topic,
        }
        for topic, question, reference in _GENERAL
    ]


def general(*, part: PartName) -> list[EvaluationItem]:
    """The items of the suite."""
    return [
        evaluation_items.of_row(row, number=number, line=None, part=part) for number, row in enumerate(rows(), start=1)
    ]
