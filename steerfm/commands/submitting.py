"""Run a sweep's recipes one after the other, or hand each to SLURM as a job of its own (submitit)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerfm.commands import common
from steerfm.config import Composed, import_from_here
from steerfm.errors import ConfigError, RunError

CLUSTERS = ("slurm", "local", "debug")


def carried_out(function: Callable[[Composed], Path], recipes: Sequence[Composed]) -> Iterator[Path]:
    """Yield function(recipe) of every recipe, each as it is done; where they name a launcher, all at once, as jobs."""
    launcher = recipes[0].values.get("launcher")
    plain = [replace(each, values={k: v for k, v in each.values.items() if k != "launcher"}) for each in recipes]
    if launcher is None:
        yield from map(function, plain)
        return
    jobs = _submitted(function, plain, launcher)
    for job, recipe in zip(jobs, plain, strict=True):
        yield _result(job, recipe)


def _submitted(
    function: Callable[[Composed], Path], recipes: Sequence[Composed], launcher: dict[str, Any]
) -> list[Any]:
    """Return submitit's jobs. Raises ConfigError for a cluster or a parameter that it does not know."""
    import submitit

    if launcher["cluster"] not in CLUSTERS:
        raise ConfigError(f"launcher.cluster is one of {', '.join(CLUSTERS)}; got '{launcher['cluster']}'.")
    try:
        executor = submitit.AutoExecutor(folder=launcher["folder"], cluster=launcher["cluster"])
        executor.update_parameters(**launcher["parameters"])
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"submitit cannot be set up by 'launcher' ({text}): correct its parameters.") from error
    with executor.batch():
        jobs = [executor.submit(in_a_job, function, recipe) for recipe in recipes]
    for job, recipe in zip(jobs, recipes, strict=True):
        common.say(f"Job {job.job_id} runs {recipe.values['name']}: {job.paths.stderr}")
    return jobs


def in_a_job(function: Callable[[Composed], Path], recipe: Composed) -> Path:
    """Run a recipe in a job of its own."""
    if recipe.trusted:
        import_from_here()
    common.show_log()
    return function(recipe)


def _result(job: Any, recipe: Composed) -> Path:
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result()
    except UncompletedJobError as error:
        last = (job.stderr() or "").strip().rpartition("\n")[2]
        raise RunError(
            f"Job {job.job_id}, which ran {recipe.values['name']}, failed ({last.partition(': ')[2] or last}): see "
            f"{job.paths.stderr}; the same command goes on with what is not finished."
        ) from error
