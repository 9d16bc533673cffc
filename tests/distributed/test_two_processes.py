"""Two gloo processes against one: gradients of every objective and method, gathering, resampling, populations.

One pair of processes serves the whole file (pair.py says what they compute).
"""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import pair
from safetensors.torch import load_file
from torch import Tensor

from steerfm import finetuning, objectives, steering

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    """Return what one process computes."""
    return pair.compute()


def together(count: int, folder: Path) -> list[dict[str, Tensor]]:
    """Return what each of so many processes computes."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "pair.py"), str(rank), str(count), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=540)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return together(2, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize(
    "kind",
    [
        *(f"{n}/{m}" for n, m in pair.METHOD_CASES),
        *(f"{n}/{o}" for n in pair.NETWORKS for o in pair.OBJECTIVES),
    ],
)
def test_gradients_equal_those_of_one_process(kind: str, one: dict[str, Tensor], two: list[dict[str, Tensor]]) -> None:
    names = [name for name in one if name.startswith(f"gradient/{kind}/")]
    assert len(names) > 10
    assert max(float(one[name].abs().max()) for name in names) > 1e-3
    for found in two:
        for name in names:
            assert torch.allclose(found[name], one[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", [f"{n}/{m}" for n, m in (*pair.SHARDED_METHODS, *pair.SHARDED_CASES)])
def test_gradients_of_shared_out_maps(kind: str, one: dict[str, Tensor], two: list[dict[str, Tensor]]) -> None:
    """Forward mode goes through shared-out weights too: every objective and every method."""
    names = [name for name in one if name.startswith(f"gradient/{kind}/network.")]
    assert len(names) > 10
    for found in two:
        for name in names:
            own = found[f"sharded/{name.removeprefix('gradient/')}"]
            assert torch.allclose(own, one[name], rtol=1e-9, atol=1e-12), name


def test_what_is_gathered_is_everything_on_both(one: dict[str, Tensor], two: list[dict[str, Tensor]]) -> None:
    names = [name for name in one if name.startswith(("gather/", "mean_and_std"))]
    for name in names:
        expected = one[name][: pair.SPLIT] if name == "gather/one_is_empty" else one[name]
        for found in two:
            assert found[name].dtype == expected.dtype
            assert torch.allclose(found[name], expected, rtol=0, atol=1e-15), name


def test_own_rows_join_to_those_of_one_process(one: dict[str, Tensor], two: list[dict[str, Tensor]]) -> None:
    names = [name for name in one if name.startswith("own/")]
    assert len(names) == 12 + len(pair.STEERING)
    for name in names:
        assert torch.allclose(torch.cat([found[name] for found in two]), one[name], rtol=1e-12, atol=1e-12), name
        divided = [2, 3] if "steering" in name else [3, 5]
        assert [len(found[name]) for found in two] == divided


def test_split_particles_are_those_of_one_process(one: dict[str, Tensor], two: list[dict[str, Tensor]]) -> None:
    """Both processes return the whole populations, and charge all of their particles."""
    names = [name for name in one if name.startswith("split/")]
    assert len(names) == 13 + 3
    assert one["split/systematic/particles"].shape[:2] == (2, 5)
    for name in names:
        for found in two:
            assert torch.allclose(found[name], one[name], rtol=1e-10, atol=1e-12), name
    for scheme in ("systematic", "stratified"):
        assert (one[f"split/{scheme}/sizes"] < 0.9 * 5).any()  # they were resampled


@pytest.mark.slow
def test_four_processes_compute_the_core_alike(one: dict[str, Tensor], tmp_path: Path) -> None:
    four = together(4, tmp_path)
    assert len({name.split("/")[2] for name in four[0] if name.startswith("gradient/")}) == 10
    assert len(four[0]) > 200
    for name in four[0]:
        found = [each[name] for each in four]
        if name.startswith("own/"):
            found = [torch.cat(found)]
        assert all(torch.allclose(each, one[name], rtol=1e-9, atol=1e-12) for each in found), name


def test_nothing_public_is_left_out() -> None:
    """Every objective, method of fine-tuning and method of steering that is public is among what pair.py computes."""

    def missing(module: Any, known: Iterable[Any], wanted: Callable[[Any], bool]) -> set[str]:
        kinds = {name: getattr(module, name) for name in module.__all__}
        found = {name for name, kind in kinds.items() if isinstance(kind, type) and wanted(kind)}
        assert len(found) > 10
        return found - {type(each).__name__ for each in known}

    def objective(kind: Any) -> bool:
        return "x1" in inspect.signature(kind.__call__).parameters if "__call__" in vars(kind) else False

    def derived(base: type) -> Callable[[Any], bool]:
        return lambda kind: issubclass(kind, base) and kind is not base

    assert missing(objectives, pair.OBJECTIVES.values(), objective) == set()
    assert missing(finetuning, pair.METHODS.values(), derived(finetuning.FineTuning)) == set()
    assert missing(steering, pair.STEERING.values(), derived(steering.Steering)) == set()


def test_one_process_means_what_it_says(one: dict[str, Tensor]) -> None:
    values = pair.normal(30, pair.ROWS)
    assert torch.allclose(one["mean_and_std"], torch.stack([values.mean(), values.std(unbiased=False)]))
    groups = values.reshape(2, 4)
    assert torch.allclose(one["own/group_mean/4"], groups.mean(1).repeat_interleave(4))
    assert torch.allclose(one["own/group_std/4"], groups.std(1, unbiased=False).repeat_interleave(4))
    assert math.isclose(float(one["gather/values"].sum()), float(values.sum()))
