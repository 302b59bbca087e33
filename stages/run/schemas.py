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


def _table(stage: str, stem: str, fields: dict[str, pa.DataType], nullable: str = "", **kind: bool) -> Table:
    """A table whose schema has its own name."""
    return Table(stage, stem, _schema(stem, fields, nullable), **kind)


def _interval(*names: str) -> dict[str, pa.DataType]:
    """Each estimate and its 95 % interval."""
    return {f"{name}{suffix}": pa.float64() for name in names for suffix in ("", "_low", "_high")}


_text, _int, _float, _bool = pa.string(), pa.int32(), pa.float64(), pa.bool_()
_ids, _floats, _texts = pa.list_(pa.int32()), pa.list_(pa.float64()), pa.list_(pa.string())
_pairs = pa.list_(pa.list_(pa.int32()))  # (layer, neuron) or (layer, head) each
_head = {"layer": _int, "head": _int}
_labels = {"arm": _text, "optimizer": _text, "seed": _int}
"""null optimizer and seed: the untouched model, arm "base" """

# 01: rows
_example = {
    **dict.fromkeys(("example_id", "source", "entry"), _text),
    "split": _text,  # a map's name ("util"), "safe", "plain", "attacked"; a data type; a benchmark's name
    "scoring": _text,
    "earlier": pa.list_(pa.struct({"role": _text, "content": _text})),  # turns before the prompt
    **dict.fromkeys(("prompt", "prefix", "rendered", "target"), _text),
    "choices": _texts,
    "answer": _int,  # index into choices, or the token where the whole vocabulary competes; null: none
    **dict.fromkeys(("prompt_ids", "target_ids", "choice_ids", "refusal_ids"), _ids),
}
EXAMPLES = _schema("examples", _example, nullable="answer")
CALIBRATION = Table("01_calibrate", "calibration", EXAMPLES)
ALIGNMENT = Table("01_calibrate", "alignment", EXAMPLES)
BENCHMARKS = Table("01_calibrate", "benchmarks", EXAMPLES)

# 02: gradients, attributions
# [2F, 2F] by rows; the gradients in the head's gate for each row of D_safe and of D_util, in their order
GRADIENT_LISTS = ("gram", "gate_safe", "gate_util")
"""columns that hold a list for each head: the fields of backends.base.HeadGradients"""
_gradients = dict.fromkeys(GRADIENT_LISTS, _floats)
GRAM = _schema("gram", {**_head, **_gradients})  # a unit's
_products = dict.fromkeys(("dot", "norm_safe", "norm_util", "optimization_conflict"), _float)
GRADIENTS = _table("02_conflict", "gradients", {**_head, **_products, **_gradients}, per_map=True)
_neuron = {"layer": _int, "neuron": _int}
ATTRIBUTIONS = {
    side: _schema("attributions", {**_neuron, f"{side}_score": _float}) for side in ("safety", "utility")
}
"""of a unit, which has one side"""
_scores = {"safety_score": _float, "utility_score": _float}
_ranks = {"safety_rank": _int, "utility_rank": _int}  # 0 is the highest score
NEURONS = _table("02_conflict", "neurons", {**_neuron, **_scores, **_ranks}, optional=True)

# 03: the sweep and the map. Null layer and head: the clean model.
_ablated = {**_head, "example_id": _text}
_written = {**_ablated, "token_ids": _ids, "text": _text}
_predicted = {**_ablated, "prediction": _int}
PREDICTIONS = _schema("predictions", _predicted, nullable="layer head")  # a unit's
TEXTS = _schema("texts", _written, nullable="layer head")  # a unit's
_correct = {"correct": _bool}
SWEEP_CHOICES = _table(
    "03_sensitivity", "sweep_choices", _predicted | _correct, nullable="layer head", optional=True
)
# Calibration rows that are answered in writing (a map from GSM8K).
SWEEP_ANSWERS = _table(
    "03_sensitivity", "sweep_answers", _written | _correct, nullable="layer head", optional=True
)
SWEEP_GENERATIONS = _table(
    "03_sensitivity",
    "sweep_generations",
    {**_written, "refused": _bool},
    nullable="layer head",
    optional=True,
)
# Graded outcomes: log p of each row's target, or log-odds of refusing (backends.base.Backend.grade).
_graded = {**_ablated, "graded": _float}
SWEEP_GRADED = _table("03_sensitivity", "sweep_graded", _graded, nullable="layer head", optional=True)
# H by every kind of outcome; null where it was not computed.
_changes = [f"{name}_{kind}" for kind in ("counted", "graded", "gradient") for name in ("h_gen", "h_safe")]
_map = {
    **_head,
    **_interval("optimization_conflict", "h_gen", "h_safe", "functional_sensitivity", "conflict_score"),
    **dict.fromkeys(("bucket", "bucket_low", "bucket_high"), _int),
    "bucket_probability": _floats,  # of bucket 1 .. M: stages.method.uncertainty says what it means
    **dict.fromkeys(_changes, _float),
}
HEADS = _table("03_sensitivity", "heads", _map, nullable=" ".join(_changes), per_map=True)
_repeats = {
    "map": _text,
    "sensitivity": _text,  # which outcomes S is made of
    "quantity": _text,  # a column of heads.parquet
    "rows_util": _int,
    "rows_safe": _int,
    **dict.fromkeys(("halves", "reliability", "more_rows"), _float),  # stages.method.reliability.Reliability
}
RELIABILITY = _table("03_sensitivity", "reliability", _repeats, nullable="halves reliability more_rows")

# 04: arms
# stages.method.arms.Arm; null where a field does not apply
_arm = {"kind": _text, "bucket": _int, "of": _int, "ranked_by": _text}
_arm |= {"map": _text, "share": _int, "neurons": _int, "lam": _float, "draw": _int}
_tuned = {"adapter": _text, "layers": _ids, "heads": _ids, "n_heads": _int, "n_layers": _int}
_tuned |= {"safety_neurons": _pairs, "utility_neurons": _pairs, "n_neurons": _int}
_tuned |= {"trainable_parameters": pa.int64()}
_tuned |= {"entered": _ids}  # of a re-diagnosed bucket: heads that entered (and left) at each re-draw
# Means over its heads, in the map that it was chosen by; ranked_mean: of what it was ranked by.
_mean = ("mean_optimization_conflict", "mean_functional_sensitivity", "mean_conflict_score", "ranked_mean")
ARMS = _table(
    "04_align",
    "arms",
    {**_labels, **_arm, **_tuned, **dict.fromkeys(_mean, _float)},
    nullable=" ".join([*list(_arm)[1:], "entered", *_mean]),
)
# Tokens a second stand in the manifest: a table of times could not be the same when a run is made twice.
_step = {"step": _int, "loss": _float, "util_loss": _float, "cos": _float}
_step |= {"projected": _bool, "lr": _float, "tokens": _int}
_step |= {"drawn": _pairs}  # of a re-diagnosed bucket: its heads, where they were drawn before this step
TRAINING = _table("04_align", "training", {**_labels, **_step}, nullable="util_loss cos drawn")

# 05: responses
_output = {
    **_labels,
    **dict.fromkeys(("benchmark", "example_id", "prompt", "output"), _text),
    "token_ids": _ids,  # what was generated; empty for a choice
    "prediction": _int,  # of a choice: as Example.answer
    "probability": _float,  # of a choice: what the model gives to all candidates together
    "graded": _float,  # the graded outcome, where the row has a target or is a request
}
_judged = {
    "verdict": _bool,
    "refused": _bool,  # by the keyword judge, of a utility question too; null for a choice
    "harmful": _bool,  # by the classifier, of a request's response
    "steps": _int,  # reasoning steps before a worked answer
    "strict": _bool,  # the two other ways to read a worked answer with a number for gold
    "flexible": _bool,
}
_no_base = "optimizer seed prediction probability graded"
OUTPUTS = _schema("outputs", _output, nullable=_no_base)  # a unit's, before they are judged
# A unit's: a classifier's words. unclear: it gave no answer that can be read; cut: it read the beginning
# only; what it calls n/a, or does not judge, is null.
_words = {"example_id": _text, "unclear": _bool, "cut": _bool, "refusal": _bool, "harmful": _bool}
CLASSIFIED = _schema("classified", _words, nullable="refusal harmful")
RESPONSES = _table(
    "05_evaluate", "responses", _output | _judged, f"{_no_base} refused harmful steps strict flexible"
)
_score = {"benchmark": _text, "side": _text, "n": _int, **_interval("score")}
SCORES = _table("05_evaluate", "scores", {**_labels, **_score}, nullable="optimizer seed")
# Drift (--drift): the map by gradients again, with each arm's adapter in place.
_measured = dict.fromkeys(("dot", "norm_safe", "norm_util", "h_gen", "h_safe"), _float)
DIAGNOSIS = _schema("diagnosis", {**_labels, **_head, **_measured})  # a unit's
_ranked = ("optimization_conflict", "functional_sensitivity", "conflict_score")
DRIFT = _table(
    "05_evaluate",
    "drift",
    {**_labels, **_head, **_measured, **dict.fromkeys(_ranked, _float), "bucket": _int},
    optional=True,
)
