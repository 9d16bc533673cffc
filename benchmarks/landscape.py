"""Every way of learning a flow map, on the checkerboard: quality by number of jumps, and what a step costs.

    python benchmarks/landscape.py --jobs 2              every recipe of landscape/; two CPU cores, hours
    python benchmarks/landscape.py --only lsd,psd        some of them, after the teachers that they learn from
    python benchmarks/landscape.py --fast                six of them briefly, held to their order; one core, 4 min

What is known is kept at once: the same command goes on where an earlier one was killed, and makes anew what comes
from another recipe or teacher. --write PATH writes the table as Markdown too.

Protocol: 200,000 samples of one noise, KL(board ‖ samples) on 40 x 40 bins of [-1.25, 1.25]^2 against the board
itself; the floor is that of as many real points. Velocities take Euler steps, maps to data alone (t = 0) jump there
and back to fresh noise. Off support: share on white squares or outside, at one jump. Defect: mean distance between a
jump from noise and the same in two, where the map makes such jumps; as long as it is judged at. Cost: seconds a step
over those of flow matching, through the Trainer from the end of the training, median of alternating rounds in one
process; beside it the forward passes that Dieleman 2026, "Learning the integral of a diffusion model", counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import statistics
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from rich.console import Console
from rich.table import Table

from steerfm import FlowMap, config
from steerfm.commands import common
from steerfm.commands.fitting import fit, last_good
from steerfm.config import Composed
from steerfm.files import read_json, write_atomic
from steerfm.metrics import histogram_counts, histogram_kl, histogram_kl_floor, semigroup_defect
from steerfm.runs import Run, run_fingerprint, set_aside
from steerfm.sampling import few_jumps, renoised
from steerfm.seeds import noise
from steerfm.solvers import euler

RULES = {
    "velocity": ["flow_matching", "reflow"],
    "Lagrangian": ["lmd", "lsd", "ayf_lmd", "tvm", "free_flow", "pid"],
    "Eulerian": [
        "ct", "cd", "ctm", "emd", "esd", "ayf_emd", "so_flow", "facm", "mean_flow", "improved_mean_flow",
        "ict", "ect", "scm",
    ],
    "compositional": ["shortcut", "split_mean_flow", "psd", "psd_uniform", "fmm", "pfmm", "progressive"],
    "distributional": ["add", "dmd"],
}  # fmt: skip
METHODS = {name: rule for rule, names in RULES.items() for name in names}
PASSES = {  # forward passes a step, as cited
    "flow_matching": 3, "lmd": 9, "lsd": 10, "ayf_lmd": 6, "tvm": 10, "free_flow": 12, "pid": 7, "ct": 4, "cd": 5,
    "ctm": 7, "emd": 7, "esd": 10, "ayf_emd": 6, "so_flow": 7, "facm": 8, "mean_flow": 4, "improved_mean_flow": 5,
    "shortcut": 8, "split_mean_flow": 9, "psd": 8, "psd_uniform": 8, "fmm": 9, "pfmm": 5,
}  # fmt: skip
TEACHERS = {"pfmm": "fmm"}  # of those whose recipe asks for one; the others learn from flow matching
EULER_STEPS = {"flow_matching", "reflow"}  # they learn a velocity, and no jumps
RENOISED = {"ct", "cd", "facm", "ict", "ect", "scm", "add", "dmd"}  # they learn jumps to data, t = 0, alone
FROM_NOISE = {"free_flow", "pid"}  # they learn jumps from noise, s = 1, alone: one is all they make
JUDGED = {"fmm": 4}  # at how many jumps a map has to be good that does not reach as far as one
SEEDS = {
    "lsd": 3,
    "psd": 3,
    "mean_flow": 3,
    "improved_mean_flow": 3,
    "esd": 3,
}  # one of the rest, and of all in a trial

COUNTS = (1, 2, 4, 8, 16)  # jumps or steps
EULER = 1.18  # KL of flow matching in four Euler steps
SLACK = 1.15  # over the figures of an earlier run of these settings, elsewhere
LIMITS = {
    "lsd": {1: 0.30, 4: 0.25},
    "psd": {1: SLACK * 0.591, 2: SLACK * 0.511, 4: SLACK * 0.407, 8: SLACK * 0.216, 16: SLACK * 0.174},
    "mean_flow": {1: SLACK * 0.571, 2: SLACK * 0.686, 4: SLACK * 0.411, 8: SLACK * 0.250, 16: SLACK * 0.206},
    "esd": {1: SLACK * 0.583, 2: SLACK * 0.586, 4: SLACK * 0.460, 8: SLACK * 0.247, 16: SLACK * 0.145},
}
WARM_UP, TIMED = 5, 25  # steps of a round of the stopwatch
BATCH = 4000  # samples at once, of one seed
HEADINGS = ["rule", "method", *map(str, COUNTS), "off support", "defect", "cost", "cited (passes)"]
console = Console(width=None if os.isatty(1) else 160)  # a file takes the whole table

Figures = dict[str, Any]  # of one method and one seed
Found = dict[str, list[Figures]]  # by method, one entry a seed


@dataclass(frozen=True)
class Options:
    """Hold where and how long to train, and how much to measure; steps None leaves that to the recipe."""

    folder: str
    steps: int | None = None
    samples: int = 200_000
    overrides: tuple[str, ...] = ()


FAST = Options("runs/landscape_fast", 2500, 12_000, ("network.width=128", "data.batch_size=512"))
FAST_METHODS = ("flow_matching", "lmd", "lsd", "ct", "mean_flow", "psd")


def teacher_of(name: str) -> str | None:
    """Return the method whose map a recipe asks for, or None."""
    asked = config.preview([f"recipe=landscape/{name}"]).get("teacher")
    return TEACHERS.get(name, "flow_matching") if asked == "???" else None


def in_order(names: Sequence[str]) -> list[list[str]]:
    """Return the methods and their teachers in waves: whom a wave learns from is in an earlier one."""
    waves = [set(names)]
    while teachers := {teacher for name in waves[0] if (teacher := teacher_of(name))}:
        waves = [teachers, *(wave - teachers for wave in waves)]
    return [[name for name in METHODS if name in wave] for wave in waves]


def compose(name: str, seed: int, options: Options) -> Composed:
    """Compose a method's recipe for one seed of weights, noise and data."""
    overrides = [f"recipe=landscape/{name}", f"name={name}-{seed}", f"folder={options.folder}", f"seed={seed}"]
    overrides += [f"data.seed={seed}", "threads=1", "logger=none", "trainer.enable_progress_bar=false"]
    overrides += ["callbacks.grid=null", *options.overrides]
    teacher = teacher_of(name)
    if teacher is not None:
        overrides.append(f"teacher={options.folder}/{teacher}-{seed}")
    if options.steps is not None:
        overrides += [f"trainer.max_steps={options.steps}", f"checkpoint_every={options.steps}"]
    return config.compose("train", overrides)


def start_worker() -> None:
    """Give a worker one thread, no warnings of Lightning's, and an end when the main process is killed."""
    torch.set_num_threads(1)
    common.show_log()
    logging.getLogger("steerfm").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def learn(name: str, seed: int, options: Options) -> Figures:
    """Train and measure one method with one seed, or return what an earlier run found of the same recipe."""
    recipe = compose(name, seed, options)
    made_from = [run_fingerprint(recipe.values, common.inputs(recipe), options.folder), options.samples]
    kept = Path(options.folder) / "figures" / f"{name}-{seed}.json"
    if kept.exists() and (known := read_json(kept))["made_from"] == made_from:
        return known
    flow_map = FlowMap.load(trained(recipe, made_from[0]))
    figures = measure(flow_map.eval(), name, options.samples)
    figures["cost"] = relative_cost(recipe, compose("flow_matching", seed, options), 5 if options.steps is None else 1)
    figures |= {"steps": recipe.values["trainer"]["max_steps"], "made_from": made_from}
    write_atomic(kept, (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def trained(recipe: Composed, fingerprint: str) -> Path:
    """Train a recipe unless that is done, and return the folder of its map; a run of another recipe is set aside."""
    root, name = recipe.values["folder"], recipe.values["name"]
    folder = Path(root) / name
    if Run.is_done(root, name, fingerprint):
        return folder / recipe.values["save_as"]
    if (folder / "run.json").exists() and Run.open(folder).info.fingerprint != fingerprint:
        common.say(f"The recipe changed; the earlier run is now {set_aside(root, name)}")
    return fit(recipe)


def board() -> torch.Tensor:
    """Return the share of the checkerboard in each of 40 x 40 bins on [-1.25, 1.25]^2; its squares are 8 bins wide."""
    square = torch.arange(32) // 8
    dark = (square[:, None] - square) % 2 == 0
    return torch.nn.functional.pad(dark.double() / dark.sum(), (4, 4, 4, 4))


def sample(flow_map: FlowMap, name: str, count: int, seed: int) -> torch.Tensor:
    """Return one seed's BATCH samples of a method's map, (BATCH, 2), made in `count` jumps or steps."""
    x1 = noise([seed], (2,), particles=BATCH)
    if name in RENOISED:
        fresh = [noise([seed], (2,), particles=BATCH, stream="step", step=jump) for jump in range(count)]
        return renoised(flow_map, x1, count, draw=fresh.__getitem__)
    return (euler if name in EULER_STEPS else few_jumps)(flow_map, x1, count)


@torch.no_grad()
def measure(flow_map: FlowMap, name: str, n: int) -> Figures:
    """Return the divergence at each count of jumps, the share off the support and the defect, None where undefined."""
    real, kl, off_support, defect = board(), {}, 0.0, None
    for count in (1,) if name in FROM_NOISE else COUNTS:
        x0 = torch.cat([sample(flow_map, name, count, seed) for seed in range(n // BATCH)])
        kl[str(count)] = histogram_kl(x0, real)
        if count == 1:
            off_support = 1 - float(histogram_counts(x0)[:-1][real.flatten() > 0].sum()) / len(x0)
    if name not in EULER_STEPS | RENOISED | FROM_NOISE:
        x1, s, h = noise([0], (2,), particles=BATCH), torch.ones(BATCH), 1 / JUDGED.get(name, 1)
        defect = float(semigroup_defect(flow_map, x1, s, s - h / 2, s - h).mean())
    return {"kl": kl, "off_support": off_support, "defect": defect}


def relative_cost(recipe: Composed, reference: Composed, rounds: int) -> float:
    """Return the seconds a step of a trained recipe over those of the reference, in alternating rounds."""
    checkpoint = last_good(Run.open(Path(recipe.values["folder"]) / recipe.values["name"]))
    return statistics.median(seconds_a_step(recipe, checkpoint) / seconds_a_step(reference) for _ in range(rounds))


def seconds_a_step(recipe: Composed, checkpoint: Path | None = None) -> float:
    """Return the median seconds of a step, going on from a checkpoint of the end of the training, or from the start."""
    ends: list[float] = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: ends.append(time.perf_counter()))
    steps = WARM_UP + TIMED + (recipe.values["trainer"]["max_steps"] if checkpoint else 0)
    quiet = {"logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = recipe.build("trainer", max_steps=steps, callbacks=[*common.callbacks(recipe, steps), watch], **quiet)
    trainer.fit(recipe.build("module"), recipe.build("data"), ckpt_path=checkpoint, weights_only=True)
    return statistics.median(end - start for start, end in itertools.pairwise(ends[WARM_UP:]))


def learn_all(names: Sequence[str], options: Options, jobs: int) -> tuple[Found, list[str]]:
    """Return the figures of each method, one entry a seed, and what went wrong; teachers come first."""
    found: Found = {}
    failed: list[str] = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        for wave in in_order(names):
            ready = [name for name in wave if teacher_of(name) in (None, *found)]
            failed += [f"FAILED  {name}: its teacher is missing." for name in wave if name not in ready]
            seeds = SEEDS if options.steps is None else {}
            tasks = [(name, seed) for name in ready for seed in range(seeds.get(name, 1))]
            futures = {pool.submit(learn, *task, options): task for task in tasks}
            for future in as_completed(futures):
                name, seed = futures[future]
                try:
                    found[name] = [*found.get(name, []), future.result()]
                except Exception as error:  # one method's fault must not cost the others their hours
                    failed.append(f"FAILED  {name}, seed {seed}: {type(error).__name__}: {error}")
    return {name: found[name] for name in METHODS if name in found}, failed


def divergence(figures: list[Figures], count: int) -> float:
    """Return the mean over seeds of the divergence at `count` jumps."""
    return statistics.mean(each["kl"][str(count)] for each in figures)


def judge(found: Found, euler_kl: float, in_full: bool) -> list[str]:
    """Return a line on whether each figure is at most that of four Euler steps, and in full whether the bounds hold."""
    lines = []
    for name, figures in found.items():
        if name not in EULER_STEPS:
            at = JUDGED.get(name, 1)
            lines.append(bound(f"{name} at {at}, as four Euler steps", divergence(figures, at), euler_kl))
        for at, most in LIMITS.get(name, {}).items() if in_full else ():
            lines.append(bound(f"{name} at {at}", divergence(figures, at), most))
    if in_full and {"mean_flow", "improved_mean_flow"} <= found.keys():
        new, old = (divergence(found[name], 1) for name in ("improved_mean_flow", "mean_flow"))
        lines.append(bound("improved_mean_flow at 1, as mean_flow", new, old))
    return lines


def bound(text: str, value: float, most: float) -> str:
    """Return a line that says whether a value is at most what it may be."""
    return f"{'holds ' if value <= most else 'BROKEN'}  {text}: {value:.3f}, at most {most:.3f}"


def cells(name: str, figures: list[Figures]) -> list[str]:
    """Return a method's row of the table."""
    columns = [[each["kl"].get(str(count)) for each in figures] for count in COUNTS]
    columns += [[each[key] for each in figures] for key in ("off_support", "defect", "cost")]
    cited = f"{PASSES[name] / PASSES['flow_matching']:.2f} ({PASSES[name]})" if name in PASSES else "–"
    return [METHODS[name], name, *map(mean_and_spread, columns), cited]


def mean_and_spread(values: list[Any]) -> str:
    """Return the mean, with the standard deviation where there are several, or a dash for what is not defined."""
    if None in values:
        return "–"
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def caption(found: Found, samples: int) -> str:
    """Return what the table's figures mean."""
    steps = sorted({f"{each['steps']:,}" for figures in found.values() for each in figures})
    return (
        f"KL at 1 to 16 jumps (velocities: Euler steps) of {samples:,} samples, floor "
        f"{histogram_kl_floor(board(), samples):.4f}; one seed, or mean ± standard deviation of three; "
        f"{' or '.join(steps)} steps of training; cost: seconds a step over flow matching's, beside the cited forward "
        f"passes over its {PASSES['flow_matching']}"
    )


def show(found: Found, samples: int) -> None:
    """Print the table, a section a rule."""
    table = Table(*HEADINGS, title="The landscape of flow-map training", caption=caption(found, samples))
    for _, names in itertools.groupby(found, METHODS.__getitem__):
        table.add_section()
        for name in names:
            table.add_row(*cells(name, found[name]))
    console.print(table)


def write(path: Path, found: Found, samples: int) -> None:
    """Write the table as Markdown."""
    rows = [HEADINGS, [":--", ":--", *["--:"] * (len(HEADINGS) - 2)], *(cells(name, found[name]) for name in found)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    write_atomic(path, "\n".join([*lines, "", f"{caption(found, samples)}.", ""]).encode())


def main() -> None:
    """Train and measure, print the table and the bounds; exit with 1 where one is broken or a method failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods, separated by commas (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many are trained at once, each on one thread")
    parser.add_argument("--steps", type=int, help="of training, for a trial, which is held to no bounds")
    parser.add_argument("--fast", action="store_true", help="few steps and samples, held to the order alone")
    parser.add_argument("--folder", help="of runs and figures (default: runs/landscape, _fast or _STEPS)")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the table as Markdown")
    arguments = parser.parse_args()
    fast, steps = arguments.fast, arguments.steps
    names = arguments.only.split(",") if arguments.only else list(FAST_METHODS if fast else METHODS)
    if unknown := set(names) - METHODS.keys():
        parser.error(f"there is no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    options = FAST if fast else Options("runs/landscape")
    if steps:
        options = replace(options, folder=f"{options.folder}_{steps}", steps=steps, samples=FAST.samples)
    options = replace(options, folder=arguments.folder or options.folder)
    found, lines = learn_all(["flow_matching", *names] if fast else names, options, arguments.jobs)
    show(found, options.samples)
    if arguments.write:
        write(arguments.write, found, options.samples)
    if fast and "flow_matching" in found:
        lines += judge(found, divergence(found["flow_matching"], 4), in_full=False)
    elif steps is None:
        lines += judge(found, EULER, in_full=True)
    console.print("\n".join(lines), markup=False)
    raise SystemExit(any(not line.startswith("holds") for line in lines))


if __name__ == "__main__":
    main()
