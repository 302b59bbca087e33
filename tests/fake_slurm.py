"""Stands in for sbatch, srun and sacct: jobs are processes of this machine (tests only).

Started by the name it is linked under. A job's state is a file of $FAKE_SLURM.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


def launch(job: str, script: Path) -> None:
    """Runs a job's script in the background and keeps its state."""
    number, _, task = job.partition("_")
    place = {"SLURM_JOB_ID": job, "SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task}
    place = place if task else {"SLURM_JOB_ID": job}
    place |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    place |= {"SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "here"}
    state = HOME / f"{job}.state"
    state.write_text("RUNNING")
    turn = f"bash {script}; code=$?; [ $code = 0 ] && echo COMPLETED > {state} || echo FAILED > {state}"
    subprocess.Popen(
        ["bash", "-c", turn],
        env={**os.environ, **place},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    if "partition=closed" in text:
        sys.exit("sbatch: error: invalid partition specified: closed")
    number = str(1 + max([0, *(int(path.stem.split("_")[0]) for path in HOME.glob("*.state"))]))
    kept = HOME / f"{number}.sh"
    kept.write_text(text)
    array = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
    jobs = [f"{number}_{task}" for task in range(int(array[1]) + 1)] if array else [number]
    for job in jobs:
        launch(job, kept)
    print(f"Submitted batch job {number}")


def srun(*arguments: str) -> None:
    words = list(arguments)
    names = {"%j": os.environ["SLURM_JOB_ID"], "%A": os.environ.get("SLURM_ARRAY_JOB_ID", "")}
    names |= {"%a": os.environ.get("SLURM_ARRAY_TASK_ID", ""), "%t": "0"}
    files = {}
    while words[0].startswith("--"):
        option = words.pop(0)
        if option != "--unbuffered":
            name = words.pop(0)
            for mark, value in names.items():
                name = name.replace(mark, value)
            files[option] = open(name, "a")  # noqa: SIM115
    sys.exit(subprocess.run(words, stdout=files["--output"], stderr=files["--error"], check=False).returncode)


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(HOME.glob("*.state")):
        print(f"{path.stem}|{path.read_text().strip()}|here")


if __name__ == "__main__":
    programs = {"sbatch": sbatch, "srun": srun, "sacct": sacct}
    programs[Path(sys.argv[0]).name](*sys.argv[1:])
