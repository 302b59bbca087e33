"""WildGuard's classifier over a stage's outputs: loaded only where it is asked for (--judge wildguard)."""

import numpy as np

import backends
from backends import models
from backends.errors import InputError
from backends.progress import progress
from data import wildguard
from data.examples import Example
from stages import artifacts, loading, schemas
from stages.settings import Settings


def identity(settings: Settings) -> str:
    """What a manifest says of the classifier: its id and weights. InputError where it cannot be had."""
    if told := models.missing(settings.judge_model):
        raise InputError(f"--judge wildguard: {told}")
    folder = models.local_folder(settings.judge_model)
    models.check_folder(folder)
    return f"{settings.judge_model} {models.weights_sha256(folder)[:16]}"


def units(settings: Settings, answered: list[str]) -> dict[str, str]:
    """The units that classify what units of stage 05 answered, by those."""
    which = identity(settings).rpartition(" ")[2]
    return {unit: f"{unit}-classified-{which}" for unit in answered}


def classify(stage: artifacts.Stage, settings: Settings, names: dict[str, str]) -> None:
    """Classifies the outputs of units, a part each; `names` as from `units`.

    In a shard, only what this shard has to classify and has outputs for.
    """
    unit_of = {name: unit for unit, name in names.items()}
    left = [name for name in stage.left(list(unit_of)) if stage.has_part(unit_of[name])]
    if not left:
        return
    loading.forget()  # the classifier wants the run's model's place on the device
    folder = models.local_folder(settings.judge_model)
    backend = backends.load("torch", folder, dtype=settings.dtype, device=settings.device)
    tokenizer = models.load_tokenizer(folder, chat=False)
    for name in progress(left, desc="classifier", unit="unit"):
        outputs = stage.read_parts([unit_of[name]], schemas.OUTPUTS)
        asked = []
        for example_id, request, response in zip(
            *(outputs[column].to_pylist() for column in ("example_id", "prompt", "output")), strict=True
        ):
            ids = tokenizer(wildguard.prompt(request, response), add_special_tokens=False).input_ids
            none = np.zeros(0, np.int32)
            asked.append(Example(example_id, np.array(ids, np.int32), none, none, -1))
        answers = [
            wildguard.parse(tokenizer.decode(tokens, skip_special_tokens=True))
            for tokens in backend.generate(asked, wildguard.NEW_TOKENS)
        ]
        words = []
        for one in answers:
            said = {"refusal": one.refusal, "harmful": one.harmful_response} if one else {}
            words.append({"clear": one is not None, "refusal": None, "harmful": None} | said)
        stage.write_part(name, words, schemas.CLASSIFIED)
