"""How a chat template writes a conversation: what a model reads before an answer, the answer, its end.

The template is believed for the whole conversation, as models saw it, and not for its prompt alone: what it
writes between the two decides how an answer begins (Mistral's writes a blank there).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from backends.core.errors import InputError, reason
from data.control import Control
from data.records import Message
from data.thoughts import after_thought, without_thought

DATE = "%d %b %Y"
"""how a run's date is written"""
_USER = "\U0010fff2"  # stands nowhere else
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def is_date(text: str) -> bool:
    try:
        datetime.strptime(text, DATE)
    except ValueError:
        return False
    return True


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


@dataclass(frozen=True)
class Opening:
    """A prompt, spelt as `Control` spells it."""

    name: str
    """of its row, in messages"""
    before: tuple[dict[str, str], ...]
    """the turns before the user's"""
    user: str
    text: str
    """up to the assistant's first word, with a thought closed"""
    bare: str
    """without any thought: templates write none where the answer is known"""


@dataclass(frozen=True)
class Turn:
    """A conversation in three parts, spelt as `Control` spells it."""

    prompt: str
    """up to what is scored, the assistant's prefix included"""
    answer: str
    """what is scored, with the blanks that the template writes before it"""
    end: str
    """what the template writes after an answer"""

    @property
    def whole(self) -> str:
        return self.prompt + self.answer + self.end


class Chat:
    """A tokenizer's template with one date and one system prompt.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        date: as "26 Jul 2024", given to templates that print one, or ask the clock (Llama's would print
            today's otherwise).
        system: system prompt; empty: the template's own default.
    """

    def __init__(self, tokenizer, date: str, system: str = ""):
        self.tokenizer, self.system, self.control = tokenizer, system, Control(tokenizer)
        template = _without_clock(tokenizer.get_chat_template(), date)
        self._options = {"chat_template": template, "date_string": date, "tokenize": False}
        if "enable_thinking" in template:
            self._options["enable_thinking"] = False
        self.closes_thoughts = False
        """whether a prompt held a thought that had to be closed by us"""
        self._tail = self._write("a conversation", self._before(()), _USER).rpartition(_USER)[2]
        """of most prompts: what stands behind the user's text"""

    def _before(self, earlier: Sequence[Message]) -> tuple[dict[str, str], ...]:
        """The turns before the user's. A row's own system prompt stands in the place of the run's."""
        if self.system and not any(turn.role == "system" for turn in earlier):
            earlier = (Message("system", self.system), *earlier)
        return tuple({"role": turn.role, "content": self.control.as_text(turn.content)} for turn in earlier)

    def _write(
        self, name: str, before: Sequence[dict[str, str]], user: str, assistant: str | None = None
    ) -> str:
        messages = [*before, {"role": "user", "content": user}]
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=assistant is None, **self._options
            )
        except Exception as error:  # templates raise by their own rules, e.g. "system role not supported"
            own = before and before[0]["role"] == "system"
            mend = "is a system prompt allowed?" if own else "mend the tokenizer's template"
            mend = "is --system allowed?" if self.system else mend
            raise InputError(f"the chat template refuses {name} ({reason(error)}): {mend}") from None

    def opening(self, name: str, user: str, earlier: Sequence[Message] = ()) -> Opening:
        """What the model reads of a user's turn and those before it."""
        user, before = self.control.as_text(user), self._before(earlier)
        text = self._write(name, before, user)
        if text.endswith(self._tail):  # a thought that the user wrote is none
            at = len(text) - len(self._tail)
        else:
            at = text.rfind(user.strip()) + len(user.strip())
        closed, bare = without_thought(text[at:])
        self.closes_thoughts |= closed != text[at:]
        return Opening(name, before, user, text[:at] + closed, text[:at] + bare)

    def turn(self, opening: Opening, prefix: str, answer: str) -> Turn:
        """The conversation with an answer, `answer` after what the assistant's turn already holds.

        InputError where the template's conversation does not begin with its own prompt, or has another
        answer.
        """
        prefix = self.control.as_text(prefix)
        content = prefix + self.control.as_text(answer)
        whole = self._write(opening.name, opening.before, opening.user, content)
        start = next((text for text in (opening.text, opening.bare) if whole.startswith(text)), None)
        if start is None:
            raise InputError(
                f"{opening.name}: the chat template writes a conversation that does not begin with its own "
                f"prompt: mend the tokenizer's template"
            )
        rest = whole.removeprefix(start)
        if start != opening.text:  # the prompt has a thought of its own
            rest = after_thought(rest)
        forms = (content, content.lstrip(), content.rstrip(), content.strip())
        written = next((form for form in forms if form and form in rest), None)
        if written is None:
            raise InputError(
                f"{opening.name}: the chat template writes another answer than {answer[:20]!r}: mend the "
                f"tokenizer's template"
            )
        before, _, end = rest.partition(written)
        if before.strip():
            raise InputError(
                f"{opening.name}: the chat template writes {before[:20]!r} before an answer, and not in its "
                f"own prompt: mend the tokenizer's template"
            )
        if not prefix:
            return Turn(opening.text, before + written, end)
        stripped = len(content) - len(content.lstrip()) if written == written.lstrip() else 0
        prompt = prefix[stripped:]
        return Turn(opening.text + before + prompt, written[len(prompt) :], end)
