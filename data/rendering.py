"""From text to tokens: chat template, targets, choices."""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import numpy as np

from backends.base import Example
from backends.core.errors import InputError, reason
from data.records import Record

DATE = "%d %b %Y"
"""how a run's date is written"""


REFUSAL_OPENINGS = ("I", "Sorry", "As", "Unfortunately")
"""what refusals begin with ("I cannot", "As an AI"); a graded refusal is the log-odds of one of them"""

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def _without_clock(template: str, date: str) -> str:
    """The template with the run's date where it asks for today's, by which it would make other prompts every
    day. (transformers lets no function of ours into a template.)"""
    day = datetime.strptime(date, DATE)
    template = _CLOCK.sub(lambda found: repr(day.strftime(found[2])), template)
    if "strftime_now(" in template:
        raise InputError(
            "the chat template asks for today's date in a way that is not handled: write the date"
        )
    return template


def is_date(text: str) -> bool:
    try:
        datetime.strptime(text, DATE)
    except ValueError:
        return False
    return True


class Renderer:
    """Renders records with one tokenizer, one date and one system prompt.

    Args:
        tokenizer: a transformers tokenizer with a chat template and an EOS token.
        date: as "26 Jul 2024", given to templates that print one, or ask the clock (Llama's would print
            today's otherwise).
        system: system prompt; empty: the template's own default.
    """

    def __init__(self, tokenizer, date: str, system: str = ""):
        self.tokenizer, self.date, self.system = tokenizer, date, system
        self.template = _without_clock(tokenizer.get_chat_template(), date)
        self.eos = tokenizer.eos_token_id
        plain = tokenizer("x").input_ids
        bos = tokenizer.bos_token_id
        # A model uses BOS if its tokenizer puts one before plain text: ChatML tokenizers only name one.
        self.bos = bos if bos is not None and plain[0] == bos else None
        self._refusal_ids: dict[str, list[int]] = {}
        """by the blanks before an answer: all prompts end alike"""

    def prompt(self, record: Record) -> str:
        """The text that the model reads: chat template, generation prompt, assistant prefix."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": record.prompt})
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                date_string=self.date,
                chat_template=self.template,
            )
        except Exception as error:  # templates raise by their own rules, e.g. "system role not supported"
            mend = "is --system allowed?" if self.system else "mend the tokenizer's template"
            raise InputError(
                f"the chat template refuses {record.example_id} ({reason(error)}): {mend}"
            ) from None
        return text + record.prefix

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text, with exactly one BOS where the model uses one."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
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
        return len(self.ids(self.prompt(record)))

    def _after(self, text: str, prompt_ids: list[int], addition: str, example_id: str) -> list[int]:
        """Token ids of `addition` where it follows the rendered prompt `text`."""
        ids = self.ids(text + addition)
        if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
            raise InputError(
                f"{example_id}: the answer {addition[:20]!r} merges with the prompt's last token: begin "
                f"it with a space, or end the prefix without one"
            )
        return ids[len(prompt_ids) :]

    def _refusals(self, record: Record, text: str, prompt_ids: list[int]) -> list[int]:
        """The tokens that a refusal of this record begins with, sorted; none where it is no request, or its
        answer has begun. They follow the prompt as the target does, behind the blanks that it begins with."""
        if record.scoring not in ("refusal", "over_refusal") or record.prefix:
            return []
        blanks = record.target[: len(record.target) - len(record.target.lstrip())]
        if blanks not in self._refusal_ids:
            openings = (blanks + word for word in REFUSAL_OPENINGS)
            every = {self._after(text, prompt_ids, words, record.example_id)[0] for words in openings}
            self._refusal_ids[blanks] = sorted(every)
        return self._refusal_ids[blanks]

    def row(self, record: Record) -> dict[str, Any]:
        """The record with its token ids, as a row of a table of examples; no answer is None.

        InputError where the prompt and an answer, or two choices, cannot be told apart by their tokens.
        """
        text = self.prompt(record)
        prompt_ids = self.ids(text)
        target_ids = self._after(text, prompt_ids, record.target, record.example_id) if record.target else []
        choice_ids, answer = [], None
        if record.scoring == "choice":
            choice_ids = [
                self._after(text, prompt_ids, choice, record.example_id)[0] for choice in record.choices
            ]
            if len(set(choice_ids)) < len(choice_ids):
                raise InputError(f"{record.example_id}: two choices begin with the same token")
            answer = record.answer if choice_ids else target_ids[0]
        elif target_ids:
            target_ids = [*target_ids, self.eos]  # a completion is learned with its end
        return {
            "example_id": record.example_id,
            "source": record.source,
            "entry": record.entry,
            "split": record.split,
            "scoring": record.scoring,
            "prompt": record.prompt,
            "rendered": text,
            "target": record.target,
            "choices": list(record.choices),
            "answer": answer,
            "prompt_ids": prompt_ids,
            "target_ids": target_ids,
            "choice_ids": choice_ids,
            "refusal_ids": self._refusals(record, text, prompt_ids),
        }


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
