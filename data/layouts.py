"""The columns in which people keep prompts and answers, as the four texts that a `Record` has of them.

| layout | columns | as in |
|---|---|---|
| prompt and target | `prompt`, `target` | this project |
| messages | `messages`: turns of `role` and `content` | TRL, Axolotl (`chat_template`), OpenAI |
| conversations | `conversations`: turns of `from` and `value` | ShareGPT |
| prompt and completion | `prompt`, `completion`: texts, or lists of turns | TRL |
| instruction and output | `instruction`, `output`, perhaps `input` | Alpaca, Axolotl (`alpaca`) |

A row has the first of them whose columns it has. Of several turns the last one, the assistant's, is the
target, the user's before it the prompt, and all earlier ones are context that nothing is learned of (TRL's
default learns every turn). An Alpaca input follows its instruction after a blank line. In every layout a
`system` column may hold a system prompt.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from backends.core.errors import InputError
from data.records import Message

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model"), "assistant"),
}
"""a turn's role as people write it -> as chat templates do"""
OURS = "prompt and target"
LAYOUTS: dict[str, tuple[str, ...]] = {
    OURS: ("prompt", "target"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
}
"""layout -> columns that it needs, in the order in which they are sought"""
EXTRAS = {"instruction and output": ("input",)}
COLUMNS = tuple(dict.fromkeys(column for needed in LAYOUTS.values() for column in needed)) + (
    "input",
    "system",
)
"""of any layout"""
NEAR = 0.82
"""likeness (difflib's) from which a name is taken for a misspelt one: "choice" is, "idx" for "id" is not"""


@dataclass(frozen=True)
class Texts:
    """What a row says, whatever its layout."""

    layout: str
    used: tuple[str, ...]
    """columns that were read"""
    earlier: tuple[Message, ...]
    """system prompt and turns before the prompt"""
    prompt: str
    target: str


class EmptyText(InputError):
    """A text that says nothing."""


def texts_of(row: Mapping[str, Any], empty: Collection[str] = ()) -> Texts:
    """InputError where a row has no layout, or one of its texts is none; EmptyText where that says nothing.

    Args:
        empty: columns that are there, with nothing in this row.
    """
    layout = _layout(row, empty)
    needed = LAYOUTS[layout]
    extras = tuple(column for column in (*EXTRAS.get(layout, ()), "system") if column in row)
    if layout in ("messages", "conversations"):
        turns = _turns(row[layout], layout)
    elif layout == "prompt and completion" and isinstance(row["prompt"], list):
        turns = (*_turns(row["prompt"], "prompt"), *_turns(row["completion"], "completion"))
    else:
        user, answer = needed
        text = valid(row[user], f"column '{user}'")
        if "input" in extras and text_of(row["input"], "column 'input'").strip():
            text = f"{text}\n\n{row['input']}"
        turns = (Message("user", text), Message("assistant", valid(row[answer], f"column '{answer}'")))
    if "system" in extras:
        if turns[0].role == "system":
            raise InputError(f"there is a column 'system' and a system turn in '{needed[0]}'")
        turns = (Message("system", valid(row["system"], "column 'system'")), *turns)
    _check_order(turns)
    return Texts(layout, (*needed, *extras), turns[:-2], turns[-2].content, turns[-1].content)


def _layout(row: Mapping[str, Any], empty: Collection[str]) -> str:
    for layout, needed in LAYOUTS.items():
        if all(column in row for column in needed):
            return layout
    for layout, needed in LAYOUTS.items():
        if layout != OURS and all(column in row or column in empty for column in needed):
            raise EmptyText(f"column '{next(column for column in needed if column in empty)}' is empty")
    missing = [column for needed in LAYOUTS.values() for column in needed if column not in row]
    for column in missing:
        if near := near_miss(column, (name for name in row if name not in COLUMNS)):
            raise InputError(f"column '{column}' is missing: is '{near}' meant for it?")
    half = [needed for needed in LAYOUTS.values() if any(column in row for column in needed)]
    for column in half[0] if half else ():
        if column not in row:
            raise InputError(f"column '{column}' is missing")
    there = ", ".join(row)[:80] or "no column"
    raise InputError(
        f"there is {there}, and none of {'; '.join(LAYOUTS)}: columns as data/layouts.py has them"
    )


def near_miss(column: str, names: Iterable[str]) -> str | None:
    """The one of `names` that a column may be another spelling of."""
    spelt = {name.casefold(): name for name in names}
    found = get_close_matches(column.casefold(), spelt, 1, NEAR)
    return spelt[found[0]] if found else None


def valid(value: Any, what: str) -> str:
    """A text that says something. InputError names what is none, EmptyText what says nothing."""
    text = text_of(value, what)
    if not text.strip():
        raise EmptyText(f"{what} is empty")
    return text


def text_of(value: Any, what: str) -> str:
    """A text that tokenizers and parquet files take, perhaps an empty one."""
    if not isinstance(value, str):
        raise InputError(f"{what} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer or parquet file takes it
        raise InputError(f"{what} holds a broken character") from None
    return value


def _turns(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"column '{column}' is not a list of turns")
    return tuple(_turn(turn, f"turn {number} of '{column}'") for number, turn in enumerate(value, start=1))


def _turn(turn: Any, what: str) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{what} is not an object with role and content")
    role, content = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{what} is of none of the roles {', '.join(ROLES)}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise InputError(f"{what} calls a tool, which is not handled")
    if isinstance(content, list):  # parts, as for models that read images
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise InputError(f"{what} holds something else than text")
        content = "".join(text_of(part.get("text"), what) for part in content)
    return Message(ROLES[role], valid(content, what))


def _check_order(turns: tuple[Message, ...]) -> None:
    """InputError unless user and assistant take turns, the assistant last, after a system prompt at most."""
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[number % 2]:
            raise InputError(
                "after a system turn at most, user and assistant do not take turns, the user first"
            )
    if not spoken or spoken[-1].role != "assistant":
        raise InputError("the last turn is not the assistant's, which would be the target")
