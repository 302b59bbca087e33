"""The columns of every table that a run writes (DESIGN.md §4). A file names its schema in its metadata."""

from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = "cast-1"


def _schema(name: str, may_lack: Sequence[str] = (), **fields: pa.DataType) -> pa.Schema:
    return pa.schema(
        [pa.field(column, kind, nullable=column in may_lack) for column, kind in fields.items()],
        metadata={"schema": f"{SCHEMA_VERSION}/{name}"},
    )


def _interval(*names: str) -> dict[str, pa.DataType]:
    return {f"{name}{suffix}": pa.float64() for name in names for suffix in ("", "_low", "_high")}


_text, _int, _float, _bool = pa.string(), pa.int32(), pa.float64(), pa.bool_()
_ids = pa.list_(pa.int32())
_neurons = pa.list_(pa.list_(pa.int32()))
"""(layer, neuron) each"""
_head = {"layer": _int, "head": _int}
_arm = {"arm": _text, "optimizer": _text, "seed": _int}

EXAMPLES = _schema(
    "examples",
    example_id=_text,
    source=_text,
    entry=_text,
    role=_text,
    scoring=_text,
    prompt=_text,
    rendered=_text,
    target=_text,
    choices=pa.list_(pa.string()),
    answer=_int,
    prompt_ids=_ids,
    target_ids=_ids,
    choice_ids=_ids,
)
GRAM = _schema("gram", **_head, gram=pa.list_(pa.float64()))
GRADIENTS = _schema(
    "gradients",
    **_head,
    dot=_float,
    norm_safe=_float,
    norm_util=_float,
    **_interval("conflict"),
    gram=pa.list_(pa.float64()),
)
# layer = head = -1 is the clean model.
SWEEP_CHOICES = _schema("sweep_choices", **_head, example_id=_text, prediction=_int, correct=_bool)
SWEEP_GENERATIONS = _schema(
    "sweep_generations", **_head, example_id=_text, token_ids=_ids, text=_text, refused=_bool
)
# Calibration rows whose answer is written (a map from GSM8K).
SWEEP_ANSWERS = _schema("sweep_answers", **_head, example_id=_text, token_ids=_ids, text=_text, correct=_bool)
SCORED = _schema("scored", layer=_int, neuron=_int, score=_float)
# NeuronTune's scores; rank 0 is the highest.
NEURONS = _schema(
    "neurons",
    layer=_int,
    neuron=_int,
    safety=_float,
    utility=_float,
    safety_rank=_int,
    utility_rank=_int,
)
HEADS = _schema(
    "heads",
    **_head,
    **_interval("conflict", "h_gen", "h_safe", "sensitivity", "score"),
    bucket=_int,
    bucket_low=_int,
    bucket_high=_int,
    bucket_probability=pa.list_(pa.float64()),
)
# An arm of neurons has no heads, and means of none; an arm of heads no neurons.
ARMS = _schema(
    "arms",
    may_lack=("mean_conflict", "mean_sensitivity", "mean_score"),
    **_arm,
    adapter=_text,
    layers=_ids,
    heads=_ids,
    n_heads=_int,
    n_layers=_int,
    safety_neurons=_neurons,
    utility_neurons=_neurons,
    n_neurons=_int,
    trainable_parameters=pa.int64(),
    mean_conflict=_float,
    mean_sensitivity=_float,
    mean_score=_float,
)
# Tokens a step stand here; tokens a second stand in the manifest, because a table of times could not be
# identical when the same run is made twice.
TRAINING = _schema(
    "training",
    **_arm,
    step=_int,
    loss=_float,
    util_loss=_float,
    cos=_float,
    projected=_bool,
    lr=_float,
    tokens=_int,
)
_response = {
    **_arm,
    "benchmark": _text,
    "example_id": _text,
    "prompt": _text,
    "output": _text,
    "token_ids": _ids,  # what was generated, for who judges or compares again; empty for a choice
    "prediction": _int,
    "probability": _float,
}
OUTPUTS = _schema("outputs", **_response)  # a unit's, before they are judged
# clear: the classifier gave its three lines; what it calls n/a is null.
CLASSIFIED = _schema("classified", may_lack=("refusal", "harmful"), clear=_bool, refusal=_bool, harmful=_bool)
RESPONSES = _schema(
    "responses",
    may_lack=("harmful", "strict", "flexible"),
    **_response,
    verdict=_bool,
    refused=_bool,  # the keyword judge's word, of a utility question too; False for a choice
    harmful=_bool,  # the classifier's word on a request's response; null where none was asked
    steps=_int,  # reasoning steps before a worked answer; -1 for all other rows
    strict=_bool,  # the two other ways to read a worked answer with a number for gold; null elsewhere
    flexible=_bool,
)
SCORES = _schema("scores", **_arm, benchmark=_text, side=_text, n=_int, **_interval("score"))
