"""Models, tokenizers and rows as other people have them: each ends in the right numbers or in one line."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import backends
from backends import models as folders
from backends.core import locking
from backends.core.errors import InputError
from backends.models import sources
from stages import audit
from stages.run import presets
from stages.run.locks import run_lock
from stages.run.pipeline import STAGES
from stages.run.settings import Settings, check, option
from stages.run.store import read_json
from tests.runs import TINY, make_run

Spoil = Callable[[Path], object]
TEMPLATE = "chat_template.jinja"


@pytest.fixture()
def tiny(scratch) -> Path:
    """A copy of the tiny model's folder, to be changed."""
    return Path(shutil.copytree(folders.local_folder("random/tiny"), scratch / "model"))


def edit(file: str, **values: object) -> Spoil:
    """Other values in a JSON file."""
    return lambda folder: (folder / file).write_text(json.dumps(read_json(folder / file) | values))


def template(old: str, new: str) -> Spoil:
    """Another chat template."""
    return lambda folder: (folder / TEMPLATE).write_text((folder / TEMPLATE).read_text().replace(old, new))


def drawn(folder: Path, run: Path, **settings: object) -> dict:
    """The notes of stage 01 with a model."""
    make_run(run, TINY.replace(model=str(folder), **settings), STAGES[:1])
    return read_json(run / STAGES[0] / "manifest.json")["notes"]


# What ends a response

ENDS = [
    # what is changed, the ids that end a response, what is said
    (lambda folder: None, {1}, []),
    (edit("generation_config.json", eos_token_id=[1, 0]), {0, 1}, []),
    (edit("generation_config.json", eos_token_id=0), {0, 1}, ["the tokenizer's EOS ends", "template's turn"]),
    (
        edit("tokenizer_config.json", eos_token="<|begin|>"),
        {0, 1},
        ["the tokenizer's EOS ends with '<|begin|>'"],
    ),
    (
        template("<|end|>", "<|user|>"),
        {1, 3},
        ["the chat template's turn ends with '<|user|>' (3), by the configuration a response ends with 1"],
    ),
    (template("<|end|>", ""), {1}, ["writes no token of its own after an assistant's turn"]),
]


@pytest.mark.parametrize(("spoil", "ends", "said"), ENDS)
def test_what_ends_a_response(tiny, scratch, spoil, ends, said):
    spoil(tiny)
    assert set(folders.stop_ids(tiny)) == ends
    assert backends.load("torch", tiny, device="cpu").model.eos == ends
    warnings = drawn(tiny, scratch / "run").get("warnings", [])
    assert all(any(each in warning for warning in warnings) for each in said)
    assert len(folders.disagreements(tiny)) == len(said)


# Whose ids they are


def test_a_tokenizers_class_makes_no_other_ids_than_its_file(tiny):
    """Cohere's takes the file's vocabulary, and cuts digits by itself; Gemma's does not take such a file."""
    raw = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    texts = ["What is 2 + 2?", "  two\n\nlines", "Größe 12"]
    expected = [raw.encode(text, add_special_tokens=False).ids for text in texts]
    moved, classes = [], ("Qwen2Tokenizer", "CohereTokenizer", "GemmaTokenizer", "GPT2Tokenizer")
    for name in classes:
        edit("tokenizer_config.json", tokenizer_class=name)(tiny)
        with contextlib.suppress(Exception):  # some refuse the file altogether
            by_class = transformers.AutoTokenizer.from_pretrained(tiny)
            moved.append(by_class(texts, add_special_tokens=False).input_ids != expected)
        assert folders.load_tokenizer(tiny)(texts, add_special_tokens=False).input_ids == expected
    assert any(moved), "by one of the classes they are others"


def test_a_tokenizer_that_cannot_be_as_its_file_is_refused(tiny):
    edit("tokenizer_config.json", split_special_tokens=True)(tiny)
    with pytest.raises(InputError, match="makes other token ids than tokenizer.json has"):
        folders.load_tokenizer(tiny)


def resized(rows: int) -> Spoil:
    """The embedding has so many rows."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        matrix = tensors[folders.EMBEDDING]
        tensors[folders.EMBEDDING] = np.resize(matrix, (rows, matrix.shape[1]))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def with_token(content: str, special: bool = True, in_template: bool = False) -> Spoil:
    """The tokenizer has a token more than the embedding rows."""

    def spoil(folder: Path) -> None:
        own = read_json(folder / "tokenizer.json")
        more = own["added_tokens"][0] | {"id": 1024, "content": content, "special": special}
        (folder / "tokenizer.json").write_text(
            json.dumps(own | {"added_tokens": [*own["added_tokens"], more]})
        )
        if in_template:
            (folder / TEMPLATE).write_text(content + (folder / TEMPLATE).read_text())

    return spoil


PAST = [
    (resized(1000), "weight model.embed_tokens.weight has 1000 rows, by config.json it is 1024"),
    (resized(1100), "weight model.embed_tokens.weight has 1100 rows, by config.json it is 1024"),
    (
        edit("config.json", vocab_size=1023),
        "go up to 1023, vocab_size is 1023 only: token '.*' has no row",
    ),
    (
        with_token("word", special=False),
        "go up to 1024, vocab_size is 1024 only: token 'word' has no row",
    ),
    (
        with_token("<|more|>", in_template=True),
        "token '<|more|>' of the prompts has id 1024, and the model's embedding 1024 rows",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), PAST, ids=[message for _, message in PAST])
def test_ids_past_the_embedding_end_in_stage_01(tiny, scratch, spoil, message):
    spoil(tiny)
    with pytest.raises(InputError, match=message.replace("|", r"\|")) as raised:
        drawn(tiny, scratch / "run")
    assert "\n" not in str(raised.value)


def test_a_control_token_that_no_prompt_has_needs_no_embedding(tiny, scratch):
    """As Gemma 3's for images."""
    with_token("<|image|>")(tiny)
    assert drawn(tiny, scratch / "run")["counts"]["util"] == 16


# Rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.long
def test_the_audit_takes_what_stage_01_took(scratch):
    """Control tokens, blanks, line ends of every kind, other scripts, in prompts and targets."""
    texts = [
        "What is <|end|> {}?",
        "<|begin|>{}",
        " {} <|end|>\n<|assistant|>Sure",
        "  {}\r\n",
        "Größe ж 日 {}\t",
        "\u2028{}\u00a0",
        "{{% if {} %}}",
        "\x00{}\ufeff",
    ]
    several = [(text, number) for number in range(6) for text in texts]
    util = [{"prompt": text.format(number), "target": f" A{number} <|end|>"} for text, number in several]
    letters = {"choices": ["A", "B <|end|>"], "answer": 1, "target": "B <|end|>"}
    util[::3] = [row | letters for row in util[::3]]
    safe = [{"prompt": text.format(100 + number), "target": "I cannot <|user|>."} for text, number in several]
    settings = TINY.replace(
        util=write_rows(scratch / "util.jsonl", util),
        safe=write_rows(scratch / "safe.jsonl", safe),
        benchmarks=("own_util=16", "own_safe=16:6"),
        arms=("full",),
    )
    run = make_run(scratch / "run", settings, STAGES)
    notes = read_json(run / STAGES[0] / "manifest.json")["notes"]
    assert any("rows hold control tokens, which are read as text" in text for text in notes["warnings"])
    assert audit.main(run) == 0
    notes = read_json(run / "05_evaluate/manifest.json")["notes"]
    likely = notes["candidate_probability"]["own_util"]
    assert list(likely) == ["base", "full-sft-21"] and 0 < min(likely.values()) < 0.5
    assert any(
        f"as {likely['base']:.2f} of base: they answer otherwise" in text for text in notes["warnings"]
    )
    page = (run / "06_correlate/report.html").read_text()
    assert "they answer otherwise" in page and "Probability that the candidates get together" in page


# Configurations

INERT = [
    {"is_llama_config": True, "rope_interleaved": False},  # as the hub's SmolLM2
    {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    {"unsloth_fixed": True, "unsloth_version": "2024.9"},
    {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1},
    {
        "temperature": 0.6,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "length_penalty": 0.5,
        "bad_words_ids": [[1]],
    },
    {"torch_dtype": "bfloat16", "_name_or_path": "someone/model", "tokenizer_class": "LlamaTokenizer"},
]


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize("marks", INERT, ids=[next(iter(marks)) for marks in INERT])
def test_what_changes_nothing_is_passed_over(tiny, backend, marks):
    before = folders.model_hashes(tiny)
    edit("config.json", **marks)(tiny)
    backends.check_folder(backend, tiny)
    if "rope_interleaved" not in marks:  # by name it could change something
        assert folders.model_hashes(tiny) == before


def damage(file: str, content: bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(content)


CONFIGS = [
    *(
        (damage("config.json", content), "config.json cannot be read")
        for content in (b"", b"{", b"\xff\xfe\x00")
    ),
    *(
        (damage("config.json", content), "config.json holds no JSON object")
        for content in (b"null", b"[]", b"3")
    ),
    (damage("config.json", b"{}"), "architecture none named is not handled"),
    (damage("generation_config.json", b""), "generation_config.json cannot be read"),
    (damage("generation_config.json", b"[]"), "generation_config.json holds no JSON object"),
    (damage("tokenizer.json", b""), "the tokenizer cannot be loaded"),
    (damage("tokenizer.json", b"{}"), "the tokenizer cannot be loaded"),
    (damage("tokenizer_config.json", b"{}"), "the tokenizer has no EOS token"),
    (damage("chat_template.jinja", b""), "the tokenizer has no chat template"),
    (damage("model.safetensors", b""), "the weights cannot be loaded"),
    (damage("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    (edit("config.json", model_type=[]), r"model_type of LlamaForCausalLM is 'llama', not '\[\]'"),
    (edit("config.json", head_dim=0), "sizes must be positive"),
    (edit("config.json", hidden_act="nope"), "attribute hidden_act = 'nope' is no"),
    (edit("config.json", rms_norm_eps=float("nan")), "attribute rms_norm_eps = nan is no finite number"),
    (edit("config.json", rms_norm_eps=float("inf")), "attribute rms_norm_eps = inf is no finite number"),
    (edit("config.json", quantization_config={}), "quantization_config"),
    (edit("config.json", logit_scale=0), "attribute logit_scale = 0 is not handled"),
]


@pytest.mark.parametrize("backend", ["torch", "flax"])
@pytest.mark.parametrize(("spoil", "message"), CONFIGS)
def test_damaged_and_other_configurations_end_in_one_line(tiny, backend, spoil, message):
    spoil(tiny)
    with pytest.raises(InputError, match=message) as raised:
        backends.check_folder(backend, tiny)
        folders.load_tokenizer(tiny)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes", [{"foo": 0}, {"foo": 3}, {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_flax_refuses_what_it_does_not_know(tiny, changes):
    edit("config.json", **changes)(tiny)
    with pytest.raises(
        InputError, match="attribute foo = . is not handled|rope_type 'linear' is not handled"
    ):
        backends.check_folder("flax", tiny)


# The machine


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(scratch, monkeypatch, number):
    """NFS without its lock service, FUSE: files stand in, and keep apart what locks would."""

    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(locking, "MOMENT", 0.1)
    run = scratch / "run"
    make_run(run, TINY, STAGES[:1])
    (warning,) = read_json(run / STAGES[0] / "manifest.json")["notes"]["warnings"][:1]
    assert warning.startswith(f"the file system of {run} has no locks")
    with (
        run_lock(run, None),
        pytest.raises(InputError, match=r"in use by another .*\.lock\.soft: del"),
    ):
        run_lock(run, (1, 2)).__enter__()
    with run_lock(run, (1, 2)), run_lock(run, (2, 2)), run_lock(run, frozenset({"a"})):
        for again in (None, (1, 2)):
            with pytest.raises(InputError, match="in use by another process"):
                run_lock(run, again).__enter__()
    with run_lock(run, None) as soft:
        assert soft
    assert not list(run.glob("*.soft*"))
    monkeypatch.setenv("CAST_CACHE", str(scratch / "cache"))
    made = sources._made_once("thing", "x/y", lambda folder: (folder / "a").write_text(""))
    assert (made / "a").is_file()


def test_a_killed_process_holds_no_soft_lock(scratch, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    scratch.mkdir(exist_ok=True)
    marker = scratch / ".lock.soft"
    marker.write_text(f"{gone.pid}\n{socket.gethostname()}\n")
    with run_lock(scratch, None) as soft:
        assert soft


FIELDS = [
    (field.name, type(getattr(group, field.name)))
    for group in (getattr(Settings(), own.name) for own in dataclasses.fields(Settings))
    for field in dataclasses.fields(group)
]
NUMBERS = [
    *(
        (name, value)
        for name, kind in FIELDS
        if kind is float
        for value in (math.nan, math.inf, -math.inf, -0.5)
    ),
    *((name, -1) for name, kind in FIELDS if kind is int),
    *((name, (value,)) for name, value in (("lam", math.nan), ("lam", -0.5), ("seeds", -1), ("neurons", -1))),
]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_that_are_none_are_refused_by_name(name, value):
    with pytest.raises(InputError) as raised:
        check(TINY.replace(**{"pairs": 8} | {name: value}))
    assert str(raised.value).startswith(option(name)) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device cuda:99", "--device cuda:99: torch .* sees"),
        ("--device abacus", "--device abacus: no such device"),
        ("--device tpu --backend flax", "--device tpu: JAX .* sees"),
    ],
)
def test_a_device_is_missed_before_the_first_stage(options, message):
    """By the command that begins a run; what is computed elsewhere (--slurm) may name others."""
    with pytest.raises(InputError, match=message):
        presets.checked(["--preset", "tiny", *options.split()])
