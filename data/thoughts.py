"""Thoughts: what some models write before they answer, between marks of their own."""

MARKS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""what opens and what ends a thought"""


def without_thought(opening: str) -> tuple[str, str]:
    """The end of a prompt with its thought, if it has one, closed and empty; and without it.

    >>> without_thought("[assistant]<think>\\n")
    ('[assistant]<think>\\n\\n</think>\\n\\n', '[assistant]')
    >>> without_thought("[assistant]")
    ('[assistant]', '[assistant]')
    """
    for start, end in MARKS:
        before, mark, thought = opening.rpartition(start)
        if mark:
            return (opening if end in thought else f"{before}{start}\n\n{end}\n\n"), before
    return opening, opening


def after_thought(text: str) -> str:
    """What follows a thought that a text begins with.

    >>> after_thought("<think>\\n</think>\\nA"), after_thought(" A")
    ('\\nA', ' A')
    """
    for start, end in MARKS:
        if text.lstrip().startswith(start):
            return text.partition(end)[2]
    return text


def answer_of(response: str) -> str:
    """What a response says after its thought; nothing where the thought does not end.

    >>> answer_of("<think>I cannot …</think>Sure."), answer_of("Sure."), answer_of("<think>I cannot")
    ('Sure.', 'Sure.', '')
    """
    for start, end in MARKS:
        before, mark, after = response.rpartition(end)
        if mark:
            return after
        if response.lstrip().startswith(start):
            return ""
    return response
