"""Takes an adapter out of a finished run: a PEFT folder that other programs load, or merged weights.

    python -m stages.export outputs/smollm bucket4 --to bucket4-adapter
    python -m stages.export outputs/smollm bucket4-sft-21 --to smollm-bucket4 --merge
    python -m stages.export outputs/llama bucket4-sft-21 --to llama-bucket4 --push me/llama-bucket4

The folder holds the adapter with the settings that matter alone (it loads in PEFT 0.13 as in today's), the
name of a base model that resolves, and a model card of the run's own figures. With --merge it holds a whole
model instead: merged by float32 arithmetic, and it is measured how many of 16 responses are other ones, in
float32 and in bfloat16. With --push it also goes to the hub; a repository that this makes is private.
"""

import argparse
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import backends
from backends import models
from backends.base import Backend, Example
from backends.core.errors import InputError, reason
from backends.core.files import write_text
from backends.models import adapters
from data.rendering import example
from stages.checks.finished import FinishedRun
from stages.method.arms import ArmRun
from stages.report import card
from stages.report.card import Drift, Export, Licence
from stages.run.guard import guarded
from stages.run.pipeline import STAGES
from stages.run.schemas import BENCHMARKS
from stages.run.store import differences

COMPUTED = STAGES[:5]
RESPONSES, NEW_TOKENS = 16, 32
"""that a merged model is compared by"""


@dataclass(frozen=True)
class Base:
    """The base model of a run."""

    name: str
    """what resolves: a hub id, or an absolute folder"""
    on_hub: bool
    folder: Path | None
    """of its weights; None: not on this machine"""
    revision: str | None
    """of a model of the hub, if it is not its newest"""


def find_arm(run: FinishedRun, name: str) -> ArmRun:
    """An arm as tuned, by the name of its adapter; by the arm's own where it was tuned once. InputError lists
    what there is."""
    tuned = run.settings.arm_runs
    found = [own for own in tuned if own.name == name] or [own for own in tuned if own.arm.name == name]
    if len(found) == 1:
        return found[0]
    what = "was tuned more than once" if found else "is no arm of this run"
    raise InputError(f"{name} {what}: there are {', '.join(own.name for own in found or tuned)}")


def base_of(run: FinishedRun) -> Base:
    """InputError where the base model is a folder that is not here: its name would resolve nowhere."""
    chosen, recorded = run.settings.model, run.notes("01_calibrate")["model_folder"]
    local = chosen.model in (models.EMBEDDED, models.TINY) or Path(chosen.model).expanduser() == Path(
        recorded
    )
    if local and run.model_folder is None:
        raise InputError(f"the base model's folder {recorded} is not on this machine: put it there")
    if local:
        return Base(str(run.model_folder.resolve()), False, run.model_folder, None)
    return Base(chosen.model, True, run.model_folder, None if chosen.revision == "main" else chosen.revision)


def licence_of(model: str, folder: Path | None) -> Licence:
    """The base model's licence, as its own card or a file beside its weights names it."""
    if model == models.EMBEDDED:
        return Licence("apache-2.0")
    if folder is not None and (folder / "README.md").is_file():
        from huggingface_hub import ModelCard

        try:
            named = ModelCard.load(folder / "README.md").data
        except Exception:  # no card: a README of any kind
            named = None
        if named is not None and named.license:
            title, link = (getattr(named, name, None) for name in ("license_name", "license_link"))
            return Licence(named.license, title, link)
    files = sorted(folder.glob("LICENSE*")) if folder is not None else []
    return Licence("other", link=f"{files[0].name} of the base model") if files else Licence(None)


def check_weights(run: FinishedRun, base: Base) -> None:
    """InputError where the base model's folder is not here, or holds other weights than the run's."""
    if base.folder is None:
        raise InputError(f"--merge needs the weights of {base.name}: they are not on this machine")
    recorded = run.manifest("04_align")["model"]
    found = models.model_hashes(base.folder)
    if changed := differences({name: recorded.get(name) for name in found}, found):
        raise InputError(f"{base.folder} holds another model than the run's ({changed})")


def compared_rows(run: FinishedRun) -> list[Example]:
    """Rows that are answered in writing, from all benchmarks alike."""
    rows = run.read(BENCHMARKS)
    rows = rows[rows["scoring"] != "choice"]
    at = np.unique(np.linspace(0, len(rows) - 1, RESPONSES).astype(int))
    return [example(row) for row in rows.iloc[at].to_dict("records")]


def measure_drift(run: FinishedRun, base: Path, adapter: Path, merged: Path) -> Iterator[Drift]:
    """How many responses of the merged model are not those of the base model with the adapter beside it, both
    computed in float32, then both in bfloat16."""
    settings, rows = run.settings, compared_rows(run)

    def load(folder: Path, dtype: str) -> Backend:
        return backends.load(settings.model.backend, folder, dtype=dtype, device=settings.run.device)

    for dtype in ("float32", "bfloat16"):
        beside = load(base, dtype).generate(rows, NEW_TOKENS, adapter)
        inside = load(merged, dtype).generate(rows, NEW_TOKENS)
        pairs = zip(beside, inside, strict=True)
        yield Drift(dtype, sum(not np.array_equal(*pair) for pair in pairs), len(rows))


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` once it is whole. InputError where there is one already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--to {folder}: there is something already, choose another folder")
    scratch = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(4)}.tmp")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"--to {folder} cannot be made ({reason(error)})") from None
    try:
        yield scratch
        if folder.is_dir():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_push(repository: str, base: Base, merge: bool) -> None:
    """InputError, one line, where nothing could be pushed."""
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise InputError("--push wants USER/NAME, a repository of the hub")
    if not base.on_hub and not merge:
        raise InputError(
            f"--push: the base model is the folder {base.name}, which nobody else has: add --merge"
        )
    if huggingface_hub.get_token() is None:
        raise InputError("--push: no Hugging Face token on this machine: `hf auth login`, or set HF_TOKEN")
    try:
        huggingface_hub.HfApi().whoami()
    except Exception as error:  # connection errors: their classes differ between versions of the HTTP library
        raise InputError(f"--push: the hub is not reached, or refuses the token ({reason(error)})") from None


def push(folder: Path, repository: str) -> None:
    """Uploads a folder. InputError says how to go on where it fails."""
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by CAST")
    except Exception as error:  # as above
        raise InputError(
            f"--push {repository} failed ({reason(error)}); the folder is whole: `hf upload {repository} "
            f"{folder}` when it can be had"
        ) from None
    print(f"pushed to https://huggingface.co/{repository}")


def main(folder: Path, name: str, to: Path, merge: bool, repository: str | None) -> None:
    """Writes the folder. InputError where the run, the arm or the place is none to work with."""
    run = FinishedRun(folder, COMPUTED)
    tuned, base = find_arm(run, name), base_of(run)
    if repository is not None:
        check_push(repository, base, merge)
    adapter = run.folder / "04_align" / "adapters" / tuned.name
    for file in (adapters.CONFIG, adapters.WEIGHTS):
        run.check(str((adapter / file).relative_to(run.folder)))
    matrices, drift = 0, []
    with whole(to) as scratch:
        if merge:
            check_weights(run, base)
            matrices = adapters.merge(base.folder, adapter, scratch)
            drift = list(measure_drift(run, base.folder, adapter, scratch))
        else:
            adapters.write_adapter(adapter, scratch, base.name, base.revision)
        model = run.settings.model.model
        shown = model if base.on_hub else Path(model).name
        exported = Export(shown, base.on_hub, base.revision, licence_of(model, base.folder), matrices, drift)
        write_text(scratch / "README.md", card.render(run, run.settings, tuned, exported))
    say(tuned, base, to, exported)
    if repository is not None:
        push(to, repository)


def say(tuned: ArmRun, base: Base, to: Path, exported: Export) -> None:
    what = f"merged into {exported.matrices} matrices" if exported.matrices else "as an adapter"
    print(f"{tuned.name} of {base.name}, {what}: {to}")
    for drift in exported.drift:
        print(f"{drift.dtype}: {drift.changed} of {drift.responses} responses differ from the adapter's")
    if exported.licence.name is None:
        print("warning: the base model's licence was not found; look it up before you pass this on")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m stages.export", description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="folder of a run that is finished up to stage 05")
    parser.add_argument("arm", help="an adapter of it: bucket4-sft-21; or bucket4 where it was tuned once")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--merge", action="store_true", help="a whole model, the adapter in its weights")
    parser.add_argument("--push", metavar="USER/NAME", help="a repository of the hub, to upload it to")
    return parser.parse_args(argv)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    given = arguments()
    guarded(lambda: main(given.run, given.arm, given.to, given.merge, given.push))
