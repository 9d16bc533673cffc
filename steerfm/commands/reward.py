"""`steerfm reward`: list those that have a name, check, calibrate or serve one."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from steerfm import config, digits, images, seeds, shape_captions, shapes
from steerfm.config import Composed
from steerfm.errors import ConfigError
from steerfm.http_client import is_loopback
from steerfm.recipe_files import Library, header
from steerfm.reward import Finding, Reward, as_reward, check, load_reward, parts_of
from steerfm.reward_check import Measured, measure
from steerfm.reward_plugins import plugged_in, plugins
from steerfm.types import Values

console = Console(highlight=False)

NOT_LISTED = ("none", "custom")  # options of the group that stand for no reward of their own
BASE = "shapes_sample"  # the recipe that is calibrated on unless another is named: its map ships with the package


def run(arguments: argparse.Namespace) -> int:
    """List, check, calibrate or serve; a check returns 1 if it finds a fault, 0 if it finds none."""
    actions = {"list": _list, "check": _check, "calibrate": _calibrate, "serve": _serve}
    return actions[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    """Print every reward with a name: those of recipes, then those of installed packages, broken ones too."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("reward", "what it scores", "from"):
        table.add_column(heading, overflow="fold")
    for row in _rows(Library(arguments.recipes)):
        table.add_row(*(escape(text) for text in row))
    console.print(table)
    return 0


def _rows(library: Library) -> Iterator[tuple[str, str, str]]:
    for name, path in sorted(library.options("reward").items()):
        if name not in NOT_LISTED:
            shipped = path.is_relative_to(library.shipped)
            yield name, " ".join(header(path)[:1]), "steerfm" if shipped else str(path)
    for name, entry in plugins().items():
        yield name, _described(name), _package(entry)


def _described(name: str) -> str:
    """Return the first line that a plug-in says of itself, or what is wrong with it."""
    try:
        found = plugged_in(name)
    except ConfigError as error:
        return f"BROKEN: {error}"
    return (getattr(found, "__doc__", None) or "").strip().partition("\n")[0]


def _package(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"


def _check(arguments: argparse.Namespace) -> int:
    if arguments.count < 4:
        raise ConfigError(f"A check needs at least 4 different pictures, got --count {arguments.count}.")
    if arguments.overrides and not _is_listed(arguments):
        raise ConfigError(
            f"'{arguments.reward}' has no recipe, so it takes no values: leave {arguments.overrides} out."
        )
    reward = _named(arguments)
    pictures, prompts = PICTURES[arguments.pictures](arguments.count)
    findings = check(reward, pictures, prompts)
    for finding in findings:
        _print(finding)
    faults = sum(finding.fault for finding in findings)
    tried = f"'{reward.name}' on {len(pictures)} pictures of {tuple(pictures.shape[1:])}"
    console.print(f"{tried}: {_count(faults)}", markup=False, soft_wrap=True)
    if not faults:
        for part in parts_of(reward):
            for line in _cost(measure(part, pictures, prompts), len(pictures)):
                console.print(f"'{part.name}' {line}", markup=False, soft_wrap=True)
    return 1 if faults else 0


def _serve(arguments: argparse.Namespace) -> int:
    """Answer requests for scores until a signal comes, a token among them asked for wherever others could reach it."""
    from steerfm.reward_server import Server, address_of, application, listen

    token = os.environ.get(arguments.token_from)
    if not token and not is_loopback(arguments.host):
        raise ConfigError(
            f"Whoever reaches {arguments.host} could ask this server, and there is no token: put one into the "
            f"environment variable {arguments.token_from}, or leave --host out."
        )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rewards = _to_serve(arguments)
    app = application(rewards, token=token or None, micro_batch=arguments.micro_batch, device=device)
    with listen(arguments.host, arguments.port) as listening:
        line = f"Serving {', '.join(rewards)} at {address_of(listening)}, {'with' if token else 'without'} a token."
        server = Server(app, lambda: console.print(line, markup=False, soft_wrap=True))
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # both signals end it in the same way
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises anew what it was stopped by
            console.print("Stopped.")
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


def _to_serve(arguments: argparse.Namespace) -> dict[str, Reward]:
    """Return the rewards that were named, by their own names."""
    names = [text for text in arguments.rewards if "=" not in text]
    overrides = [text for text in arguments.rewards if "=" in text]
    if overrides and len(names) != 1:
        raise ConfigError(f"{overrides} are values of one reward's recipe, got {len(names)} rewards: serve one alone.")
    found: dict[str, Reward] = {}
    for name in names:
        reward = _named(argparse.Namespace(**{**vars(arguments), "reward": name, "overrides": overrides}))
        if reward.name in found:
            raise ConfigError(f"Two rewards are called '{reward.name}': serve them at two ports.")
        found[reward.name] = reward
    return found


def _named(arguments: argparse.Namespace) -> Reward:
    """Return the reward that was named: one of the list by its recipe, else what `load_reward` finds."""
    if _is_listed(arguments):
        return as_reward(_composed(arguments).build("reward"))
    if arguments.trust:
        config.import_from_here()
    return load_reward(arguments.reward, arguments.trust)


def _is_listed(arguments: argparse.Namespace) -> bool:
    return arguments.reward not in NOT_LISTED and arguments.reward in Library(arguments.recipes).options("reward")


def _composed(arguments: argparse.Namespace) -> Composed:
    """Return the sampling recipe that the arguments name, with the reward in it where it is one of the list."""
    base = [] if any(text.startswith("recipe=") for text in arguments.overrides) else [f"recipe={BASE}"]
    reward = arguments.reward if _is_listed(arguments) else "none"
    lines = [*base, f"reward={reward}", *arguments.overrides]
    return config.compose("sample", lines, folders=arguments.recipes, trusted=arguments.trust)


def _cost(measured: Measured, count: int) -> Iterator[str]:
    yield f"scores {measured.rate:.4g} pictures a second, {_memory(measured.memory)} for {count} of them"
    if measured.gradient_rate is not None and measured.gradient_memory is not None:
        memory = _memory(measured.gradient_memory)
        yield f"differentiates {measured.gradient_rate:.4g} pictures a second, {memory} for {count} of them"
    if measured.words is not None:
        yield f"reads only the start of a prompt: the last of {measured.words} words changed nothing"


def _memory(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _calibrate(arguments: argparse.Namespace) -> int:
    """Print mean and spread of each part on a map's own samples, and the line that normalises it; of one, nft's too."""
    reward = _named(arguments)
    for name, values in totals(reward, _composed(arguments)).items():
        heard = values[~values.isnan()].double()
        if len(heard) < 2 or not heard.std() > 0:
            raise ConfigError(
                f"'{name}' gives {len(heard)} of {len(values)} samples a score and all the same: it cannot be "
                "normalised. Sample more (seeds=...), or leave it out."
            )
        mean, std = float(heard.mean()), float(heard.std())
        lowest, highest = float(heard.min()), float(heard.max())
        said = f"mean {mean:.4g}, standard deviation {std:.4g}, from {lowest:.4g} to {highest:.4g}"
        silent = f", silent on {len(values) - len(heard)}" if len(heard) < len(values) else ""
        console.print(f"'{name}' on {len(values)} samples: {said}{silent}", markup=False, soft_wrap=True)
        console.print(f"  Python: {name}.normalised({mean:.4g}, {std:.4g})", markup=False, soft_wrap=True)
        target = "_target_: steerfm.reward_algebra.Normalised"
        line = f"  recipe: {{{target}, mean: {mean:.4g}, std: {std:.4g}, reward: ...}}"
        console.print(line, markup=False, soft_wrap=True)
        if parts_of(reward) == [reward]:  # negative-aware tuning wants those of the whole reward
            line = f"  method=nft: method.center={mean:.4g} method.divisor={6 * std:.4g}"
            console.print(line, markup=False, soft_wrap=True)
    return 0


def totals(reward: Reward, recipe: Composed) -> dict[str, Values]:
    """Return each part's total (N,) by name, on the samples that a recipe describes; NaN where it abstains."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flow_map, method, data = (recipe.build(part) for part in ("flow_map", "method", "data"))
    flow_map, reward = flow_map.to(device).eval(), reward.to(device)
    found: dict[str, list[Values]] = {part.name: [] for part in parts_of(reward)}
    for batch in data.predict_dataloader():
        samples = method(flow_map, None, prompts=batch["prompt"], seeds=batch["seed"])
        with torch.no_grad():
            for part in parts_of(reward):
                found[part.name].append(part.evaluate(samples.images, samples.prompts).total.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def tinted_digits(count: int) -> tuple[Tensor, list[str]]:
    """Return `count` different scans of digits, each in a colour of its own, (count, 3, 8, 8), and their captions."""
    scans = digits.load()
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(scans), generator=generator)[:count]
    colours = 0.5 + 0.5 * torch.rand(len(index), 3, 1, 1, generator=generator)
    return images.to_unit(scans.x0[index]) * colours, [scans.captions[i] for i in index.tolist()]


def noise(count: int) -> tuple[Tensor, list[str]]:
    """Return `count` random pictures (count, 3, 32, 32) and prompts."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 32, 32, generator=generator), [f"random picture {i}" for i in range(count)]


def scenes(count: int) -> tuple[Tensor, list[str]]:
    """Return `count` scenes of shapes (count, 3, 32, 32), every other one with the caption of the one before it."""
    rng = seeds.generator(0, "data")
    drawn = [shapes.sample_scene(rng) for _ in range(count)]
    captions = [shape_captions.plain(shape_captions.describe(scene, rng)) for scene in drawn]
    return shapes.render(drawn), [captions[i - i % 2] for i in range(count)]


PICTURES = {"digits": tinted_digits, "shapes": scenes, "random": noise}


def _print(finding: Finding) -> None:
    mark, style = ("fault ", "red") if finding.fault else ("remark", "yellow")
    console.print(f"[{style}]{mark}[/{style}]", end="  ")
    console.print(f"'{finding.part}' ({finding.subject}): {finding.message}", markup=False, soft_wrap=True)


def _count(faults: int) -> str:
    return "no fault" if faults == 0 else "1 fault" if faults == 1 else f"{faults} faults"
