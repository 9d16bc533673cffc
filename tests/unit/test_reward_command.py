"""`steerfm reward`: rewards of installed packages, the list, the check by name and its costs, calibration."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steerfm.cli import main
from steerfm.commands.reward import totals
from steerfm.config import compose
from steerfm.errors import ConfigError, TrustError
from steerfm.reward import FunctionReward, as_reward, load_reward
from steerfm.reward_algebra import Normalised
from steerfm.reward_check import measure, words_read
from steerfm.reward_plugins import plugins

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "warm-rewards"
version = "1.2"
[tool.setuptools]
py-modules = ["warm_rewards"]
[project.entry-points."steerfm.rewards"]
warmth = "warm_rewards:warmth"
cold = "warm_rewards:Cold"
broken = "warm_rewards.gone:nothing"
""",
    "warm_rewards.py": '''
from steerfm.reward import Reward

def warmth(images, prompts):
    """Red less blue."""
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))

class Cold(Reward):
    """Blue less red."""
    native_range = (-1.0, 1.0)
    def score(self, images, prompts, **metadata):
        return -warmth(images, prompts)
''',
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a package with an entry point into a folder of its own, as pip does, and return the folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name, text in PACKAGE.items():
        (source / name).write_text(text, encoding="utf-8")
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    unpack = ["-m", "zipfile", "-e", str(wheel), str(target)]
    subprocess.run([sys.executable, *unpack], check=True, capture_output=True)
    return target


@pytest.fixture
def plugged(installed: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(installed))
    yield
    sys.modules.pop("warm_rewards", None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command and return its exit code and what it printed, on one line."""
    code = main(["reward", *arguments])
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


# Packages


def test_a_package_offers_rewards_by_name(plugged):
    assert {"warmth", "cold", "broken"} <= set(plugins())
    images = torch.rand(3, 3, 4, 4)
    warm, cold = load_reward("warmth"), load_reward("cold")
    assert (warm.name, cold.name, cold.native_range) == ("warmth", "cold", (-1.0, 1.0))
    assert torch.equal(warm(images, [""] * 3).total, -cold(images, [""] * 3).total)


def test_a_broken_package_is_named_and_the_others_are_not_disturbed(plugged, capsys):
    with pytest.raises(ConfigError, match=r"'broken' of the package 'warm-rewards' cannot be imported from 'warm_rew"):
        load_reward("broken")
    code, printed = run(capsys, "list")
    assert code == 0
    assert "brightness Mean of all pixels. steerfm" in printed
    assert "warmth Red less blue. warm-rewards 1.2" in printed
    assert "cold Blue less red. warm-rewards 1.2" in printed
    assert "broken BROKEN: The reward 'broken'" in printed


def test_a_package_is_checked_by_name(plugged, capsys):
    code, printed = run(capsys, "check", "cold")
    assert code == 0
    assert "'cold' on 8 pictures of (3, 8, 8): no fault" in printed


def test_a_package_is_a_reward_of_any_recipe_by_name(plugged):
    recipe = compose("steer", ["recipe=digits_steer", "map=map", "reward=cold"])
    built = as_reward(recipe.build("reward"))
    assert (built.name, built.native_range) == ("cold", (-1.0, 1.0))
    recipe = compose("steer", ["recipe=digits_steer", "map=map", "reward=warmth"])
    images = torch.rand(3, 3, 4, 4)
    assert torch.equal(as_reward(recipe.build("reward"))(images, [""] * 3).total, -built(images, [""] * 3).total)
    with pytest.raises(ConfigError, match=r"warm_rewards\.gone"):
        compose("steer", ["recipe=digits_steer", "map=map", "reward=broken"])
    with pytest.raises(ConfigError, match="reward has no option 'warmt'"):
        compose("steer", ["recipe=digits_steer", "map=map", "reward=warmt"])


def test_a_name_that_nobody_offers_is_one_sentence(plugged):
    with pytest.raises(ConfigError, match="No installed package offers a reward 'warmt'; did you mean 'warmth'"):
        load_reward("warmt")


def test_no_recipe_reaches_what_imports_by_name(workplace: Path):
    for name in ("plugged_in", "import_typed", "plugins"):
        lines = [f"reward._target_=steerfm.reward_plugins.{name}", "recipe=shapes_sample", "reward=custom"]
        with pytest.raises(TrustError, match="a recipe may not name it"):
            compose("sample", lines)


# The check


def test_a_reward_of_a_recipe_is_checked_by_its_name_with_its_values(workplace: Path, capsys):
    code, printed = run(capsys, "check", "jpeg_size", "reward.quality=50", "reward.name=small")
    assert code == 0
    assert "'small' on 8 pictures" in printed
    assert "'small' scores " in printed
    code, printed = run(capsys, "check", "jpeg_size", "reward.quality=500")
    assert (code, "JPEG quality lies in [1, 95], got 500" in printed) == (2, True)


def test_values_for_what_has_no_recipe_are_refused(workplace: Path, capsys):
    (workplace / "own_one.py").write_text("def f(images):\n    return images.mean((1, 2, 3)).detach()\n")
    code, printed = run(capsys, "check", "own_one:f", "reward.name=x")
    assert (code, "has no recipe, so it takes no values" in printed) == (2, True)
    code, printed = run(capsys, "check", "own_one:f")
    assert (code, "'f' on 8 pictures of (3, 8, 8): 1 fault" in printed) == (1, True)
    assert "scores" not in printed.replace("gave values", "")


def test_costs_are_measured_in_pictures_and_bytes():
    images = torch.rand(6, 3, 16, 16)
    size = images.nbytes

    def twice(images, prompts):
        return (images.exp() + 1).mean((1, 2, 3))  # exp, and its sum, alive together

    measured = measure(as_reward(twice), images, ["a"] * 6)
    assert 2 * size <= measured.memory < 2.1 * size
    assert measured.gradient_memory is not None
    assert 3 * size <= measured.gradient_memory <= 6 * size
    assert measured.gradient_rate is not None and measured.rate > 0
    black_box = measure(FunctionReward(lambda images: images.mean((1, 2, 3)).tolist(), "f", False), images, ["a"] * 6)
    assert (black_box.gradient_rate, black_box.gradient_memory, black_box.words) == (None, None, None)


def test_the_length_at_which_prompts_are_cut_is_found():
    images = torch.rand(2, 3, 4, 4)

    def first_words(count: int | None):
        return as_reward(lambda images, prompts: torch.tensor([float("red" in p.split()[:count]) for p in prompts]))

    assert words_read(first_words(20), images) == 32
    assert words_read(first_words(32), images) == 64
    assert words_read(first_words(None), images) is None
    assert words_read(as_reward(lambda images: images.mean((1, 2, 3))), images) is None


# Calibration


@pytest.fixture
def prompts(workplace: Path) -> str:
    """Write two prompts for the map of shapes and return how to ask for them."""
    (workplace / "two.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    return "prompts=two.txt"


def test_calibration_prints_the_line_that_normalises(prompts, capsys):
    code, printed = run(capsys, "calibrate", "brightness", prompts, "seeds=3")
    assert code == 0
    assert "'brightness' on 6 samples: mean " in printed
    recipe = compose("sample", ["recipe=shapes_sample", prompts, "seeds=3"])
    (values,) = totals(load_reward("steerfm.rewards.simple.Brightness"), recipe).values()
    mean, std = f"{float(values.mean()):.4g}", f"{float(values.double().std()):.4g}"
    assert f"Python: brightness.normalised({mean}, {std})" in printed
    assert f"mean: {mean}, std: {std}, reward: ..." in printed
    assert f"method=nft: method.center={mean} method.divisor={6 * float(values.double().std()):.4g}" in printed


def test_what_does_not_vary_cannot_be_calibrated(workplace: Path, prompts, capsys):
    (workplace / "flat_one.py").write_text("def flat(images):\n    return images.sum((1, 2, 3)) * 0 + 1\n")
    code, printed = run(capsys, "calibrate", "flat_one:flat", prompts, "seeds=3")
    assert (code, "all the same: it cannot be normalised" in printed) == (2, True)


def test_a_recipe_normalises_a_reward(workplace: Path):
    inner = "reward: {_target_: steerfm.rewards.simple.Brightness}"
    folder = workplace / "recipes" / "reward"
    folder.mkdir(parents=True)
    line = f"{{_target_: steerfm.reward_algebra.Normalised, mean: 0.5, std: 0.1, {inner}}}"
    (folder / "mine.yaml").write_text(line, encoding="utf-8")
    reward = compose("sample", ["recipe=shapes_sample", "reward=mine"]).build("reward")
    assert isinstance(reward, Normalised)
    assert reward.name == "brightness.normalised(0.5, 0.1)"
