"""How many responses the keyword judge cannot read (data/languages.py), in log, manifest and report."""

import pandas as pd

from data.languages import is_read
from data.thoughts import answer_of
from stages.run.job import Job


def of_responses(responses: pd.DataFrame, sides: dict[str, str]) -> dict[str, dict[str, int]]:
    """Of each model's responses to requests, how many the keyword judge cannot read (data/languages.py).

    Args:
        sides: benchmark -> side.
    """
    requests = responses[responses["benchmark"].map(sides) != "utility"]
    answers = requests["output"].map(answer_of)
    cannot = [not read for read in answers.map({text: is_read(text) for text in answers.unique()})]
    names = requests[["arm", "optimizer", "seed"]].astype(object)
    found: dict[str, dict[str, int]] = {}
    for (arm, optimizer, seed), unread in zip(names.to_numpy().tolist(), cannot, strict=True):
        name = arm if optimizer is None or optimizer != optimizer else f"{arm}-{optimizer}-{int(seed)}"
        counts = found.setdefault(name, {"responses": 0, "unread": 0})
        counts["responses"] += 1
        counts["unread"] += int(unread)
    return found


def say(job: Job, unread: dict[str, dict[str, int]], decides: bool) -> None:
    """Says how many responses to requests the keyword judge cannot read; a warning where it `decides`."""
    count, total = (sum(each[name] for each in unread.values()) for name in ("unread", "responses"))
    job.say(f"the keyword judge cannot read {count} of {total} responses to requests")
    if count and decides:
        most = max(unread, key=lambda name: unread[name]["unread"])
        job.warn(
            f"{count} of {total} responses to requests ({count / total:.1%}) are in another language than "
            f"English, which the keyword judge cannot read: they count as no refusals (most: {most}, "
            f"{unread[most]['unread']} of {unread[most]['responses']}); let a classifier judge (--judge)"
        )


def warn_of_sweep(job: Job, texts: pd.Series) -> None:
    """Says how many responses of the sweep the judge cannot read."""
    read = texts.map({text: is_read(text) for text in texts.unique()})
    if count := int((~read.astype(bool)).sum()):
        job.warn(
            f"{count} of {len(texts)} responses ({count / len(texts):.1%}) are in another language than "
            f"English, which the keyword judge cannot read: they count as no refusals (--sensitivity "
            f"gradient asks no judge)"
        )
