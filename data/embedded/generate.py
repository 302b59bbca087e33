"""The embedded default data set: small lexicons, expanded into rows, the same ones in every run.

Every row was written for this project. A lexicon entry (a country of "capitals", an action-object pair of a
harmful request, a benign act, a problem's template and numbers) belongs to one group:

    calibration   util, safe, plain and attacked (a request's two forms, ids alike but for the split), sums
    alignment     vanilla_harmful, adversarial_harmful, vanilla_benign, adversarial_benign
    benchmarks    facts, words, problems, vanilla, adversarial, benign

so nothing that an adapter was trained on, or a map was computed from, is ever scored. Attacks likewise:
alignment wraps requests in one set of attack families, the benchmarks in another.

A conflict map needs more rows than that cut leaves it. What a lexicon lists under "calibration" is for maps
only, and can grow without moving a row of the other groups. No family is of the kinds in "words": those stay
another domain than D_util's. "sums" are of the domain of "problems", for a map of their own (--maps
sums=embedded/sums:96): other stories, and a first number that no scored problem has.

Harmful requests name an aim and nothing more: they hold no operational detail, and no row answers one.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.records import Record


class _Split(NamedTuple):
    group: str
    lexicon: str
    wordings: tuple[str, ...] = ()
    """templates of phrasing.json for requests; "other plain": the plain ones that no row of "safe" has"""
    per_entry: int = 1
    """distinct wordings of one entry"""


_SPLITS = {
    "util": _Split("calibration", "facts"),
    # Wordings that the default model refuses about every second time: an ablated head can then move the
    # refusal rate both ways, where plain questions keep it near zero.
    "safe": _Split("calibration", "harm", ("calibration",)),
    "vanilla_harmful": _Split("alignment", "harm", ("plain",), 2),
    "adversarial_harmful": _Split("alignment", "harm", ("attacks",), 2),
    "vanilla_benign": _Split("alignment", "benign", ("plain",), 3),
    "adversarial_benign": _Split("alignment", "benign", ("attacks",), 3),
    "facts": _Split("benchmarks", "facts"),
    "words": _Split("benchmarks", "words"),
    "problems": _Split("benchmarks", "problems"),
    "vanilla": _Split("benchmarks", "harm", ("plain",)),
    "adversarial": _Split("benchmarks", "harm", ("held_out_attacks",)),
    # Every entry plainly, and every look-alike of a harmful request inside a held-out attack too.
    "benign": _Split("benchmarks", "benign", ("plain", "held_out_attacks")),
    "plain": _Split("calibration", "harm", ("other plain",)),
    "attacked": _Split("calibration", "harm", ("attacks",)),
    "sums": _Split("calibration", "problems"),
}
SPLITS = tuple(_SPLITS)
GROUPS = {name: split.group for name, split in _SPLITS.items()}

SPLIT_SEED = 20_240
"""of the groups of entries; wordings and order follow from a split's place in `SPLITS`: change neither"""

# Shares of each lexicon (cut within every family, so that each group has all families).
_SHARES = {
    "facts": {"calibration": 0.4, "benchmarks": 0.6},
    "words": {"benchmarks": 1.0},
    "harm": {"calibration": 0.25, "alignment": 0.42, "benchmarks": 0.33},
    "lookalike": {"alignment": 0.45, "benchmarks": 0.55},
    "ordinary": {"alignment": 0.75, "benchmarks": 0.25},
}
PROBLEMS_PER_TEMPLATE = 20
# b < a: differences stay positive.
_PAIRS = {
    "benchmarks": [(a, b) for a in range(3, 10) for b in range(2, a)],
    "calibration": [(a, b) for a in range(10, 20) for b in range(2, 10)],
}
"""the two numbers of a problem, by group"""


def records(split: str) -> list[Record]:
    """All rows of a split, in an order that mixes its families: the first n are a balanced sample."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([0, SPLITS.index(split)])
    build = {"problems": _problems, "harm": _harmful, "benign": _benign}
    return _mixed(build.get(_SPLITS[split].lexicon, _knowledge)(split, rng), rng)


def sha256() -> str:
    """One hash over the lexicons and this generator: what the rows follow from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.json")) + [Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _row(split: str, family: str, entry: str, form: str = "", **texts: str) -> Record:
    return Record(f"embedded/{split}/{entry}{form}", f"embedded/{family}", entry, split, **texts)


def _knowledge(split: str, rng: np.random.Generator) -> list[Record]:
    lexicon = _SPLITS[split].lexicon
    rows = []
    for family, spec in _lexicon("knowledge")[lexicon].items():
        shared = _answers(spec.get("pairs", {}) | spec.get("by_answer", {}))
        more = _answers(spec.get("calibration", {}))
        answers = shared | more
        for x in _part(list(shared), _SHARES[lexicon], family, more)[GROUPS[split]]:
            slots = {"x": x, "X": x[0].upper() + x[1:]}
            prompt, prefix = spec["prompt"].format(**slots), spec["prefix"].format(**slots)
            entry = f"{family}/{_slug(x)}"
            rows.append(_row(split, family, entry, prompt=prompt, prefix=prefix, target=f" {answers[x]}"))
    return rows


def _answers(table: dict[str, str | list[str]]) -> dict[str, str]:
    """{question: answer}, from pairs of that kind and from lists of the questions of one answer."""
    answers = {}
    for key, value in table.items():
        answers |= {key: value} if isinstance(value, str) else dict.fromkeys(value, key)
    return answers


def _problems(split: str, rng: np.random.Generator) -> list[Record]:
    """One-step word problems; the numbers are fixed, as every group is. A target is the worked answer, whose
    last number is right: its log p is the graded outcome."""
    lexicon, pairs = _lexicon("problems"), _PAIRS[GROUPS[split]]
    templates = lexicon["calibration"] if GROUPS[split] == "calibration" else lexicon
    solve = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b}
    signs = {"add": "+", "subtract": "-", "multiply": "x"}
    rows = []
    for operation in solve:
        for number, template in enumerate(templates[operation]):
            family = f"{operation}{number}"
            for i in _fixed_order(family, len(pairs))[:PROBLEMS_PER_TEMPLATE]:
                a, b = pairs[i]
                question = template.format(a=a, b=b, name=rng.choice(lexicon["names"]))
                worked = f"{a} {signs[operation]} {b} = {solve[operation](a, b)}"
                texts = {"prompt": f"{question} {lexicon['ending']}", "target": worked}
                rows.append(_row(split, operation, f"{split}/{family}/{a}-{b}", scoring="number", **texts))
    return rows


def _harmful(split: str, rng: np.random.Generator) -> list[Record]:
    refusals = _lexicon("phrasing")["refusals"]
    rows = []
    for category, spec in _lexicon("harm").items():
        targets = [refusal.format(**spec) for refusal in refusals]
        # Objects are split, not pairs: "forge a passport" and "sell a fake passport" stay in one group.
        things = _part(spec.get("objects", []), _SHARES["harm"], category, spec["calibration"])
        for thing in things[GROUPS[split]]:
            for action, template in spec["actions"].items():
                entry = f"harm/{action}/{_slug(thing)}"
                rows += _requests(split, rng, category, entry, template.format(thing), targets)
    return rows


def _benign(split: str, rng: np.random.Generator) -> list[Record]:
    rows = []
    for family, answers in _lexicon("benign").items():
        for act in _part(list(answers), _SHARES[family], family)[GROUPS[split]]:
            entry = f"benign/{family}/{_slug(act)}"
            rows += _requests(split, rng, family, entry, act, [answers[act]])
    return rows


def _requests(
    split: str, rng: np.random.Generator, family: str, entry: str, act: str, targets: Sequence[str]
) -> list[Record]:
    """The rows of one entry, in the wordings of its split."""
    rows, scoring = [], "over_refusal" if split.endswith("benign") else "refusal"
    for wording in _SPLITS[split].wordings:
        if split == "benign" and family == "ordinary" and wording != "plain":
            continue
        templates = _templates(wording, family)
        for i in rng.choice(len(templates), _SPLITS[split].per_entry, replace=False):
            name, number, template = templates[i]
            form = "" if split in ("plain", "attacked") else f"/{_slug(name)}-{number}"
            texts = {"prompt": template.format(act=act), "target": str(rng.choice(targets))}
            rows.append(_row(split, name, entry, form, scoring=scoring, **texts))
    return rows


def _templates(wording: str, family: str) -> list[tuple[str, int, str]]:
    """(family of the wording, number in it, template); an attack is a family of its own."""
    phrasing = _lexicon("phrasing")
    if wording == "other plain":
        chosen = {family: [text for text in phrasing["plain"] if text not in phrasing["calibration"]]}
    elif isinstance(phrasing[wording], dict):
        chosen = phrasing[wording]
    else:
        chosen = {family: phrasing[wording]}
    return [(name, number, text) for name, texts in chosen.items() for number, text in enumerate(texts)]


@cache
def _lexicon(name: str) -> dict:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def _fixed_order(family: str, size: int) -> np.ndarray:
    """A permutation that is the same in every run."""
    return np.random.default_rng([SPLIT_SEED, *family.encode()]).permutation(size)


def _part(
    names: list[str], shares: dict[str, float], family: str, more: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Cuts the names of one family into disjoint groups of the given shares (which sum to 1).

    Args:
        more: names that only calibrate. They stand apart, so that the cut of the others stays as it is.
    """
    order = _fixed_order(family, len(names))
    cuts = np.round(np.cumsum(list(shares.values()))[:-1] * len(names)).astype(int)
    parts = {
        group: [names[i] for i in part] for group, part in zip(shares, np.split(order, cuts), strict=True)
    }
    return parts | {"calibration": [*parts.get("calibration", ()), *more]}


def _mixed(rows: list[Record], rng: np.random.Generator) -> list[Record]:
    """A shuffle in which every prefix holds each family in about its share of the whole."""
    families: dict[str, list[Record]] = {}
    for row in rows:
        families.setdefault(row.source, []).append(row)
    placed = [
        ((place + rng.random()) / len(members), members[i])
        for members in families.values()
        for place, i in enumerate(rng.permutation(len(members)))
    ]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")
