"""The embedded default data set: small lexicons, expanded into rows by a seeded generator (DESIGN.md §9).

    python -m data.embedded.generate            # rows and a sample row of every role

Every row was written for this project. A lexicon entry (a country of "capitals", an action-object pair of a
harmful request, a benign act, a problem's template and numbers) belongs to one group, whatever the seed:

    calibration   util, safe, plain and attacked (a request's two forms, ids alike but for the role)
    alignment     vanilla_harmful, adversarial_harmful, vanilla_benign, adversarial_benign
    benchmarks    facts, words, problems, vanilla, adversarial, benign

so nothing that an adapter was trained on, or a map was computed from, is ever scored. Attacks likewise:
alignment wraps requests in one set of attack families, the benchmarks in another.

Harmful requests name an aim and nothing more: they hold no operational detail, and no row answers one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from data.examples import Record

ROLES = (
    "util",
    "safe",
    "vanilla_harmful",
    "adversarial_harmful",
    "vanilla_benign",
    "adversarial_benign",
    "facts",
    "words",
    "problems",
    "vanilla",
    "adversarial",
    "benign",
    "plain",
    "attacked",
)
GROUPS = {
    role: "calibration" if i < 2 or i > 11 else "alignment" if i < 6 else "benchmarks"
    for i, role in enumerate(ROLES)
}

SPLIT_SEED = 20_240
"""which group an entry belongs to: fixed, so that rows of two runs with different seeds never leak either"""

# Shares of each lexicon (cut within every family, so that each group sees all families).
KNOWLEDGE_SHARES = {"calibration": 0.4, "benchmarks": 0.6}
HARM_SHARES = {"calibration": 0.25, "alignment": 0.42, "benchmarks": 0.33}
BENIGN_SHARES = {
    "lookalike": {"alignment": 0.45, "benchmarks": 0.55},
    "ordinary": {"alignment": 0.75, "benchmarks": 0.25},
}

PHRASINGS_PER_ENTRY = {
    "vanilla_harmful": 2,
    "adversarial_harmful": 2,
    "vanilla_benign": 3,
    "adversarial_benign": 3,
}
"""distinct wordings of one training entry; every other role has one row an entry"""

PROBLEMS_PER_TEMPLATE = 20


def records(role: str, seed: int = 0) -> list[Record]:
    """All rows of a role, in an order that mixes its families: the first n are a balanced sample.

    `seed` draws the wordings and the order; the entries of a role never change with it.

    >>> [row.role for row in records("facts")[:2]]
    ['facts', 'facts']
    """
    if role not in ROLES:
        raise ValueError(f"role: {role!r} is not one of {', '.join(ROLES)}")
    rng = np.random.default_rng([seed, ROLES.index(role)])
    return _mixed(_BUILDERS[role](role, rng), rng)


def sha256() -> str:
    """One hash over the lexicons and this generator: what the rows follow from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.json")) + [Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# --- knowledge -------------------------------------------------------------------------------------------


def _facts(role: str, rng: np.random.Generator) -> list[Record]:
    return _knowledge_rows(role, "facts", KNOWLEDGE_SHARES)


def _words(role: str, rng: np.random.Generator) -> list[Record]:
    return _knowledge_rows(role, "words", {"benchmarks": 1.0})


def _knowledge_rows(role: str, kind: str, shares: dict[str, float]) -> list[Record]:
    rows = []
    for family, spec in _lexicon("knowledge")[kind].items():
        answers = spec.get("pairs") or {x: answer for answer, xs in spec["by_answer"].items() for x in xs}
        for x in _split(list(answers), shares, family)[GROUPS[role]]:
            slots = {"x": x, "X": x[0].upper() + x[1:]}
            entry = f"{family}/{_slug(x)}"
            rows.append(
                Record(
                    example_id=f"embedded/{role}/{entry}",
                    source=f"embedded/{family}",
                    entry=entry,
                    role=role,
                    prompt=spec["prompt"].format(**slots),
                    prefix=spec["prefix"].format(**slots),
                    target=f" {answers[x]}",
                )
            )
    return rows


def _problems(role: str, rng: np.random.Generator) -> list[Record]:
    """One-step word problems with one-digit numbers; the numbers are fixed, as every split is."""
    lexicon = _lexicon("problems")
    solve = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b}
    pairs = [(a, b) for a in range(3, 10) for b in range(2, a)]  # b < a: differences stay positive
    rows = []
    for operation in solve:
        for number, template in enumerate(lexicon[operation]):
            family = f"{operation}{number}"
            chosen = np.random.default_rng([SPLIT_SEED, *family.encode()]).permutation(len(pairs))
            for i in chosen[:PROBLEMS_PER_TEMPLATE]:
                a, b = pairs[i]
                name = rng.choice(lexicon["names"])
                entry = f"problems/{family}/{a}-{b}"
                rows.append(
                    Record(
                        example_id=f"embedded/{role}/{entry}",
                        source=f"embedded/{operation}",
                        entry=entry,
                        role=role,
                        prompt=f"{template.format(a=a, b=b, name=name)} {lexicon['ending']}",
                        target=f" {solve[operation](a, b)}",
                        scoring="number",
                    )
                )
    return rows


# --- requests --------------------------------------------------------------------------------------------


def _harmful(role: str, rng: np.random.Generator) -> list[Record]:
    refusals = _lexicon("phrasing")["refusals"]
    rows = []
    for category, spec in _lexicon("harm").items():
        # Objects are split, not pairs: "forge a passport" and "sell a fake passport" stay in one group.
        for thing in _split(spec["objects"], HARM_SHARES, category)[GROUPS[role]]:
            for action, template in spec["actions"].items():
                rows += _request_rows(
                    role,
                    rng,
                    family=category,
                    entry=f"harm/{action}/{_slug(thing)}",
                    act=template.format(thing),
                    targets=[refusal.format(**spec) for refusal in refusals],
                )
    return rows


def _benign(role: str, rng: np.random.Generator) -> list[Record]:
    rows = []
    for family, answers in _lexicon("benign").items():
        for act in _split(list(answers), BENIGN_SHARES[family], family)[GROUPS[role]]:
            rows += _request_rows(
                role,
                rng,
                family=family,
                entry=f"benign/{family}/{_slug(act)}",
                act=act,
                targets=[answers[act]],
            )
    return rows


def _request_rows(
    role: str, rng: np.random.Generator, *, family: str, entry: str, act: str, targets: Sequence[str]
) -> list[Record]:
    """The rows of one entry: plain, in the training attacks, or in the held-out attacks, as the role says.

    The benchmark "benign" asks every entry plainly and every look-alike inside a held-out attack too. "safe"
    has wordings of its own, which the default model refuses about every second time: a silenced head can then
    move the refusal rate both ways, where plain questions leave it near zero.
    """
    phrasing = _lexicon("phrasing")
    plain = {family: phrasing["plain"]}
    wordings = {
        "safe": [{family: phrasing["calibration"]}],
        "adversarial_harmful": [phrasing["attacks"]],
        "attacked": [phrasing["attacks"]],
        "plain": [{family: [text for text in phrasing["plain"] if text not in phrasing["calibration"]]}],
        "adversarial_benign": [phrasing["attacks"]],
        "adversarial": [phrasing["held_out_attacks"]],
        "benign": [plain, phrasing["held_out_attacks"]] if family == "lookalike" else [plain],
    }.get(role, [plain])
    scoring = "over_refusal" if role.endswith("benign") else "refusal"
    rows = []
    for families in wordings:
        every = [(name, number) for name, templates in families.items() for number in range(len(templates))]
        for i in rng.choice(len(every), PHRASINGS_PER_ENTRY.get(role, 1), replace=False):
            name, number = every[i]
            rows.append(
                Record(
                    example_id=f"embedded/{role}/{entry}"
                    + ("" if role in ("plain", "attacked") else f"/{_slug(name)}-{number}"),
                    source=f"embedded/{name}",
                    entry=entry,
                    role=role,
                    prompt=families[name][number].format(act=act),
                    target=str(rng.choice(targets)),
                    scoring=scoring,
                )
            )
    return rows


# --- shared ----------------------------------------------------------------------------------------------

_BUILDERS: dict[str, Callable[[str, np.random.Generator], list[Record]]] = {
    "util": _facts,
    "safe": _harmful,
    "vanilla_harmful": _harmful,
    "adversarial_harmful": _harmful,
    "vanilla_benign": _benign,
    "adversarial_benign": _benign,
    "facts": _facts,
    "words": _words,
    "problems": _problems,
    "vanilla": _harmful,
    "adversarial": _harmful,
    "benign": _benign,
    "plain": _harmful,
    "attacked": _harmful,
}


@cache
def _lexicon(name: str) -> dict:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def _split(names: list[str], shares: dict[str, float], family: str) -> dict[str, list[str]]:
    """Cuts the names of one family into disjoint groups of the given shares (which sum to 1)."""
    order = np.random.default_rng([SPLIT_SEED, *family.encode()]).permutation(len(names))
    cuts = np.round(np.cumsum(list(shares.values()))[:-1] * len(names)).astype(int)
    return {
        group: [names[i] for i in part] for group, part in zip(shares, np.split(order, cuts), strict=True)
    }


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


if __name__ == "__main__":
    for name in ROLES:
        found = records(name)
        print(
            f"{name:20} {len(found):4} rows   {found[0].prompt!r} -> {found[0].prefix!r} {found[0].target!r}"
        )
