"""The settings of a run: every one, what it means, and which values no stage could work with.

They come in groups; a stage rests on whole groups. On the command line and in run.json they are flat.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

import backends
from backends.base import Optimizer
from backends.core.checks import check_dense
from backends.core.errors import InputError
from data import own_rows
from data.benchmarks import Benchmark, parse_benchmarks
from data.chat import is_date
from data.classifier import LabelJudge, parse_judge
from data.sampling import rows_of_types
from stages.method.arms import LAM, Arm, ArmRun, arm_runs, neuron_arm, parse
from stages.method.heads import Sensitivity
from stages.run import tracking
from stages.run.locks import parse_shard
from stages.run.maps import MapSpec, parse_maps
from stages.run.schemas import OWN_MAP


@dataclass(frozen=True)
class RunSettings:
    """Where a run is and what computes it; no result rests on these."""

    preset: str = "smollm"
    """smollm, smollm-study, smollm-neurons, smollm-paper, llama, qwen, mistral, tiny; or the folder of a
    model of your own (README says which)"""
    run: str = ""
    """folder of this run's artifacts; default: outputs/<preset>"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "tpu" (flax), …; auto: the accelerator where there is one"""
    model_parallel: int = 0
    """devices that share one copy of the model, by layers (torch) or cut by heads (flax); 0: as few as hold
    it"""
    shard: str = ""
    """i/n: compute only every n-th unit of stage 02, 03, 04 or 05, beside other shards (units=NAME,NAME:
    those named); then run the stage without it"""
    processes: int = 0
    """that compute units of stages 04 and 05 side by side; 0: on a CPU, of a model of 5 to 1,000 million
    parameters (torch), one for each core, at most 8, as memory allows; else 1"""
    track: tracking.Name = ""
    """tensorboard, trackio or wandb: losses and scores go there too (requirements-<name>.txt)"""


@dataclass(frozen=True)
class ModelSettings:
    """The model, and the arithmetic."""

    model: str = ""
    """hub id or folder of the model; set by the preset"""
    revision: str = "main"
    """revision of a model from the hub"""
    paper: Literal["", "llama", "qwen", "mistral"] = ""
    """the paper's model whose printed numbers stand beside this run's; set by the preset"""
    backend: Literal["torch", "flax"] = "torch"
    """which implementation computes"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the hardware multiplies faster in it, float32 elsewhere"""
    quantize: Literal["", "nf4", "int8"] = ""
    """base weights but W_q in 4 or 8 bits, the rest in bfloat16: larger models on one GPU (torch, CUDA;
    requirements-quantize.txt)"""


@dataclass(frozen=True)
class DataSettings:
    """Which rows a run draws (stage 01)."""

    seed: int = 0
    """seed of data draws and resamples; training has its own, `seeds`"""
    util: str = ""
    """own utility rows (a file, or hub:NAME:SPLIT; data/own_rows.py); --util-rows calibrate, the rest is the
    benchmark"""
    safe: str = ""
    """own harmful prompts with safe completions; --safe-rows calibrate, the rest is the benchmark"""
    align: str = ""
    """own alignment rows (prompt, target, data_type)"""
    util_source: str = "embedded/util"
    """pool that D_util is drawn from"""
    safe_source: str = "embedded/safe"
    """pool that D_safe is drawn from"""
    align_source: str = "embedded"
    """"embedded" or "wildjailbreak": where the four alignment types are drawn from"""
    util_rows: int = 128
    """rows of D_util"""
    safe_rows: int = 32
    """rows of D_safe"""
    align_rows: int = 480
    """rows of D_align"""
    benign_share: float = 0.5
    """share of D_align that is benign; half of it, and of the harmful rows, is in the form of an attack"""
    folds: int = 8
    """gradient folds, the blocks in which rows are resampled"""
    maps: tuple[str, ...] = ()
    """other maps, from other utility rows: name=pool:rows (stages/run/maps.py); arms name them by
    bucket1@name"""
    pairs: int = 0
    """NeuronTune: harmful requests, each plainly and inside an attack, that neurons are attributed by, and as
    many rows of D_util; 0: no neuron is"""
    benchmarks: tuple[str, ...] = ()
    """name=rows or name=rows:new-tokens; rows 0 = all there are; names as in data/benchmarks.py"""
    split: Literal["benchmark", "development"] = "benchmark"
    """development: other rows of the same pools, for choosing a preset's rates; no run of seed 0 has them"""
    date: str = "26 Jul 2024"
    """date given to chat templates that print one, or ask for today's"""
    system: str = ""
    """system prompt; empty: the template's own default"""
    max_length: int = 1024
    """tokens a training row is cut to"""


@dataclass(frozen=True)
class MapSettings:
    """The conflict map (stages 02 and 03)."""

    sensitivity: Sensitivity = "counted"
    """what S is made of. counted: accuracy and refusals, as in the paper; graded: log p of right answers and
    log-odds of refusing; gradient: their gradients in the heads' gates, for which nothing is ablated"""

    attribution_steps: int = 128
    """NeuronTune: nodes on a path of the integrated gradients at most; it gets as many as make it complete"""
    mask: Literal["output", "query"] = "output"
    """what ablating a head zeroes: its slice before W_o, or its query"""
    sweep_tokens: int = 32
    """new tokens a response of the sweep"""
    util_tokens: int = 256
    """new tokens of a calibration answer that is written (a worked problem) and not the next token"""
    variant: Literal["rank-difference", "reranked"] = "rank-difference"
    """Eq. 5 as printed, or with the re-ranked exponent that the paper's tables fit"""
    buckets: int = 4
    """M, the number of buckets"""
    resamples: int = 1000
    """resamples of rows for every interval"""


@dataclass(frozen=True)
class TuningSettings:
    """What is tuned and how (stage 04)."""

    arms: tuple[str, ...] = ("full", "random", "buckets")
    """what is tuned: full, random (as many heads as a bucket), bucket1 (risky) .. bucketM (safe), all of them
    by "buckets"; see stages/method/arms.py for more"""
    optimizers: tuple[Optimizer, ...] = ("sft",)
    """sft: plain fine-tuning; pcgrad: without what goes against utility's gradient on D_util;
    pcgrad-symmetric: both gradients, each without what goes against the other"""
    ablations: tuple[str, ...] = ()
    """more arms, tuned by sft only: buckets_O, buckets_S, top50, bottom50, bucketsof8, buckets@map, …"""
    seeds: tuple[int, ...] = (21,)
    """training seeds: LoRA's A, the order of rows, and which heads `random` draws"""
    rank: int = 32
    """LoRA r"""
    alpha: float = 32.0
    """LoRA alpha"""
    lr: float = 1e-4
    """peak learning rate; decays linearly to 0"""
    epochs: int = 1
    """passes over D_align"""
    batch: int = 4
    """rows a forward pass"""
    accumulation: int = 2
    """forward passes a step"""
    rediagnose: int = 0
    """steps after which the arms bucketM-rediagnosed draw their bucket anew, by the map of the model as it is
    then; 0: there are no such arms"""
    neurons: tuple[int, ...] = ()
    """NeuronTune's threshold K: an arm for each, of the K neurons of highest safety and of highest utility
    score; 0: all gains 1"""
    lam: tuple[float, ...] = (LAM,)
    """weights of the safety loss against the utility loss, an arm of neurons for each"""
    gain_lr: float = 0.05
    """peak rate of the outer steps (Adam); decays linearly to 0"""
    gain_inner_lr: float = 1.0
    """rate of the inner steps"""
    gain_inner_steps: int = 1
    """inner steps on a task's support rows"""
    utility_objective: Literal["preserve", "suppress"] = "preserve"
    """preserve: the utility loss is minimised; suppress: maximised, as a third party's code does"""


@dataclass(frozen=True)
class EvaluationSettings:
    """Who judges responses, and whether drift is measured (stage 05); on a finished run, what was kept is
    judged again, and the drift computed beside it."""

    judge: str = "keyword"
    """who says what a refusal is in the benchmarks: keyword, wildguard, or hf:MODEL:LABEL, any sequence
    classifier (hub id or folder) and its label of a refusal, or labels by commas"""
    judge_input: str = "{response}"
    """what a classifier of --judge hf: reads: {response}, with {prompt} where it was trained on both"""
    judge_model: str = "allenai/wildguard"
    """hub id or folder of WildGuard's classifier, for --judge wildguard"""
    drift: bool = False
    """the map by gradients again with each arm's adapter in place, against that of the base model; takes each
    arm as long as stage 02 takes"""


@dataclass(frozen=True)
class Settings:
    """CAST: which attention heads of an instruct LLM can be safety-tuned without hurting its abilities.

    Stages: 01_calibrate, 02_conflict, 03_sensitivity, 04_align, 05_evaluate, 06_correlate; then
    `stages.audit`.
    """

    run: Annotated[RunSettings, OmitArgPrefixes] = field(default_factory=RunSettings)
    model: Annotated[ModelSettings, OmitArgPrefixes] = field(default_factory=ModelSettings)
    data: Annotated[DataSettings, OmitArgPrefixes] = field(default_factory=DataSettings)
    map: Annotated[MapSettings, OmitArgPrefixes] = field(default_factory=MapSettings)
    tuning: Annotated[TuningSettings, OmitArgPrefixes] = field(default_factory=TuningSettings)
    evaluation: Annotated[EvaluationSettings, OmitArgPrefixes] = field(default_factory=EvaluationSettings)

    @cached_property
    def folder(self) -> Path:
        """Of the run."""
        suffix = "-flax" if self.model.backend == "flax" else ""
        return Path(self.run.run or f"outputs/{Path(self.run.preset).resolve().name}{suffix}")

    @cached_property
    def maps(self) -> tuple[MapSpec, ...]:
        """The run's own map, then the others."""
        data = self.data
        own = MapSpec(OWN_MAP, "own/util" if data.util else data.util_source, data.util_rows)
        return (own, *parse_maps(data.maps, data.folds))

    @cached_property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        data = self.data
        return parse_benchmarks(data.benchmarks, own_util=bool(data.util), own_safe=bool(data.safe))

    @property
    def label_judge(self) -> LabelJudge | None:
        """The sequence classifier that judges; None: another judge does."""
        return parse_judge(self.evaluation.judge, self.evaluation.judge_input)

    def _arms(self, option: str, names: tuple[str, ...]) -> tuple[Arm, ...]:
        """Arms by name. InputError names one that there is not, whose map is not requested, or whose neurons
        are not attributed."""
        m = self.map.buckets
        try:
            found = parse(names, m)
        except ValueError as error:
            raise InputError(
                f"{option}: {error}: there are full, random, bucket1 to bucket{m} (also _O, _S, of8, …), "
                f"top50, bottom50, neurons256, … (stages/method/arms.py)"
            ) from None
        for arm in found:
            if arm.map is not None and arm.map not in {spec.name for spec in self.maps}:
                raise InputError(f"{option}: @{arm.map} needs --maps {arm.map}=POOL:ROWS")
            if arm.of_neurons and not self.data.pairs:
                raise InputError(f"{option}: arms of neurons need --pairs (32, say), which they are found by")
        return found

    @cached_property
    def arm_runs(self) -> list[ArmRun]:
        """What stage 04 tunes, in order."""
        tuning = self.tuning
        neurons = [neuron_arm("neurons", count, lam) for count in tuning.neurons for lam in tuning.lam]
        main = self._arms("--arms", tuning.arms)
        ablations = self._arms("--ablations", tuning.ablations)
        return arm_runs(
            main,
            (*ablations, *self._arms("--neurons", tuple(arm.name for arm in neurons))),
            tuning.optimizers,
            tuning.seeds,
        )

    def group(self, *names: str) -> dict:
        """The settings of groups as JSON values, flat."""
        values = {}
        for name in names:
            values |= asdict(getattr(self, name))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def flat(self) -> dict:
        """All settings as JSON values."""
        return self.group(*GROUPS)

    def replace(self, **values: object) -> "Settings":
        """With other values of fields of any group. KeyError on an unknown one."""
        changed: dict[str, dict] = {}
        for name, value in values.items():
            changed.setdefault(GROUP_OF[name], {})[name] = tuple(value) if isinstance(value, list) else value
        return replace(self, **{name: replace(getattr(self, name), **new) for name, new in changed.items()})


OF_RESULTS = ("model", "data", "map", "tuning")
"""groups that results rest on: not where they are computed, nor who judges them"""
OF_ONE_START = ("shard", "processes", "track")
"""settings that a run does not keep"""
GROUPS = tuple(group.name for group in fields(Settings))
GROUP_OF: Mapping[str, str] = {name: group for group in GROUPS for name in asdict(getattr(Settings(), group))}
"""field -> its group"""


AT_LEAST_0 = ("model_parallel", "processes", "pairs", "rediagnose")
POSITIVE = (
    *("folds", "align_rows", "max_length", "sweep_tokens", "util_tokens", "buckets", "resamples"),
    *("attribution_steps", "rank", "alpha", "lr", "epochs", "batch", "accumulation"),
    *("gain_lr", "gain_inner_lr", "gain_inner_steps"),
)
NOT_EMPTY = ("arms", "optimizers", "seeds", "benchmarks", "lam")


def option(name: str) -> str:
    """A field as it is written on a command line."""
    return f"--{name.replace('_', '-')}"


def check(settings: Settings) -> None:
    """Refuses values that no stage could work with. InputError names the option."""
    values, data, tuning = settings.flat(), settings.data, settings.tuning
    chosen = (("seed", data.seed), *(("seeds", seed) for seed in tuning.seeds))
    rules = [  # option, whether it holds, what is said where it does not
        *((name, 0 < values[name] < math.inf, f"must be positive, not {values[name]}") for name in POSITIVE),
        *((name, values[name] >= 0, f"must not be negative, not {values[name]}") for name in AT_LEAST_0),
        *((name, values[name], "must not be empty") for name in NOT_EMPTY),
        *((name, 0 <= seed < 2**31, f"must lie in 0 to 2147483647, not {seed}") for name, seed in chosen),
        ("folds", data.folds >= 2, f"{data.folds}: rows are resampled by folds, at least 2"),
        ("resamples", settings.map.resamples >= 20, f"{settings.map.resamples}: intervals need at least 20"),
        ("align_rows", data.align_rows % 4 == 0, "must be a multiple of 4 (a quarter of each type)"),
        ("benign_share", 0 < data.benign_share < 1, f"{data.benign_share}: must lie between 0 and 1"),
        ("date", is_date(data.date), f"{data.date!r}: a day as in '26 Jul 2024'"),
        ("neurons", min(tuning.neurons, default=0) >= 0, "must not be negative"),
        ("lam", all(0 <= lam <= 1 for lam in tuning.lam), "is a share of 1"),
    ]
    for name in ("util_rows", "safe_rows"):
        rules.append((name, values[name] >= data.folds, f"{values[name]} is fewer than --folds"))
        divides = data.folds > 0 and values[name] % data.folds == 0
        rules.append((name, divides, f"must be a multiple of --folds {data.folds}"))
    for name in (*NOT_EMPTY, "ablations", "maps", "neurons"):
        listed = " ".join(map(str, values[name]))
        rules.append((name, len(set(values[name])) == len(values[name]), f"names something twice: {listed}"))
    for name in ("util", "safe", "align"):
        rules.append((name, not (why := own_rows.problem(values[name])), why))
    for name, holds, why in rules:
        if not holds:
            raise InputError(f"{option(name)} {why}")
    if min(rows_of_types(data.align_rows, data.benign_share).values()) < 1:
        raise InputError(f"--align-rows {data.align_rows} are too few: some type of them has none")
    check_rediagnosis(settings)
    parse_shard(settings.run.shard)
    tracking.check(settings.run.track)
    check_model(settings)
    # What is parsed on first use is parsed now.
    _ = settings.maps, settings.benchmarks, settings.arm_runs, settings.label_judge


def check_model(settings: Settings) -> None:
    """InputError where the backend cannot work here, or quantized weights do not go with the rest."""
    model = settings.model
    backends.check(model.backend)
    if model.quantize:
        backends.check_quantize(model.quantize, model.backend, model.dtype, settings.run.model_parallel)
    if settings.data.pairs:
        check_dense(model.quantize)


def check_rediagnosis(settings: Settings) -> None:
    """InputError where arms and --rediagnose do not fit each other or the run."""
    tuning, arms = settings.tuning, [run.arm for run in settings.arm_runs if run.arm.rediagnosed]
    if arms and not tuning.rediagnose:
        raise InputError(f"{arms[0].name} needs --rediagnose N (every how many steps is it drawn anew?)")
    if not tuning.rediagnose:
        return
    if not arms:
        raise InputError("--rediagnose: no arm is re-diagnosed: --ablations bucket1-rediagnosed, say")
    if settings.map.sensitivity != "gradient":
        raise InputError(
            f"--rediagnose draws by gradients: --sensitivity gradient, not {settings.map.sensitivity}"
        )
    steps = -(-settings.data.align_rows // (tuning.batch * tuning.accumulation)) * tuning.epochs
    if tuning.rediagnose >= steps:
        raise InputError(f"--rediagnose {tuning.rediagnose}: a tuning has {steps} steps, none is after that")
