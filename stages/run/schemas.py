"""Every table of a run: which stage writes it, and its columns.

A file carries the name of its schema in its metadata. A field that may be null is listed in `nullable`.
"""

from dataclasses import dataclass

import pyarrow as pa

from stages.method.arms import OWN as OWN_MAP

SCHEMA_VERSION = "cast-2"


@dataclass(frozen=True)
class Table:
    """A kind of table: `<stage>/<stem>.parquet`; of another map than the run's own `<stem>-<map>.parquet`."""

    stage: str
    stem: str
    schema: pa.Schema
    per_map: bool = False
    """each map of the run has one"""
    optional: bool = False
    """only where the data or the settings ask for it"""

    def file(self, map_name: str = OWN_MAP) -> str:
        """The file's name within its stage's folder."""
        return f"{self.stem}.parquet" if map_name == OWN_MAP else f"{self.stem}-{map_name}.parquet"

    def path(self, map_name: str = OWN_MAP) -> str:
        """The file's path within the run."""
        return f"{self.stage}/{self.file(map_name)}"


def _schema(name: str, fields: dict[str, pa.DataType], nullable: str = "") -> pa.Schema:
    may_be_null = nullable.split()
    return pa.schema(
        [pa.field(column, kind, nullable=column in may_be_null) for column, kind in fields.items()],
        metadata={"schema": f"{SCHEMA_VERSION}/{name}"},
    )


def _interval(*names: str) -> dict[str, pa.DataType]:
    """Each estimate and its 95 % interval."""
    return {f"{name}{suffix}": pa.float64() for name in names for suffix in ("", "_low", "_high")}


_text, _int, _float, _bool = pa.string(), pa.int32(), pa.float64(), pa.bool_()
_ids, _floats, _texts = pa.list_(pa.int32()), pa.list_(pa.float64()), pa.list_(pa.string())
_neurons = pa.list_(pa.list_(pa.int32()))  # (layer, neuron) each
_head = {"layer": _int, "head": _int}
_labels = {"arm": _text, "optimizer": _text, "seed": _int}
"""null optimizer and seed: the untouched model, arm "base" """

# 01: rows
_example = {
    "example_id": _text,
    "source": _text,
    "entry": _text,
    "split": _text,  # a map's name ("util"), "safe", "plain", "attacked"; a data type; a benchmark's name
    "scoring": _text,
    "prompt": _text,
    "rendered": _text,
    "target": _text,
    "choices": _texts,
    "answer": _int,  # index into choices, or the token where the whole vocabulary competes; null: none
    "prompt_ids": _ids,
    "target_ids": _ids,
    "choice_ids": _ids,
}
EXAMPLES = _schema("examples", _example, nullable="answer")
CALIBRATION = Table("01_calibrate", "calibration", EXAMPLES)
ALIGNMENT = Table("01_calibrate", "alignment", EXAMPLES)
BENCHMARKS = Table("01_calibrate", "benchmarks", EXAMPLES)

# 02: gradients, attributions
# [2F, 2F] by rows; the gradient in the head's gate for each row of D_safe and of D_util, in their order
_gradients = {"gram": _floats, "gate_safe": _floats, "gate_util": _floats}
GRAM = _schema("gram", {**_head, **_gradients})  # a unit's
GRADIENTS = Table(
    "02_conflict",
    "gradients",
    _schema(
        "gradients",
        {
            **_head,
            "dot": _float,
            "norm_safe": _float,
            "norm_util": _float,
            "optimization_conflict": _float,
            **_gradients,
        },
    ),
    per_map=True,
)
ATTRIBUTIONS = _schema("attributions", {"layer": _int, "neuron": _int, "score": _float})  # a unit's
NEURONS = Table(
    "02_conflict",
    "neurons",
    _schema(
        "neurons",
        {
            "layer": _int,
            "neuron": _int,
            "safety_score": _float,
            "utility_score": _float,
            "safety_rank": _int,  # 0 is the highest score
            "utility_rank": _int,
        },
    ),
    optional=True,
)

# 03: the sweep and the map. Null layer and head: the clean model.
_ablated = {**_head, "example_id": _text}
_written = {**_ablated, "token_ids": _ids, "text": _text}
PREDICTIONS = _schema("predictions", {**_ablated, "prediction": _int}, nullable="layer head")  # a unit's
TEXTS = _schema("texts", _written, nullable="layer head")  # a unit's
SWEEP_CHOICES = Table(
    "03_sensitivity",
    "sweep_choices",
    _schema("sweep_choices", {**_ablated, "prediction": _int, "correct": _bool}, nullable="layer head"),
    optional=True,
)
# Calibration rows that are answered in writing (a map from GSM8K).
SWEEP_ANSWERS = Table(
    "03_sensitivity",
    "sweep_answers",
    _schema("sweep_answers", {**_written, "correct": _bool}, nullable="layer head"),
    optional=True,
)
SWEEP_GENERATIONS = Table(
    "03_sensitivity",
    "sweep_generations",
    _schema("sweep_generations", {**_written, "refused": _bool}, nullable="layer head"),
    optional=True,
)
# Graded outcomes: log p of each row's target (backends.base.Backend.loglikelihoods).
SWEEP_GRADED = Table(
    "03_sensitivity",
    "sweep_graded",
    _schema("sweep_graded", {**_ablated, "loglikelihood": _float}, nullable="layer head"),
    optional=True,
)
_changes = [f"{name}_{kind}" for kind in ("counted", "graded", "gradient") for name in ("h_gen", "h_safe")]
HEADS = Table(
    "03_sensitivity",
    "heads",
    _schema(
        "heads",
        {
            **_head,
            **_interval(
                "optimization_conflict", "h_gen", "h_safe", "functional_sensitivity", "conflict_score"
            ),
            "bucket": _int,
            "bucket_low": _int,
            "bucket_high": _int,
            "bucket_probability": _floats,  # of bucket 1 .. M: stages.method.uncertainty says what it means
            **dict.fromkeys(_changes, _float),  # H by every kind of outcome that was computed
        },
        nullable=" ".join(_changes),
    ),
    per_map=True,
)
RELIABILITY = Table(
    "03_sensitivity",
    "reliability",
    _schema(
        "reliability",
        {
            "map": _text,
            "sensitivity": _text,  # which outcomes S is made of
            "quantity": _text,  # a column of heads.parquet
            "rows_util": _int,
            "rows_safe": _int,
            # stages.method.reliability.Reliability
            "halves": _float,
            "reliability": _float,
            "more_rows": _float,
        },
        nullable="halves reliability more_rows",
    ),
)

# 04: arms
ARMS = Table(
    "04_align",
    "arms",
    _schema(
        "arms",
        {
            **_labels,
            # stages.method.arms.Arm
            "kind": _text,
            "bucket": _int,
            "of": _int,
            "ranked_by": _text,
            "map": _text,
            "share": _int,
            "neurons": _int,
            "lam": _float,
            # what it tunes
            "adapter": _text,
            "layers": _ids,
            "heads": _ids,
            "n_heads": _int,
            "n_layers": _int,
            "safety_neurons": _neurons,
            "utility_neurons": _neurons,
            "n_neurons": _int,
            "trainable_parameters": pa.int64(),
            # means over its heads, in the map that it was chosen by; ranked_mean: of what it was ranked by
            "mean_optimization_conflict": _float,
            "mean_functional_sensitivity": _float,
            "mean_conflict_score": _float,
            "ranked_mean": _float,
        },
        nullable="bucket of ranked_by map share neurons lam mean_optimization_conflict "
        "mean_functional_sensitivity mean_conflict_score ranked_mean",
    ),
)
# Tokens a second stand in the manifest: a table of times could not be the same when a run is made twice.
TRAINING = Table(
    "04_align",
    "training",
    _schema(
        "training",
        {
            **_labels,
            "step": _int,
            "loss": _float,
            "util_loss": _float,
            "cos": _float,
            "projected": _bool,
            "lr": _float,
            "tokens": _int,
        },
        nullable="util_loss cos",
    ),
)

# 05: responses
_output = {
    **_labels,
    "benchmark": _text,
    "example_id": _text,
    "prompt": _text,
    "output": _text,
    "token_ids": _ids,  # what was generated; empty for a choice
    "prediction": _int,  # of a choice: as Example.answer
    "probability": _float,  # of a choice: what the model gives to all candidates together
    "loglikelihood": _float,  # of the row's target, where it has one
}
_no_base = "optimizer seed prediction probability loglikelihood"
OUTPUTS = _schema("outputs", _output, nullable=_no_base)  # a unit's, before they are judged
# A unit's: a classifier's words. unclear: it gave no answer that can be read; what it calls n/a is null.
CLASSIFIED = _schema(
    "classified",
    {"example_id": _text, "unclear": _bool, "refusal": _bool, "harmful": _bool},
    nullable="refusal harmful",
)
RESPONSES = Table(
    "05_evaluate",
    "responses",
    _schema(
        "responses",
        {
            **_output,
            "verdict": _bool,
            "refused": _bool,  # by the keyword judge, of a utility question too; null for a choice
            "harmful": _bool,  # by the classifier, of a request's response
            "steps": _int,  # reasoning steps before a worked answer
            "strict": _bool,  # the two other ways to read a worked answer with a number for gold
            "flexible": _bool,
        },
        nullable=f"{_no_base} refused harmful steps strict flexible",
    ),
)
SCORES = Table(
    "05_evaluate",
    "scores",
    _schema(
        "scores",
        {**_labels, "benchmark": _text, "side": _text, "n": _int, **_interval("score")},
        nullable="optimizer seed",
    ),
)
