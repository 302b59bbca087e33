"""Bad input ends in one line and exit code 2, and leaves everything as it is.

Refused rows of a user's JSONL are in test_jsonl, engines' in test_launch, model folders' attributes in
test_models.
"""

import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backends import models
from backends.core.files import sha256, write_json
from stages.run import cli
from stages.run.locks import run_lock
from stages.run.pipeline import STAGES, declaration
from stages.run.schemas import CALIBRATION
from stages.run.store import MANIFEST, PARTS, RUN_FILE, STARTED, read_json, read_table, write_table
from tests.conftest import ROOT
from tests.runs import TINY

NUMBERED = {name[:2]: name for name in STAGES}
HEADS, GRADIENTS = "03_sensitivity/heads.parquet", "02_conflict/gradients.parquet"
ADAPTER = "04_align/adapters/bucket4-sft-21/adapter_model.safetensors"
Spoil = Callable[[Path], object]


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture()
def refuses(monkeypatch, capsys):
    """Whether a command ends as it should: one line (but for the list of what cannot be had), nothing
    written."""

    def check(stage: str, run: Path, options: str, message: str) -> None:
        before = everything(run)
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["stage", "--run", str(run), *options.split()])
        with pytest.raises(SystemExit) as stop:
            cli.run(declaration(NUMBERED[stage]))
        assert stop.value.code == 2
        _, _, line = capsys.readouterr().err.rpartition("error: ")
        assert line.count("\n") == 1 or line.startswith("what this run needs cannot be had:\n"), line
        assert re.search(message, line), line
        said, _, _ = line.partition(" twice: ")  # names of options follow
        assert not re.search(r"(?i)(?<!\S)([a-z-]+:?) \1(?!\S)", said), f"a word twice: {line}"
        assert everything(run) == before

    return check


# Command lines

OPTIONS = [
    ("--preset nope", "unknown preset 'nope': choose smollm"),
    ("--preset ./no/folder", "no model folder ./no/folder"),
    ("--presett tiny", "unknown option --presett"),
    ("--rank many", "--rank"),
    ("--mask keys", "--mask"),
    ("--backend jax", "--backend"),
    ("--dtype float16", "--dtype"),
    ("--optimizers adam", "--optimizers"),
    ("--rank 0", "--rank must be positive, not 0"),
    ("--gain-lr 0", "--gain-lr must be positive"),
    ("--folds 0", "--folds must be positive"),
    ("--folds 1", "--folds 1: rows are resampled by folds, at least 2"),
    ("--resamples 19", "--resamples 19: intervals need at least 20"),
    ("--date 2024-07-26", "--date '2024-07-26': a day as in '26 Jul 2024'"),
    ("--lr nan", "--lr must be positive, not nan"),
    ("--alpha inf", "--alpha must be positive, not inf"),
    ("--seed -1", "--seed must lie in 0 to"),
    ("--seeds 21 99999999999999999999", "--seeds must lie in 0 to"),
    ("--align-rows 6", "multiple of 4"),
    ("--benign-share 1", "--benign-share 1.0: must lie between 0 and 1"),
    ("--align-rows 8 --benign-share 0.9", "--align-rows 8 are too few"),
    ("--util-rows 14", "--util-rows must be a multiple of --folds 4"),
    ("--util-rows 2", "--util-rows 2 is fewer than --folds"),
    ("--safe-rows 6", "--safe-rows must be a multiple of --folds 4"),
    ("--seeds 1 1", "--seeds names something twice: 1 1"),
    ("--arms", "--arms must not be empty"),
    ("--util /no/file.jsonl", "--util /no/file.jsonl: there is no such file"),
    ("--model-parallel -1", "--model-parallel must not be negative"),
    ("--processes -1", "--processes must not be negative"),
    ("--pairs -1", "--pairs must not be negative"),
    ("--shard 3/2", "--shard 3/2: i/n"),
    ("--shard \u00b2/3", "--shard \u00b2/3: i/n"),
    ("--shard 0/2", "--shard 0/2: i/n"),
    ("--shard half", "--shard half: i/n"),
    ("--shard 1/2", "--shard is for stages 02 to 05"),
    # quantized weights
    ("--quantize int4", "--quantize"),
    ("--quantize nf4", "--quantize nf4 computes in bfloat16, not in float32: say --dtype bfloat16"),
    ("--quantize nf4 --dtype auto --backend flax", "--quantize nf4 is not handled by --backend flax"),
    ("--quantize int8 --dtype auto --model-parallel 2", "--quantize int8 is for one device"),
    ("--quantize int8 --dtype auto --pairs 8", "NeuronTune is not handled on quantized weights"),
    ("--quantize nf4 --dtype auto --device cpu", "--quantize nf4 needs CUDA, and --device cpu is none"),
    # arms
    ("--arms bucket9", "--arms: unknown arm 'bucket9'"),
    ("--arms bucket0", "unknown arm"),
    ("--arms neurons", "--arms: unknown arm"),
    ("--ablations top33", "--ablations: unknown arm 'top33'"),
    ("--ablations buckets@math", "@math needs --maps math=POOL:ROWS"),
    ("--neurons 16", "--neurons: arms of neurons need --pairs"),
    ("--ablations randomneurons8", "--ablations: arms of neurons need --pairs"),
    ("--neurons -1 --pairs 8", "--neurons must not be negative"),
    ("--neurons 4 --lam 1.5 --pairs 8", "--lam is a share"),
    # maps
    ("--maps math", "--maps: 'math' should be name=pool:rows"),
    ("--maps util=embedded/util:8", "util is the name of the run's own rows"),
    ("--maps math=embedded/util:6", "6 rows of math are no multiple of --folds 4"),
    ("--maps a=embedded/util:8 a=embedded/util:4", "gives one name twice"),
    # benchmarks
    ("--benchmarks nope=5", "unknown benchmark 'nope'"),
    ("--benchmarks facts=x vanilla=5", "should be name=rows"),
    ("--benchmarks facts=5", "at least one safety"),
    ("--benchmarks vanilla=5", "at least one utility"),
    ("--benchmarks facts=5 facts=6 vanilla=5", "names one twice"),
    ("--benchmarks facts=5 mmlu=5 vanilla=5", "only one of"),
    ("--benchmarks own_util=5 vanilla=5", "needs rows of your own"),
    ("--benchmarks facts=4 vanilla=4:0", "vanilla writes its answers"),
    # what stage 01 finds out
    ("--util-source embedded/nothing", "no embedded pool 'nothing'"),
    ("--align-source nothing", "--align-source"),
    ("--util-source embedded/problems", "calibration rows are scored by the next token"),
    ("--max-length 4", "vanilla_harmful: no row is left .* too long"),
    ("--model /no/such/model", "no model folder"),
    ("--judge wildguard --judge-model nowhere", "--judge wildguard: no model folder nowhere"),
    ("--judge hf:nowhere:REFUSAL", "--judge hf:nowhere:REFUSAL: no model folder nowhere .--judge."),
    ("--judge gpt", "--judge gpt: keyword, wildguard, or hf:MODEL:LABEL"),
    ("--judge hf:me/it", "--judge hf:me/it: keyword, wildguard, or hf:MODEL:LABEL"),
    ("--judge hf:me/it:REFUSAL --judge-input text", "--judge-input 'text' has no {response}"),
    ("--pairs 8 --neurons 385", "--neurons 385 .arm neurons385.: the model has 384 neurons"),
    ("--buckets 13 --arms full", "--buckets 13: the model has 12 heads"),
    ("--ablations bucketsof16", "--buckets 16: the model has 12 heads"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_command_lines(options, message, refuses, scratch):
    preset = "" if options.startswith("--preset") else "--preset tiny "
    refuses("01", scratch / "run", preset + options, message)


def test_a_program_ends_with_one_line_and_code_2(scratch):
    """The whole of it, as a process."""
    command = [sys.executable, "-m", "stages.02_conflict", "--run", str(scratch / "run"), "--rank", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert ended.stderr == "error: --rank must be positive, not 0\n"


# Folders


def remove(file: str) -> Spoil:
    return lambda folder: (folder / file).unlink()


def write(file: str, text: str) -> Spoil:
    return lambda folder: (folder / file).write_text(text)


def edit(file: str, **values: object) -> Spoil:
    """Other values in a JSON file."""
    return lambda folder: write_json(folder / file, read_json(folder / file) | values)


def damage(file: str) -> Spoil:
    """One bit of it is another."""

    def spoil(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)

    return spoil


def without(file: str, key: str) -> Spoil:
    """A JSON file lacks a key."""

    def spoil(folder: Path) -> None:
        content = read_json(folder / file)
        del content[key]
        write_json(folder / file, content)

    return spoil


MODELS = [
    (remove("config.json"), "no model folder .no config.json"),
    (write("config.json", "{"), "config.json cannot be read"),
    (write("config.json", "[]"), "config.json holds no JSON object"),
    (remove("model.safetensors"), "has no model.safetensors"),
    (edit("config.json", architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel is not handled"),
    (edit("config.json", architectures="LlamaForCausalLM"), "architectures = 'LlamaForCausalLM' is no list"),
    (without("config.json", "model_type"), "model_type of LlamaForCausalLM is 'llama', not None"),
    (edit("config.json", model_type="nope"), "model_type of LlamaForCausalLM is 'llama', not 'nope'"),
    (edit("config.json", logit_scale=0), "attribute logit_scale = 0 is not handled"),
    (edit("config.json", num_attention_heads=5), "cannot be used .*hidden size .64. is not a multiple"),
    (edit("config.json", num_attention_heads="4"), "cannot be used .*'num_attention_heads' expected int"),
    (edit("config.json", num_key_value_heads=3), "num_attention_heads 4 is no multiple"),
    (edit("config.json", num_hidden_layers=0), "sizes must be positive"),
    (edit("config.json", rope_parameters="x"), "rope parameters are 'x'"),
    (edit("config.json", rope_parameters={"rope_theta": "x"}), "rope parameter rope_theta = 'x'"),
    (edit("config.json", vocab_size=1023), "the tokenizer's ids go up to 1023, vocab_size is 1023 only"),
    (write("generation_config.json", "{"), "generation_config.json cannot be read"),
    (edit("generation_config.json", eos_token_id="end"), "eos_token_id = .'end'. is no token id"),
    (edit("tokenizer_config.json", eos_token=None), "the tokenizer has no EOS token"),
]


@pytest.mark.parametrize(("spoil", "message"), MODELS, ids=[message for _, message in MODELS])
def test_model_folders(spoil, message, refuses, scratch):
    folder = Path(shutil.copytree(models.local_folder("random/tiny"), scratch / "model"))
    spoil(folder)
    refuses("01", scratch / "run", f"--preset tiny --model {folder}", message)
    refuses("01", scratch / "run", f"--preset tiny --judge wildguard --judge-model {folder}", message)


def test_only_the_runs_own_model_needs_a_chat_template(refuses, scratch):
    folder = Path(shutil.copytree(models.local_folder("random/tiny"), scratch / "model"))
    (folder / "chat_template.jinja").unlink()
    refuses("01", scratch / "run", f"--preset tiny --model {folder}", "no chat template")
    declaration("01_calibrate").before(TINY.replace(judge="wildguard", judge_model=str(folder)))


def unlisted(run: Path) -> None:
    """A manifest does not know of a table."""
    outputs = read_json(run / "03_sensitivity" / MANIFEST)["outputs"]
    del outputs["heads.parquet"]
    edit(f"03_sensitivity/{MANIFEST}", outputs=outputs)(run)


def resealed(relative: str, schema: str) -> Spoil:
    """A table is another, of that schema, and its manifest knows."""

    def spoil(run: Path) -> None:
        stage, file = relative.split("/")
        now = pq.read_schema(run / relative)
        rows = read_table(run / relative, now).iloc[::-1]
        write_table(run / relative, rows, now.with_metadata({"schema": schema}))
        outputs = read_json(run / stage / MANIFEST)["outputs"]
        edit(f"{stage}/{MANIFEST}", outputs=outputs | {file: sha256(run / relative)})(run)

    return spoil


def unfinished(stage: str, part: str | None = None, **model: str) -> Spoil:
    """A stage was stopped while another `model` computed it; `part`: what one of its parts was made from."""

    def spoil(run: Path) -> None:
        folder = run / NUMBERED[stage]
        manifest = read_json(folder / MANIFEST)
        (folder / MANIFEST).unlink()
        state = {"model": manifest["model"] | model, "judging_again": False, "units": {}}
        write_json(folder / STARTED, {name: manifest[name] for name in ("settings", "inputs")} | state)
        if part is not None:
            (folder / PARTS).mkdir()
            table = pa.table({"a": [1]}).replace_schema_metadata(
                {"made_from": part, "info": "{}"} if part else {}
            )
            pq.write_table(table, folder / PARTS / "choices-clean.parquet")

    return spoil


STATES: list[tuple[str, str | None, Spoil | None, str, str]] = [
    # stage, the first stage that the run lacks, what is wrong, options, message
    ("03", None, remove(HEADS), "", "heads.parquet is missing, though the manifest lists it: delete"),
    ("03", None, damage(HEADS), "", "heads.parquet is not what its manifest says"),
    (
        "03",
        None,
        write(f"03_sensitivity/{MANIFEST}", "{"),
        "",
        "manifest.json cannot be read.*delete its folder",
    ),
    ("04", None, None, "--lr 5", "was made with other settings .lr 0.1 -> 5.0.: delete"),
    ("01", None, None, "--seed 5", "was made with other settings .seed 0 -> 5.: delete"),
    ("03", None, resealed(GRADIENTS, "cast-2/gradients"), "", "was made from another .*gradients.parquet"),
    # inputs
    ("02", "01", None, "", "manifest.json is missing: run `python -m stages.01_calibrate --run .* first"),
    ("05", "04", None, "", "manifest.json is missing: run `python -m stages.04_align --run .* first"),
    ("04", "04", remove(HEADS), "", "heads.parquet is missing, though its manifest lists it"),
    ("04", "04", damage(HEADS), "", "heads.parquet is not what its manifest says"),
    ("04", "04", unlisted, "", "does not list heads.parquet"),
    ("05", "05", damage(ADAPTER), "", "adapter_model.safetensors is not what its manifest says"),
    ("02", "02", resealed(CALIBRATION.path(), "cast-1/x"), "", "has not the columns of cast-2/examples"),
    # settings
    ("05", "05", None, "--lr 5", "--lr: .*04_align rests on 0.1, not 5.0: choose another --run"),
    ("05", None, unfinished("05"), "--lr 5", "was made with other settings .lr 0.1 -> 5.0.: delete"),
    ("05", "05", None, "--preset smollm", "belongs to preset tiny, not smollm"),
    ("05", None, edit(RUN_FILE, warp=9), "", "settings that this version does not know .warp."),
    ("05", None, write(RUN_FILE, "{"), "", "run.json cannot be read"),
    ("05", None, write(RUN_FILE, "[]"), "", "run.json holds no JSON object"),
    (
        "05",
        None,
        None,
        "--judge wildguard --judge-model /no/such",
        "no model folder /no/such .--judge-model.",
    ),
    # parts
    ("03", None, unfinished("03", dtype="bfloat16"), "", "parts in .* computed otherwise .dtype 'bfloat16'"),
    ("03", None, unfinished("03", part=""), "", "choices-clean.parquet is damaged"),
    ("03", None, unfinished("03", part="x"), "", "choices-clean.parquet was made from something else"),
    ("03", "03", None, "--shard units=a", "03_sensitivity has no unit a; it has choices-clean, "),
    # where it is computed
    ("02", "02", None, "--device abacus", "torch knows cpu"),
    ("02", "02", None, "--device cuda:99", "--device cpu"),
    # a shard takes the run's own settings, also those that its stage does not rest on
    ("03", "03", None, "--shard 2/2 --lr 5", "--lr: a shard takes the run's own settings, 0.1 and not 5.0"),
]


@pytest.mark.parametrize(
    ("stage", "before", "spoil", "options", "message"), STATES, ids=[state[-1] for state in STATES]
)
def test_run_folders(stage, before, spoil, options, message, refuses, copy_run):
    run = copy_run(before=before and NUMBERED[before])
    if spoil:
        spoil(run)
    refuses(stage, run, options, message)


# The machine


def test_another_model_or_tokenizer(refuses, copy_run, monkeypatch):
    run = copy_run(before="03_sensitivity")
    hashes = models.model_hashes(models.local_folder("random/tiny"))
    for name in hashes:
        monkeypatch.setattr(models, "model_hashes", lambda folder, name=name: hashes | {name: "0" * 64})
        refuses("03", run, "", f"the model in .* is not that of .*02_conflict .another {name}.")
    monkeypatch.setattr(models, "tokenizer_sha256", lambda folder: "0" * 64)
    refuses("03", run, "", "the tokenizer in .* is not the one stage 01 used")


def test_folders_that_are_in_use_full_or_cannot_be_written(refuses, copy_run, scratch, monkeypatch):
    run = copy_run(before="03_sensitivity")
    with run_lock(run, (1, 2)), run_lock(run, (2, 2)), run_lock(run, frozenset({"choices-clean"})):
        refuses("03", run, "", "in use by another process")
        refuses("03", run, "--shard 1/2", "in use by another process")
    (scratch / "file").write_text("")
    refuses("01", scratch / "file" / "run", "--preset tiny", "cannot be written")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**10))
    refuses("03", run, "", "has 0.00 GiB free, stage 03_sensitivity wants .*: make space")
