"""The settings of a run: every one, what it means, and which values no stage could work with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import backends
from backends.base import Optimizer
from backends.errors import InputError
from stages import arms, maps
from stages.locks import parse_shard


@dataclass(frozen=True)
class Settings:
    """CAST: which attention heads of an instruct LLM can be safety-tuned without hurting its abilities.

    Stages: 01_calibrate, 02_conflict, 03_sensitivity, 04_align, 05_evaluate, 06_correlate; then
    `stages.audit`.
    """

    preset: str = "smollm"
    """smollm, llama, qwen, mistral, tiny; or the folder of a model of your own (Llama, Qwen2 or Mistral
    architecture)"""
    run: str = ""
    """folder of this run's artifacts; default: outputs/<preset>"""
    backend: Literal["torch", "flax"] = "torch"
    """which implementation computes"""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "tpu" (flax), …; auto: the accelerator where there is one"""
    model_parallel: int = 0
    """devices that share one copy of the model, by layers (torch) or cut by heads (flax); 0: as few as hold
    it"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the hardware multiplies faster in it, float32 elsewhere"""
    model: str = ""
    """hub id or folder of the model; set by the preset"""
    revision: str = "main"
    """revision of a model from the hub"""
    seed: int = 0
    """seed of data draws and bootstrap; training has its own, `seeds`"""

    # 01: data
    util: str = ""
    """own JSONL of utility rows (data/jsonl.py); --util-rows of them calibrate, the rest is the benchmark"""
    safe: str = ""
    """own JSONL of harmful prompts with safe completions; --safe-rows calibrate, the rest is the benchmark"""
    align: str = ""
    """own JSONL of alignment rows (prompt, target, data_type)"""
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
    """rows of D_align, a quarter of each type"""
    maps: tuple[str, ...] = ()
    """other maps, from other utility rows: name=pool:rows (stages/maps.py); arms name them by bucket1@name"""
    benchmarks: tuple[str, ...] = ()
    """name=rows or name=rows:new-tokens; rows 0 = all there are; names as in data/benchmarks.py"""
    date: str = "26 Jul 2024"
    """date given to chat templates that print one"""
    system: str = ""
    """system prompt; empty: the template's own default"""

    # 02, 03: the map
    folds: int = 8
    """gradient folds, for the bootstrap interval of O"""
    mask: Literal["output", "query"] = "output"
    """what silencing a head zeroes: its slice before W_o, or its query"""
    sweep_tokens: int = 32
    """new tokens a response of the sweep"""
    util_tokens: int = 256
    """new tokens of a calibration answer that is written (a worked problem) and not the next token"""
    variant: Literal["rank-difference", "reranked"] = "rank-difference"
    """Eq. 5 as printed, or with the re-ranked exponent that the paper's tables fit"""
    buckets: int = 4
    """M, the number of buckets"""
    resamples: int = 1000
    """bootstrap resamples of the map"""

    # 02, 04: NeuronTune
    pairs: int = 0
    """harmful requests, each plainly and inside an attack, that neurons are attributed by, and as many rows
    of D_util; 0: no neuron is"""
    attribution_steps: int = 128
    """nodes on a path of the integrated gradients at most; it gets as many as make it complete"""
    neurons: tuple[int, ...] = ()
    """NeuronTune's threshold K: an arm for each, of the K neurons of highest safety and of highest utility
    score; 0: all gains 1"""
    lam: tuple[float, ...] = (arms.LAM,)
    """weights of the safety loss against the utility loss, an arm of neurons for each"""
    gain_lr: float = 0.05
    """peak rate of the outer steps (Adam); decays linearly to 0"""
    gain_inner_lr: float = 1.0
    """rate of the inner steps"""
    gain_inner_steps: int = 1
    """inner steps on a task's support rows"""
    utility_objective: Literal["preserve", "suppress"] = "preserve"
    """preserve: the utility loss is minimised; suppress: maximised, as a third party's code does"""

    # 04: tuning
    arms: tuple[str, ...] = ("full", "random", "buckets")
    """what is tuned: full, random (as many heads as a bucket), bucket1 (risky) .. bucketM (safe), all of them
    by "buckets"; see stages/arms.py for more"""
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
    max_length: int = 1024
    """tokens a training row is cut to"""

    # 05: evaluation
    judge: Literal["keyword", "wildguard"] = "keyword"
    """who says what a refusal is in the benchmarks; on a finished run, it judges what was kept"""
    judge_model: str = "allenai/wildguard"
    """hub id or folder of WildGuard's classifier, for --judge wildguard"""

    shard: str = ""
    """i/n: compute only every n-th unit of stage 02, 03, 04 or 05, beside other shards (units=NAME,NAME:
    those named); then run the stage without it"""

    @property
    def folder(self) -> Path:
        return Path(
            self.run or f"outputs/{Path(self.preset).name}{'-flax' if self.backend == 'flax' else ''}"
        )

    def subset(self, *names: str) -> dict:
        """The named fields as JSON values, for a manifest."""
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check(settings: Settings) -> None:
    """Refuses values that no stage could work with. InputError names the option."""
    for name in ("util_rows", "safe_rows"):
        if getattr(settings, name) < settings.folds:
            raise InputError(f"--{name.replace('_', '-')} {getattr(settings, name)} is fewer than --folds")
        if getattr(settings, name) % settings.folds:
            raise InputError(f"--{name.replace('_', '-')} must be a multiple of --folds {settings.folds}")
    positive = "folds align_rows sweep_tokens util_tokens buckets resamples rank alpha lr epochs batch"
    positive += " attribution_steps gain_lr gain_inner_lr gain_inner_steps"
    for name in (*positive.split(), "accumulation", "max_length"):
        if getattr(settings, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(settings, name)}")
    parse_shard(settings.shard)
    backends.check(settings.backend)
    if settings.model_parallel < 0:
        raise InputError(f"--model-parallel must not be negative, not {settings.model_parallel}")
    if settings.align_rows % 4:
        raise InputError(
            f"--align-rows {settings.align_rows} must be a multiple of 4 (a quarter of each type)"
        )
    others = maps.asked(settings.maps, settings.folds)
    for option in ("arms", "ablations"):
        arms.check(f"--{option}", getattr(settings, option), settings.buckets, others, settings.pairs)
    if min(settings.neurons, default=0) < 0 or not all(0 <= lam <= 1 for lam in settings.lam):
        raise InputError("--neurons must not be negative, and --lam is a share of 1")
    arms.check("--neurons", arms.neuron_arms(settings), settings.buckets, others, settings.pairs)
    if settings.pairs < 0:
        raise InputError(f"--pairs must not be negative, not {settings.pairs}")
    for option in ("arms", "optimizers", "seeds", "benchmarks", "ablations", "maps", "neurons", "lam"):
        values = getattr(settings, option)
        if not values and option not in ("ablations", "maps", "neurons"):
            raise InputError(f"--{option} must not be empty")
        if len(set(values)) < len(values):
            raise InputError(f"--{option} names something twice: {' '.join(map(str, values))}")
    for option in ("util", "safe", "align"):
        path = getattr(settings, option)
        if path and not Path(path).is_file():
            raise InputError(f"--{option}: no file {path}")
