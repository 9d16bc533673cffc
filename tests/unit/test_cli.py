"""The command line: what it prints, what it returns, and what it says when something is wrong."""

import os
import sys
from pathlib import Path

import pytest

from steerfm.cli import main, parse


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Run a command in process; return its exit code, what it printed, and what it said on stderr."""
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def is_one_sentence(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1 and "Traceback" not in text


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("steerfm 0.")


def test_an_unknown_command_names_the_right_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "train" in capsys.readouterr().err


def test_values_may_stand_on_both_sides_of_options():
    arguments = parse(["train", "recipe=a", "--trust", "mine", "x=1", "--recipes", "r", "y=2"])
    assert arguments.overrides == ["recipe=a", "x=1", "y=2"]
    assert (arguments.trust, arguments.recipes) == (["mine"], ["r"])


@pytest.mark.parametrize("argv", [["train", "recipe=a", "--fob"], ["demo", "--x=1"], ["train", "a=1", "--fob", "b=2"]])
def test_unknown_arguments_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    assert "unknown arguments" in capsys.readouterr().err


def test_values_of_no_recipe_are_refused(capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "env", "x=1")
    assert code == 2 and "'x=1' is a value of a recipe: steerfm env --plan" in err


def test_recipes_are_listed_with_what_to_type(workplace: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "recipes", "list")
    assert code == 0
    assert "steerfm train recipe=digits " in out


def test_a_recipe_is_shown_as_composed(workplace: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "recipes", "show", "digits", "network.width=3")
    assert code == 0
    assert out.startswith("# steerfm train recipe=digits")
    assert "width: 3" in out


def test_a_copied_recipe_can_be_changed_and_is_never_overwritten(workplace: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "recipes", "copy", "digits", "mine")
    assert code == 0
    assert "steerfm train recipe=mine" in out
    path = workplace / "recipes" / "recipe" / "mine.yaml"
    assert path.read_text().splitlines()[1].startswith("# steerfm train recipe=mine ")
    path.write_text(path.read_text() + "\nlabel: changed\n")
    _, out, _ = run(capsys, "recipes", "show", "mine")
    assert "label: changed" in out
    code, _, err = run(capsys, "recipes", "copy", "digits", "mine")
    assert code == 2
    assert "never overwritten" in err
    assert "label: changed" in path.read_text()


@pytest.mark.parametrize("name", ["../mine", "/mine", "a b", ".mine"])
def test_a_copy_stays_inside_its_folder(name: str, workplace: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = run(capsys, "recipes", "copy", "digits", name)
    assert code == 2
    assert "no name for a recipe" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train"], "Say which recipe"),
        (["train", "recipe=digtis"], "did you mean 'digits'?"),
        (["steer", "recipe=digits"], "steerfm train recipe=digits"),
        (["train", "recipe=digits", "netwrk.width=3"], "did you mean 'network'?"),
        (["train", "recipe=digits", "network.widht=3"], "did you mean 'width'?"),
        (["recipes", "show", "digtis"], "did you mean 'digits'?"),
        (["demo", "digit"], "did you mean 'digits'?"),
    ],
)
def test_an_error_is_one_sentence(argv: list[str], said: str, workplace: Path, capsys: pytest.CaptureFixture[str]):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert is_one_sentence(err), err
    assert said in err


def test_a_missing_optional_package_names_the_extra(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (workplace / "needy.py").write_text("import datasets\n\n\ndef shade(images, prompts):\n    return datasets\n")
    code, _, err = run(capsys, "sample", "recipe=digits_sample", "map=here", "reward=needy:shade")
    assert code == 2
    assert is_one_sentence(err), err
    assert "pip install 'steerfm[data]'" in err


def test_the_environment_is_printed(capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "env")
    assert code == 0
    for word in ("python", "torch", "lightning", "cores", "memory", "W&B"):
        assert word in out


def test_nothing_is_written_by_commands_that_only_look(workplace: Path, capsys: pytest.CaptureFixture[str]):
    for argv in (["recipes", "list"], ["recipes", "show", "digits"], ["env"], ["train", "recipe=digits", "x=1"]):
        run(capsys, *argv)
    assert os.listdir(workplace) == []
