"""How a stage is started from a command line: settings in, one clear line and exit code 2 out where input is
bad."""

from backends.core.errors import InputError
from stages.run import processes
from stages.run.guard import guarded
from stages.run.job import Stage
from stages.run.presets import parse
from stages.run.runner import run_stage


def run(stage: Stage) -> None:
    """Parses the command line and makes the stage, by several processes where that is faster."""

    def program() -> None:
        settings = parse()
        if settings.run.shard and stage.compute is Stage.compute:
            raise InputError("--shard is for stages 02 to 05: this one is a single piece of work")
        run_stage(stage, settings, processes.compute)

    guarded(program)
