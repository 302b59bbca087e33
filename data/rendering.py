"""From text to tokens: prompts, targets, choices, as the chat template's conversation has them.

Ids are those of the whole conversation, user and assistant, which must begin with those of the prompt: an
answer is scored by the tokens that a model saw in its place. What a next-token row is scored by carries an
answer: a blank goes to the prompt, a piece of a character is refused.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from backends import models
from backends.base import Example
from backends.core.errors import InputError
from data.chat import Chat, Opening, Turn
from data.records import Message, Record, conversation

REFUSAL_OPENINGS = ("I", "Sorry", "As", "Unfortunately")
"""what refusals begin with ("I cannot", "As an AI"); a graded refusal is the log-odds of one of them"""


def blanks_of(text: str) -> str:
    """The blanks that a text begins with."""
    return text[: len(text) - len(text.lstrip())]


class Renderer:
    """Renders records with one tokenizer, one date and one system prompt.

    Args:
        tokenizer: a transformers tokenizer with a chat template and an EOS token.
        date, system: as in `Chat`.
    """

    def __init__(self, tokenizer, date: str, system: str = ""):
        self.tokenizer, self.chat = tokenizer, Chat(tokenizer, date, system)
        plain = tokenizer("x").input_ids
        bos = tokenizer.bos_token_id
        # A model uses BOS if its tokenizer puts one before plain text: ChatML tokenizers only name one.
        self.bos = bos if bos is not None and plain[0] == bos else None
        end = models.turn_end(tokenizer)
        self.end = tokenizer.eos_token_id if end is None else end
        """what a learned answer ends with"""
        self.controlled: dict[str, str] = {}
        """rows whose text holds a control token, which is read as text, with the first one"""
        self._refusal_ids: dict[str, list[int]] = {}
        """by the blanks before an answer: all prompts end alike"""
        self._encoded = lru_cache(maxsize=8)(self._encode)  # a row's prompt is read with each of its answers

    def _prompt(self, record: Record) -> str:
        """What the model reads: chat template, generation prompt, assistant prefix."""
        opening = self.chat.opening(record.example_id, record.prompt, record.earlier)
        return self.chat.turn(opening, record.prefix, "").prompt if record.prefix else opening.text

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that `Chat` wrote, with exactly one BOS where the model uses one."""
        return list(self._encoded(text))

    def _encode(self, text: str) -> list[int]:
        ids = self.chat.control.ids(text)
        if self.bos is not None:
            if ids[:1] != [self.bos]:
                ids = [self.bos, *ids]
            if ids[1:2] == [self.bos]:
                raise InputError(
                    "the chat template and the tokenizer both put a BOS: the model would see two"
                )
        return ids

    def length(self, record: Record) -> int:
        """Tokens of the rendered prompt."""
        return len(self.ids(self._prompt(record)))

    def _after(self, turn: Turn, name: str, whole: bool = False) -> list[int]:
        """Token ids of a conversation's answer; `whole`: and of what the template writes after it.

        InputError where the conversation does not begin with the ids of the prompt, or of the answer.
        """
        prompt, answered = self.ids(turn.prompt), self.ids(turn.prompt + turn.answer)
        ids = self.ids(turn.whole)
        if ids[: len(prompt)] != prompt or len(answered) == len(prompt):
            raise InputError(
                f"{name}: the answer {turn.answer[:20]!r} merges with the prompt's last token: begin "
                f"it with a space, or end the prefix without one"
            )
        if not whole and ids[: len(answered)] != answered:
            raise InputError(
                f"{name}: the answer {turn.answer[:20]!r} merges with what the chat template writes after "
                f"it: end it otherwise"
            )
        return (ids if whole else answered)[len(prompt) :]

    def _learned(self, turn: Turn, name: str) -> list[int]:
        """Token ids of an answer that is learned with the end of its turn."""
        if self.chat.control.first_id(turn.end) != self.end:  # the template writes none
            return [*self._after(turn, name), self.end]
        ids = self._after(turn, name, whole=True)
        return ids[: ids.index(self.end) + 1]

    def _says_nothing(self, token: int) -> str:
        """Why no answer can be told by a token: it is a "blank", or a "piece of a character"; else ""."""
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return "piece of a character" if "\ufffd" in text else "" if text.strip() else "blank"

    def _refusals(self, record: Record, opening: Opening) -> list[int]:
        """The tokens that a refusal of this record begins with, sorted; none where it is no request, or its
        answer has begun: the openings that are one token. They follow the prompt as the target does, behind
        the blanks that it begins with, unless those are a token of their own."""
        if record.scoring not in ("refusal", "over_refusal") or record.prefix:
            return []
        blanks = blanks_of(record.target)
        if blanks not in self._refusal_ids:
            for before in (blanks, ""):
                turns = (self.chat.turn(opening, "", before + word) for word in REFUSAL_OPENINGS)
                found = [self._after(turn, record.example_id) for turn in turns]
                # A piece of a word ("S" of "Sorry") begins answers too.
                first = {ids[0] for ids in found if len(ids) == 1}
                if first and not any(map(self._says_nothing, first)):
                    break
            else:
                raise InputError(
                    f"{record.example_id}: none of {', '.join(REFUSAL_OPENINGS)} is one token: how likely "
                    f"refusals are cannot be told with this tokenizer and chat template"
                )
            self._refusal_ids[blanks] = sorted(first)
        return self._refusal_ids[blanks]

    def _next_token(self, record: Record, opening: Opening) -> tuple[Turn, list[int], list[int]]:
        """A row that is scored by its next token: the conversation, the ids of its target (none without one)
        and of its choices' first tokens. Blanks that are a token of their own stand in the prompt.

        InputError where the first token of an answer still carries none.
        """
        prefix, answers = record.prefix, [*record.choices, *([record.target] if record.target else [])]
        turns = [self.chat.turn(opening, prefix, answer) for answer in answers]
        found = [self._after(turn, record.example_id) for turn in turns]
        if any(self._says_nothing(ids[0]) == "blank" for ids in found):
            blanks = {blanks_of(turn.answer) for turn in turns}
            if len(blanks) > 1:
                raise InputError(
                    f"{record.example_id}: an answer begins with a blank that is a token of its own, another "
                    f"one does not: begin all of them alike"
                )
            at = len(min(blanks))
            turns = [Turn(turn.prompt + turn.answer[:at], turn.answer[at:], turn.end) for turn in turns]
            found = [self._after(turn, record.example_id) for turn in turns]
        for answer, ids in zip(answers, found, strict=True):
            if why := self._says_nothing(ids[0]):
                raise InputError(
                    f"{record.example_id}: the first token of {answer[:20]!r} is a {why}, by which no answer "
                    f"can be told: take another prompt, or other answers"
                )
        choice_ids = [ids[0] for ids in found[: len(record.choices)]]
        return turns[0], found[-1] if record.target else [], choice_ids

    def row(self, record: Record) -> dict[str, Any]:
        """The record with its token ids, as a row of a table of examples; no answer is None.

        InputError where the prompt and an answer, or two choices, cannot be told apart by their tokens.
        """
        opening = self.chat.opening(record.example_id, record.prompt, record.earlier)
        self._note_control(record)
        target_ids, choice_ids, answer = [], [], None
        if record.scoring == "choice":
            turn, target_ids, choice_ids = self._next_token(record, opening)
            text = turn.prompt
            if len(set(choice_ids)) < len(choice_ids):
                raise InputError(f"{record.example_id}: two choices begin with the same token")
            answer = record.answer if choice_ids else target_ids[0]
        elif record.target:
            turn = self.chat.turn(opening, record.prefix, record.target)
            text, target_ids = turn.prompt, self._learned(turn, record.example_id)
        else:
            text = self._prompt(record)
        return {
            "example_id": record.example_id,
            "source": record.source,
            "entry": record.entry,
            "split": record.split,
            "scoring": record.scoring,
            "earlier": [turn._asdict() for turn in record.earlier],
            "prompt": record.prompt,
            "prefix": record.prefix,
            "rendered": self.chat.control.plain(text),
            "target": record.target,
            "choices": list(record.choices),
            "answer": answer,
            "prompt_ids": self.ids(text),
            "target_ids": target_ids,
            "choice_ids": choice_ids,
            "refusal_ids": self._refusals(record, opening),
        }

    def _note_control(self, record: Record) -> None:
        texts = (record.prompt, record.prefix, record.target, *record.choices)
        texts += tuple(turn.content for turn in record.earlier)
        if first := next(filter(None, map(self.chat.control.first, texts)), None):
            self.controlled[record.example_id] = first


def earlier_of(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns before the prompt, of a row of a table of examples."""
    return tuple(Message(**turn) for turn in row["earlier"])


def conversations_of(rows: pd.DataFrame) -> list[str]:
    """All that each answer answers to, as people read it, of a table of examples."""
    return [conversation(earlier_of(row), row["prompt"]) for row in rows.to_dict("records")]


def example(row: Mapping[str, Any]) -> Example:
    """What a backend needs of a row of a table of examples.

    Args:
        row: `answer` is an index or token, or None or NaN where there is none (-1 in an Example).
    """
    names = ("prompt_ids", "target_ids", "choice_ids", "refusal_ids")
    ids = {name: np.asarray(row[name], np.int32) for name in names}
    answer = row["answer"]
    answer = -1 if answer is None or answer != answer else int(answer)
    return Example(example_id=row["example_id"], answer=answer, **ids)


def shared_first_tokens(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of next-token rows whose target of several tokens begins as another one's does: either counts as
    right where the other is asked for.

    Args:
        rows: of one benchmark or map, as `Renderer.row` gives them.
    """
    open_rows = [row for row in rows if row["scoring"] == "choice" and not len(row["choices"])]
    targets: dict[int, set[str]] = {}
    for row in open_rows:
        targets.setdefault(row["answer"], set()).add(row["target"])
    return [
        row["example_id"]
        for row in open_rows
        if len(row["target_ids"]) > 1 and len(targets[row["answer"]]) > 1
    ]
