"""The public data sets of the paper (section 4.1, appendix A), from the hub or from a folder of your own.

    missing(["mmlu", "wildguard"])    # one line for each pool that cannot be reached; [] = all can
    load("mmlu").records              # every row, in the source's order; drawing a sample is up to the caller

`CAST_DATA=DIR` reads `DIR/<name>_<split>.parquet` with the hub's columns; where there is only a
`<name>_<split>_schema_standin.parquet`, that is read and `provenance.standin` is set. Without CAST_DATA the
pinned revision is loaded from the hub; only then are the hub's libraries imported. Decisions to know of:
- `entry` is a hash of the normalised question; for WildJailbreak's train split, of the *vanilla* question, so
  that its two forms share it. MMLU repeats questions across splits, and `wildjailbreak_safe` has the rows of
  `vanilla_harmful` (the paper takes both from there): compare entries before drawing.
- `dan`: the stand-in for WildJailbreak's train split is built from half of the DAN prompts. Where CAST_DATA
  offers that stand-in, `dan` holds only rows with standin_half = "heldout", and `provenance.note` says so.
- `wildguard` leaves out repeats of a prompt. WildJailbreak's train split is machine-written: rows without a
  question or completion are left out and counted in `provenance.note`. Elsewhere an empty text is an error.
- Error messages name file, row (from 0) and column, never a row's text.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.examples import Record
from data.jsonl import DATA_TYPES, entry_of

# Table 4. The paper "appends" the input to the instruction and does not say by what: a blank line here.
REASONING_TEMPLATE = (
    "Solve the math problem step by step. Write the final answer inside a LaTeX \\boxed{} expression.\n\n"
    "{question}"
)
KNOWLEDGE_TEMPLATE = (
    "Read the multiple-choice question carefully and output only the capital letter (A, B, C, D, or E) that "
    "corresponds to the correct choice. Do not include any explanation or extra text.\n\n{question}"
)
SAFETY_TEMPLATE = "{question}"
LETTERS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True)
class Provenance:
    """Where a pool's rows came from; no path of this machine is in it."""

    name: str  # the pool
    repository: str
    revision: str  # commit on the hub; "local" for files of CAST_DATA, whose identity is `sha256`
    location: str  # "hub" or the file name(s), joined by " + "
    sha256: str  # of the file(s), joined alike; from the hub, of the rows read (not of any cache)
    rows: int
    standin: bool  # the rows only have the set's columns: no score on them compares with a published one
    note: str = ""  # what a table that rests on this pool has to say, if anything


@dataclass(frozen=True)
class Loaded:
    records: list[Record]
    provenance: Provenance


class _EmptyTextError(ValueError):
    pass


@dataclass(frozen=True)
class _Row:
    values: Mapping[str, Any]
    where: str

    def text(self, column: str) -> str:
        value = self.values[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise _EmptyTextError(f"{self.where}: column '{column}' is empty")
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: column '{column}' is not text")
        return value


def _letters(row: _Row, texts: Any, answer: Any) -> dict[str, Any]:
    """The paper is silent on the layout: the question, then one line a choice, "A. ..."."""
    question = row.text("question")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"{row.where}: column 'choices' is not a list of 2 to {len(LETTERS)} texts")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{row.where}: column 'choices' holds an empty choice")
    if not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise ValueError(f"{row.where}: the answer names none of the {len(texts)} choices")
    letters = LETTERS[: len(texts)]
    lines = [question, *(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))]
    prompt = KNOWLEDGE_TEMPLATE.replace("{question}", "\n".join(lines))
    fields = {"prompt": prompt, "target": letters[answer], "choices": letters, "answer": answer}
    return {"entry": entry_of(question), "scoring": "choice", **fields}


def _mmlu(row: _Row) -> dict[str, Any]:
    return _letters(row, row.values["choices"], row.values["answer"])


def _csqa(row: _Row) -> dict[str, Any]:
    choices, key = row.values["choices"], row.text("answerKey")
    labels = choices.get("label") if isinstance(choices, dict) else None
    if not labels or tuple(labels) != LETTERS[: len(labels)]:
        raise ValueError(f"{row.where}: column 'choices' does not label its texts A, B, C, ...")
    return _letters(row, choices.get("text"), labels.index(key) if key in labels else -1)


def _reasoning(question: str, gold: str) -> dict[str, Any]:
    prompt = REASONING_TEMPLATE.replace("{question}", question)
    return {"entry": entry_of(question), "prompt": prompt, "target": gold, "scoring": "boxed"}


def _gsm8k(row: _Row) -> dict[str, Any]:
    _, mark, gold = row.text("answer").rpartition("####")
    gold = gold.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", gold):
        raise ValueError(f"{row.where}: column 'answer' has no number after ####")
    return _reasoning(row.text("question"), gold)


def _gsm8k_worked(row: _Row) -> dict[str, Any]:
    """GSM8K as calibration: the loss is taken on the worked solution, without its calculator marks, with the
    answer boxed as the prompt asks (the paper is silent)."""
    fields = _gsm8k(row)
    solution = re.sub(r"<<.*?>>", "", row.text("answer").rpartition("####")[0]).strip()
    return fields | {"target": f"{solution}\nThe final answer is \\boxed{{{fields['target']}}}."}


def _math(row: _Row) -> dict[str, Any]:
    return _reasoning(row.text("problem"), row.text("answer").strip())


def _request(row: _Row, column: str, entry: str = "") -> dict[str, Any]:
    """A malicious prompt; `entry` is the question inside it where the source tells."""
    text = row.text(column)
    prompt = SAFETY_TEMPLATE.replace("{question}", text)
    return {"entry": entry_of(entry or text), "prompt": prompt, "scoring": "refusal"}


def _completed(row: _Row) -> dict[str, Any]:
    """A row of WildJailbreak's train split, with the completion to learn."""
    form, kind = row.text("data_type").split("_")
    fields = _request(row, form, row.text("vanilla")) | {"target": row.text("completion")}
    return fields if kind == "harmful" else fields | {"scoring": "over_refusal"}


@dataclass(frozen=True)
class Pool:
    repository: str
    revision: str
    config: str | None
    parts: tuple[tuple[str, str], ...]  # (split on the hub, local file name), read one after the other
    columns: tuple[str, ...]
    fields: Callable[[_Row], dict[str, Any]]
    role: str = ""  # of its records; empty: the pool's name
    keep: tuple[str, Any] | None = None  # (column, value) of the rows that belong to the pool; None: all
    distinct: bool = False  # repeats of a prompt are left out
    skip_empty: bool = False  # rows with an empty text are left out and counted, instead of an error
    gated: bool = False  # access is granted on `url`, by accepting the terms
    options: Mapping[str, Any] = field(default_factory=dict)  # for load_dataset

    @property
    def url(self) -> str:
        return f"https://huggingface.co/datasets/{self.repository}"

    @property
    def files(self) -> str:
        return " or ".join(f"{stem}.parquet" for _, stem in self.parts)


# Repository, commit, config. The commits are those that other public projects pin; the commit that was really
# loaded is compared with them and recorded in the provenance.
_MMLU = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "all")
_CSQA = ("tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155", None)
_GSM8K = ("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", "main")
_MATH = ("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", None)
_WILDJAILBREAK = ("allenai/wildjailbreak", "5ddc12a7894f842b0619b8e1c7ee496b198af009")
_WILDGUARD = ("allenai/wildguardmix", "d29c47f41c8b51348b5c8e8c81c039b3132b66d1", "wildguardtest")
_IN_THE_WILD = ("TrustAIRLab/in-the-wild-jailbreak-prompts", "a10aab8eff1c73165a442d4464dce192bd28b9c5")
_DAN = (*_IN_THE_WILD, "jailbreak_2023_12_25")

# The data card asks for these options: an empty cell is "", not NaN.
_GATED_TSV: dict[str, Any] = {"gated": True, "options": {"delimiter": "\t", "keep_default_na": False}}
_EVAL = ("eval", (("train", "wildjailbreak_eval"),))  # the hub calls its only split train
_TRAIN = (("train", "wildjailbreak_train"),)
_TRAIN_COLUMNS = ("vanilla", "adversarial", "completion", "data_type")
_CALIBRATION = (("validation", "mmlu_validation"), ("dev", "mmlu_dev"))  # test is the benchmark
_MC, _QA = ("question", "choices", "answer"), ("question", "answer")
_ADVERSARIAL, _HARMFUL = ("data_type", "adversarial_harmful"), ("prompt_harm_label", "harmful")
_TEST = (("test", "wildguard_test"),)
_prompt, _adversarial = partial(_request, column="prompt"), partial(_request, column="adversarial")


def _train(data_type: str, role: str = "") -> Pool:
    form = {"role": role, "keep": ("data_type", data_type), "skip_empty": True, **_GATED_TSV}
    return Pool(*_WILDJAILBREAK, "train", _TRAIN, _TRAIN_COLUMNS, _completed, **form)


POOLS: dict[str, Pool] = {
    # benchmarks; CommonsenseQA's test split has no answers, the paper's 1,221 rows are those of validation
    "mmlu": Pool(*_MMLU, (("test", "mmlu_test"),), _MC, _mmlu),
    "csqa": Pool(*_CSQA, (("validation", "csqa_validation"),), ("question", "choices", "answerKey"), _csqa),
    "gsm8k": Pool(*_GSM8K, (("test", "gsm8k_test"),), _QA, _gsm8k),
    "math": Pool(*_MATH, (("test", "math500_test"),), ("problem", "answer"), _math),
    "wildjailbreak": Pool(
        *_WILDJAILBREAK, *_EVAL, ("adversarial",), _adversarial, keep=_ADVERSARIAL, **_GATED_TSV
    ),
    "wildguard": Pool(*_WILDGUARD, _TEST, ("prompt",), _prompt, keep=_HARMFUL, distinct=True, gated=True),
    "dan": Pool(*_DAN, (("train", "dan_jailbreak"),), ("prompt",), _prompt, keep=("jailbreak", True)),
    # calibration
    "mmlu_calibration": Pool(*_MMLU, _CALIBRATION, _MC, _mmlu, role="util"),
    "gsm8k_calibration": Pool(*_GSM8K, (("train", "gsm8k_train"),), _QA, _gsm8k_worked, role="util"),
    "wildjailbreak_safe": _train("vanilla_harmful", role="safe"),
    **{data_type: _train(data_type) for data_type in DATA_TYPES},  # alignment
}


@dataclass(frozen=True)
class _Part:
    stem: str  # local file name without its ending: names the part in ids, from wherever it was read
    label: str  # the file, or repository and split; for messages
    table: pa.Table
    revision: str = "local"
    sha256: str = ""
    standin: bool = False


def load(pool: str) -> Loaded:
    """Every row of a pool, in its source's order; ValueError or FileNotFoundError is one clear line."""
    spec, folder = _spec(pool), _folder()
    parts = _hub_parts(spec) if folder is None else _local_parts(pool, spec, folder)
    labels = " + ".join(part.label for part in parts)
    standin = any(part.standin for part in parts)
    conditions = [spec.keep] if spec.keep else []
    notes = [f"only {labels} is there"] if len(parts) < len(spec.parts) else []
    if pool == "dan" and folder and _local_file(folder, _TRAIN[0][1])[1]:
        conditions.append(("standin_half", "heldout"))
        notes.append("held-out half only: the training stand-in is built from the other half")

    records: list[Record] = []
    seen: set[str] = set()
    digest, empty = hashlib.sha256(), 0
    for part in parts:
        for index, values in _rows(part, spec.columns, conditions):
            digest.update(json.dumps(values, sort_keys=True, default=str).encode())
            try:
                fields = spec.fields(_Row(values, f"{part.label}: row {index}"))
            except _EmptyTextError:
                if not spec.skip_empty:
                    raise
                empty += 1
                continue
            if spec.distinct and fields["prompt"] in seen:
                continue
            seen.add(fields["prompt"])
            example_id = f"{pool}/{part.stem}-{index:06d}"
            source = spec.repository + (" (stand-in)" if standin else "")
            records.append(Record(example_id=example_id, source=source, role=spec.role or pool, **fields))
    if not records:
        wanted = " and ".join(f"{column} = {value}" for column, value in conditions) or "a text"
        raise ValueError(f"{labels}: no row with {wanted}")
    if empty:
        notes.append(f"{empty} rows with an empty text left out")
    where, hashes = (labels, " + ".join(p.sha256 for p in parts)) if folder else ("hub", digest.hexdigest())
    note = "; ".join(notes)
    origin = Provenance(pool, spec.repository, parts[0].revision, where, hashes, len(records), standin, note)
    return Loaded(records, origin)


def _spec(pool: str) -> Pool:
    if pool not in POOLS:
        raise ValueError(f"unknown data pool '{pool}'; there are {', '.join(POOLS)}")
    return POOLS[pool]


def _rows(part: _Part, columns: Iterable[str], conditions: list[tuple]) -> Iterable[tuple[int, dict]]:
    """(index in the source, row) of the rows that meet all conditions."""
    wanted = list(dict.fromkeys([*columns, *(column for column, _ in conditions)]))
    for column in wanted:
        if column not in part.table.column_names:
            raise ValueError(f"{part.label}: column '{column}' is missing")
    table, indices = part.table.select(wanted), list(range(part.table.num_rows))
    # Filtered before any text becomes a Python object: the train split of WildJailbreak is half a gigabyte.
    for column, value in conditions:
        cells = table[column].to_pylist()
        indices = [index for index in indices if cells[index] == value]
    return zip(indices, table.take(pa.array(indices, pa.int64())).to_pylist(), strict=True)


def _folder() -> Path | None:
    """The folder that CAST_DATA names; None: the hub."""
    name = os.environ.get("CAST_DATA", "").strip()
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"CAST_DATA names no folder: {folder}")
    return folder


def _local_file(folder: Path, stem: str) -> tuple[Path | None, bool]:
    """(file, stand-in?); (None, False) where neither file is there."""
    real, standin = folder / f"{stem}.parquet", folder / f"{stem}_schema_standin.parquet"
    if real.is_file():
        return real, False
    return (standin, True) if standin.is_file() else (None, False)


def _local_parts(pool: str, spec: Pool, folder: Path) -> list[_Part]:
    parts = []
    for _, stem in spec.parts:
        path, standin = _local_file(folder, stem)
        if path is None:
            continue
        try:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path.name}: not a readable parquet file ({type(error).__name__})") from error
        parts.append(_Part(stem, path.name, table, sha256=sha256, standin=standin))
    if not parts:
        raise FileNotFoundError(f"{pool}: {_missing_file(spec, folder)}")
    return parts


def _hub_parts(spec: Pool) -> list[_Part]:
    import datasets

    parts = []
    for split, stem in spec.parts:
        label = f"{spec.repository} ({spec.config or 'default'}, {split})"
        source = {"split": split, "revision": spec.revision, **spec.options}
        try:
            dataset = datasets.load_dataset(spec.repository, spec.config, **source)
            table = dataset.with_format("arrow")[:]
        except Exception as error:  # of many libraries; `missing` is what tells the reasons apart
            raise ValueError(f"{label}: cannot be loaded from the hub ({type(error).__name__})") from error
        # In the cache the folder's name is the commit. Without a network `datasets` takes any commit it has.
        names = [Path(file["filename"]).parent.name for file in dataset.cache_files]
        commit = next((name for name in names if re.fullmatch(r"[0-9a-f]{40}", name)), spec.revision)
        if commit != spec.revision:
            raise ValueError(
                f"{label}: the cache has commit {commit}, not {spec.revision}; connect to a network"
            )
        parts.append(_Part(stem, label, table, commit))
    return parts


@dataclass(frozen=True)
class Reach:
    """Whether a pool can be had."""

    pool: str
    state: str  # "there", "stand-in" or "missing"
    where: str
    how: str = ""  # to get it, where it is missing


def survey(pools: Iterable[str]) -> list[Reach]:
    """Where each pool would come from. Downloads nothing."""
    specs = {pool: _spec(pool) for pool in pools}
    try:
        folder = _folder()
    except FileNotFoundError as error:
        return [Reach(pool, "missing", spec.repository, str(error)) for pool, spec in specs.items()]
    if folder:
        return [_reach_file(pool, spec, folder) for pool, spec in specs.items()]
    repositories = {spec.repository: spec for spec in specs.values()}
    reasons = {repository: _hub_reason(spec) for repository, spec in repositories.items()}
    found = []
    for pool, spec in specs.items():
        where, reason = f"{spec.url} at {spec.revision[:10]}", reasons[spec.repository]
        if not reason:
            found.append(Reach(pool, "there", where))
        elif _cached(spec):
            found.append(Reach(pool, "there", f"the cache of datasets, {spec.revision[:10]}"))
        else:
            how = f"{reason}, or set CAST_DATA to a folder with {spec.files}"
            found.append(Reach(pool, "missing", where, how))
    return found


def missing(pools: Iterable[str]) -> list[str]:
    """One line for each pool that cannot be reached, saying how to get it. Downloads nothing."""
    return [f"{one.pool}: {one.how}" for one in survey(pools) if one.how]


def _reach_file(pool: str, spec: Pool, folder: Path) -> Reach:
    found = [_local_file(folder, stem) for _, stem in spec.parts]
    there = [(path.name, standin) for path, standin in found if path is not None]
    if not there:
        return Reach(pool, "missing", spec.files, _missing_file(spec, folder))
    state = "stand-in" if any(standin for _, standin in there) else "there"
    names = " + ".join(name for name, _ in there)
    lacking = [
        f"{stem}.parquet" for (_, stem), (path, _) in zip(spec.parts, found, strict=True) if path is None
    ]
    return Reach(pool, state, f"{names} (without {', '.join(lacking)})" if lacking else names)


def _missing_file(spec: Pool, folder: Path) -> str:
    return f"no {spec.files} in CAST_DATA={folder}: put it there, or unset CAST_DATA to load {spec.url}"


def _cached(spec: Pool) -> bool:
    """Whether an earlier run left all splits in the cache of `datasets`, which then needs no network."""
    import datasets

    name, cache = spec.repository.replace("/", "___").casefold(), Path(datasets.config.HF_DATASETS_CACHE)
    folders = [path for path in cache.glob("*") if path.name.casefold() == name]
    patterns = [f"{spec.config or 'default'}*/*/{spec.revision}/*{split}*.arrow" for split, _ in spec.parts]
    return all(any(any(path.glob(pattern)) for path in folders) for pattern in patterns)


def _hub_reason(spec: Pool) -> str:
    """Why a repository cannot be read, and what to do about it; "" if it can."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name, login = spec.repository, "" if huggingface_hub.get_token() else "log in (`hf auth login`) and "
    try:
        huggingface_hub.HfApi().auth_check(name, repo_type="dataset")
    except GatedRepoError:
        return f"{name} is gated: {login}accept its terms at {spec.url}"
    except RepositoryNotFoundError:
        return f"{name} is not on the hub or closed to this account: try `hf auth login`, see {spec.url}"
    except HfHubHTTPError as error:
        return f"the hub refuses {name} ({type(error).__name__}): try `hf auth login` or wait"
    except Exception as error:  # connection errors: their classes differ between versions of the HTTP library
        return f"no connection to the hub for {name} ({type(error).__name__}): connect to a network"
    return ""
