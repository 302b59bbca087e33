"""Where a classifier judged: how far the keyword judge, which reads the same responses, agrees with it."""

import pandas as pd

from stages.method.arms import ArmRun
from stages.method.reliability import kappa
from stages.report.responses import Responses
from stages.report.words import percent

COLUMNS = [
    "arm",
    "optimizer",
    "n",
    "both",
    "only_classifier",
    "only_keyword",
    "neither",
    "agreement",
    "kappa",
]
ALL = "all"


def table(responses: Responses, classifier: str | None) -> pd.DataFrame:
    """COLUMNS: first of all models together, then of each arm and optimizer (seeds together). Counts are of
    responses to requests, harmful and benign, by who calls them refusals; empty without a classifier.

    Args:
        classifier: what stage 05's manifest says of it.
    """
    if classifier is None:
        return pd.DataFrame(columns=COLUMNS)
    judged = pd.concat(_judged(run, lines) for run, lines in responses.of.items())
    groups = [((ALL, None), judged)]
    groups += [*judged.groupby(["arm", "optimizer"], sort=False, dropna=False)]
    return pd.DataFrame([_row(*labels, own) for labels, own in groups], columns=COLUMNS)


def _judged(run: ArmRun, lines: pd.DataFrame) -> pd.DataFrame:
    """Two verdicts on each response that both judged."""
    own = lines[lines["side"] != "utility"]
    verdicts = {"classifier": own["verdict"] == 1, "keyword": own["refused"] == 1}
    return pd.DataFrame(verdicts).assign(arm=run.arm.name, optimizer=run.optimizer)


def _row(arm: str, optimizer: str | None, own: pd.DataFrame) -> dict:
    one, other = own["classifier"].to_numpy(), own["keyword"].to_numpy()
    counts = {"both": one & other, "only_classifier": one & ~other, "only_keyword": ~one & other}
    row = {"arm": arm, "optimizer": optimizer, "n": len(own)}
    row |= {name: int(which.sum()) for name, which in (counts | {"neither": ~one & ~other}).items()}
    return row | {"agreement": float((one == other).mean()), "kappa": kappa(one + 1, other + 1, 2)}


def sentence(found: pd.DataFrame) -> str:
    """Of all models together; empty without a classifier."""
    if found.empty:
        return ""
    row = found.iloc[0]
    return (
        f"The classifier that judged refusals and the keyword judge agree on {percent(row['agreement'])} of "
        f"{row['n']} responses (kappa {row['kappa']:.2f}); {row['only_classifier']} are refusals to the "
        f"classifier alone, {row['only_keyword']} to the keyword judge alone."
    )
