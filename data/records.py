"""One row of text, as every data source gives it, and what makes two rows the same.

`data.rendering` turns a `Record` into token ids.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

DATA_TYPES = ("vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign")
"""the four types of alignment rows"""
SCORINGS = ("choice", "number", "boxed", "refusal", "over_refusal")


class Message(NamedTuple):
    """One turn of a conversation (chat templates call it a message)."""

    role: str
    """"system", "user" or "assistant" """
    content: str


@dataclass(frozen=True)
class Record:
    """One row of text."""

    example_id: str
    """unique in the whole project, the same in every run"""
    source: str
    """data set and family, e.g. "cais/mmlu" or "embedded/capitals" """
    entry: str
    """what must not be seen twice: a generated row's lexicon entry, `entry_of` another row's question"""
    split: str
    """"util" or another map's name, "safe", "plain" or "attacked"; a data type; or a benchmark's name"""
    prompt: str
    """the user's turn, the last one of several"""
    prefix: str = ""
    """text that the assistant's turn already holds, e.g. "The capital of France is" """
    target: str = ""
    """text of the loss, and the gold answer of "number" and "boxed"; begins with the space it needs"""
    choices: tuple[str, ...] = ()
    """candidate answers, e.g. ("A", "B", "C", "D"); empty: the whole vocabulary competes"""
    answer: int | None = None
    """index into `choices`"""
    scoring: str = "choice"
    """"choice": the next token; "number": the last number of the response; "boxed": its \\boxed{}, by
    math-verify; "refusal": a refusal is a success; "over_refusal": a refusal is a failure"""
    earlier: tuple[Message, ...] = ()
    """turns before the prompt: a system prompt of the row's own, earlier questions and answers"""

    @property
    def conversation(self) -> str:
        """All that an answer answers to, as people read it."""
        return conversation(self.earlier, self.prompt)


def conversation(earlier: Iterable[Message], prompt: str) -> str:
    """The turns up to the prompt as one text; the prompt alone where it is the only one."""
    turns = [*earlier, Message("user", prompt)]
    return "\n\n".join(f"[{turn.role}]\n{turn.content}" for turn in turns) if len(turns) > 1 else prompt


def normalise(text: str) -> str:
    """Letters and digits of a text in one case, single spaces: what two copies of one question share.

    A text of nothing but signs stands for itself.

    >>> normalise("What's  2 + 2?"), normalise(" ?! ")
    ('what s 2 2', '?!')
    """
    letters = re.sub(r"[^\w]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return letters or text.strip()


def entry_of(text: str) -> str:
    """Short identity of a question, 16 hexadecimal digits."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def without_repeats(records: Sequence[Record]) -> list[Record]:
    """The records but for those that say, whatever they are called, what an earlier one says."""
    first = {replace(record, example_id="", source="", entry=""): record for record in reversed(records)}
    kept = {record.example_id for record in first.values()}
    return [record for record in records if record.example_id in kept]


def identities(records: Iterable[Record]) -> set[str]:
    """What calibration, alignment and benchmarks may not share: entries and normalised prompts."""
    return {name for record in records for name in (record.entry, f"prompt {normalise(record.conversation)}")}
