"""The command line: parses and dispatches, nothing else.

Imports neither torch, nor lightning, nor hydra: a command's own file does, once it is chosen.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from steerfm.errors import SteerfmError

EXTRAS = {
    "diffusers": "diffusers",
    "peft": "diffusers",
    "accelerate": "diffusers",
    "torchao": "quantised",
    "submitit": "slurm",
    "trl": "trl",
    "wandb_workspaces": "report",
    "pandas": "report",
    "altair": "report",
    "datasets": "data",
    "fastapi": "serve",
    "uvicorn": "serve",
}
FAILED, INTERRUPTED = 2, 130
EXPORTED = ("png", "pdf", "svg", "tex", "md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (0 good, 1 a failed check, 2 an error in one sentence, 130 Ctrl-C)."""
    arguments = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are 8 times slower on a busy machine
    try:
        command = importlib.import_module(f"steerfm.commands.{arguments.command}")
        return command.run(arguments)
    except SteerfmError as error:
        return _say(str(error), FAILED)
    except ModuleNotFoundError as error:
        return _say(_missing(error), FAILED)
    except KeyboardInterrupt as interrupt:
        again = str(interrupt) or "the same command"
        return _say(f"\nInterrupted. What is saved stays; to continue, run: {again}", INTERRUPTED)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments; exits with argparse's usage line where they are wrong."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    late = [text for text in rest if "=" in text and not text.startswith("-")]
    if not hasattr(arguments, "overrides") or late != rest:
        unknown = [text for text in rest if text not in late] or rest
        if unknown:
            parser.error(f"unknown arguments: {' '.join(unknown)}")
    else:
        arguments.overrides = [*arguments.overrides, *late]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steerfm", description="Reward fine-tuning and steering of flow maps: train, fine-tune, steer, compare."
    )
    parser.add_argument("--version", action="version", version=f"steerfm {version('steerfm')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_recipe_command(
        commands,
        "cache",
        "keep what a pretrained model's encoders make of pictures and captions",
        "steerfm cache recipe=latents map=stabilityai/stable-diffusion-3.5-medium data.folder=my_pictures",
    )
    _add_recipe_command(commands, "train", "train a flow map", "steerfm train recipe=digits")
    _add_recipe_command(
        commands, "finetune", "fine-tune one", "steerfm finetune recipe=digits_finetune map=runs/digits"
    )
    _add_recipe_command(commands, "sample", "sample from one", "steerfm sample recipe=digits_sample map=runs/digits")
    steer = _add_recipe_command(
        commands, "steer", "steer sampling", "steerfm steer recipe=digits_steer map=runs/digits"
    )
    steer.add_argument(
        "--trace",
        dest="overrides",
        action="append_const",
        const="trace=true",
        help="draw the look-aheads of the first samples along time, RUN/trace.png (the same as trace=true)",
    )
    _add_recipe_command(
        commands, "write", "tune a writer of prompts", "steerfm write recipe=prompt_writer model=models/Qwen3-0.6B"
    )
    _add_recipe_command(commands, "compare", "compare runs", "steerfm compare 'runs=[base,steered]' x=network_calls")
    _add_report(commands)
    _add_reward(commands)
    _add_recipes(commands)
    demo = commands.add_parser("demo", help="run a whole list of recipes, from training to comparison")
    demo.add_argument("name", nargs="?", default="shapes", help="a list of recipes (default: shapes)")
    demo.add_argument("--folder", default="runs", help="where the runs go (default: runs)")
    _add_shared(demo)
    export = commands.add_parser(
        "export", help="write a tuned pretrained map for plain diffusers: steerfm export runs/tuned/map exported"
    )
    export.add_argument("map", help="a map of FlowMap.from_pretrained that was saved, or the run that saved it")
    export.add_argument("to", metavar="FOLDER", help="where it goes: an empty folder, or one that is not there")
    export.add_argument("--merged", action="store_true", help="LoRA merged into the whole network")
    export.add_argument(
        "--jumps", type=int, metavar="N", help="of a flow map with a second time: the whole network, for N jumps"
    )
    export.add_argument("--push", metavar="ORG/NAME", help="then upload it to the hub, as a private repository")
    export.add_argument("--public", action="store_true", help="with --push: a repository that everybody may read")
    env = commands.add_parser("env", help="print versions, devices, cores and memory; or what a recipe needs of it")
    env.add_argument(
        "--plan",
        action="store_true",
        help="estimate a recipe's peak memory, without running it: steerfm env --plan recipe=digits_finetune map=...",
    )
    env.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="with --plan: recipe=NAME, and any value of it")
    _add_shared(env)
    return parser


def _add_recipe_command(
    commands: argparse._SubParsersAction, name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=f"{summary}: {example}", description=f"{summary}, e.g. {example}")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe=NAME, name=RUN, and any value of it")
    command.add_argument("-m", "--multirun", action="store_true", help="run every combination of KEY=A,B values")
    _add_shared(command)
    return command


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser(
        "report", help="show a comparison's page, or write it for a paper: steerfm report show base_or_tilting"
    )
    actions = report.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="serve the page to this machine's browser")
    show.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    show.add_argument("--no-browser", dest="browser", action="store_false", help="print the address and open nothing")
    export = actions.add_parser("export", help="write grids and plots as PNG, PDF, SVG, tables as LaTeX and Markdown")
    export.add_argument("--folder", metavar="DIR", help="where the files go (default: export/RUN)")
    export.add_argument(
        "--format", nargs="+", metavar="FORMAT", default=EXPORTED, help=f"some of {' '.join(EXPORTED)} (default: all)"
    )
    export.add_argument("--prompts", type=int, default=8, metavar="N", help="prompts in the grid (default: 8)")
    export.add_argument("--seeds", type=int, default=8, metavar="N", help="seeds in the grid (default: 8)")
    publish = actions.add_parser("publish", help="send it to W&B as a Report, and print its URL")
    publish.add_argument("--project", default="", help="the W&B project (default: the one that the comparison names)")
    publish.add_argument("--entity", default="", help="the W&B user or team (default: your own)")
    for action in (show, export, publish):
        action.add_argument("run", metavar="RUN", help="a comparison's run folder, or its name below --root")
        action.add_argument("--root", default="runs", help="the folder of the runs (default: runs)")


def _add_reward(commands: argparse._SubParsersAction) -> None:
    reward = commands.add_parser(
        "reward", help="list, check, calibrate, serve rewards: steerfm reward check brightness"
    )
    actions = reward.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_shared(actions.add_parser("list", help="every reward that has a name, shipped, yours or a package's"))
    check = actions.add_parser("check", help="name what is wrong with one: steerfm reward check my_rewards:redness")
    _add_reward_name(check)
    check.add_argument(
        "--pictures", choices=["digits", "shapes", "random"], default="digits", help="what it is tried on"
    )
    check.add_argument("--count", type=int, default=8, help="how many pictures (default: 8)")
    calibrate = actions.add_parser(
        "calibrate",
        help="measure its mean and spread: steerfm reward calibrate brightness recipe=digits_sample map=runs/digits",
    )
    _add_reward_name(calibrate)
    _add_serve(
        actions.add_parser("serve", help="score for others over HTTP: steerfm reward serve brightness jpeg_size")
    )


def _add_reward_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", metavar="NAME", help="a name of the list, my_rewards:redness, or a dotted path")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values of its recipe, as in reward.model=..."
    )
    _add_shared(parser)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "rewards", nargs="+", metavar="NAME", help="as in check; KEY=VALUE are values of a single one's recipe"
    )
    serve.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument(
        "--token-from",
        default="STEERFM_REWARD_TOKEN",
        metavar="VARIABLE",
        help="the environment variable with the token that requests must bear (default: STEERFM_REWARD_TOKEN)",
    )
    serve.add_argument("--micro-batch", type=int, metavar="N", help="score N pictures at a time, in less memory")
    serve.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    _add_shared(serve)


def _add_recipes(commands: argparse._SubParsersAction) -> None:
    recipes = commands.add_parser("recipes", help="list, show or copy recipes: steerfm recipes copy digits mine")
    actions = recipes.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_shared(actions.add_parser("list", help="name, command and first line of every recipe"))
    show = actions.add_parser("show", help="print a recipe as composed: steerfm recipes show digits data.batch_size=64")
    show.add_argument("recipe")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    _add_shared(show)
    copy = actions.add_parser("copy", help="write ./recipes/recipe/NEW.yaml, to be changed")
    copy.add_argument("recipe")
    copy.add_argument("new")
    _add_shared(copy)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", action="append", default=[], metavar="DIR", help="a folder of recipes of your own")
    parser.add_argument("--trust", action="append", default=[], metavar="PKG", help="a package that recipes may name")


def _missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "").split(".")[0]
    if package in EXTRAS:
        return f"This needs the package '{package}', which is not installed: pip install 'steerfm[{EXTRAS[package]}]'"
    return f"The package '{package}' is not installed: {error}"


def _say(sentence: str, code: int) -> int:
    from rich.console import Console

    style = "red" if code == FAILED else "yellow"
    Console(stderr=True).print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
