"""Pretrained maps against diffusers' own pipelines, at the same noise: pictures within 1e-3 in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steerfm import MLP
from steerfm import seeds as seeding
from steerfm.backbones.diffusers import scheduler_times
from steerfm.backbones.families import packed
from steerfm.flow_map import FlowMap
from steerfm.sampling import Unsteered, few_jumps, renoised
from steerfm.solvers import ancestral, ddim, dpm_solver

diffusers: Any = pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")

PROMPTS = ["a red circle", "the blue square"]
SEEDS = [3, 11]
CLOSE = 1e-3  # the largest difference of a pixel


def theirs(pipeline: Any, flow_map: FlowMap, steps: int | None, start: float = 1.0, **options: Any) -> Tensor:
    """Return the pictures that a pipeline makes of the initial noise of SEEDS, and of `noises` at its steps."""
    x1 = noise_of(flow_map) * start
    family = type(pipeline).__name__
    if options.get("negative_prompt"):
        options["negative_prompt"] = [options["negative_prompt"]] * len(PROMPTS)
    if family == "FluxPipeline":
        x1 = packed(x1)
    if "Sana" in family or "PixArt" in family:
        options["use_resolution_binning"] = False
    height, width = (2 * side for side in flow_map.data_shape[1:])
    return pipeline(
        PROMPTS, latents=x1, num_inference_steps=steps, height=height, width=width, output_type="pt",
        generator=torch.Generator().manual_seed(5), **options,
    ).images  # fmt: skip


def noise_of(flow_map: FlowMap) -> Tensor:
    return seeding.noise(SEEDS, flow_map.data_shape)


def noises(flow_map: FlowMap, count: int) -> Callable[[int], Tensor]:
    """Return what the generator of `theirs` draws at each step."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(len(SEEDS), *flow_map.data_shape, generator=generator) for _ in range(count)]
    return lambda step: drawn[step]


@torch.no_grad()
def ours(flow_map: FlowMap, sampler: Callable[..., Tensor], times: Sequence[float], **options: Any) -> Tensor:
    condition = flow_map.encode_prompts(PROMPTS)
    return flow_map.decode(sampler(flow_map, noise_of(flow_map), times, condition, **options))


def gap(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    assert one.std() > 0.05  # a picture, and not a grey one
    return float((one - other).abs().max())


# --- rectified flows: jumps are Euler steps of the scheduler ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd3", {"guidance_scale": 1.0}),
        ("sd3", {"guidance_scale": 5.0, "negative_prompt": "blurred"}),
        ("sd3.5", {"guidance_scale": 3.5}),
        ("flux-dev", {"guidance_scale": 3.5}),
        ("flux-dev", {"guidance_scale": 1.0}),
        ("flux-schnell", {}),
        ("sana", {"guidance_scale": 4.5, "negative_prompt": "blurred"}),
    ],
    ids=str,
)
def test_flows_agree(loader: Any, name: str, options: dict[str, Any]):
    flow_map = loader.map(name, **({"size": (16, 32)} if name.startswith("flux") else {}), **options)
    expected = theirs(loader.pipeline(name), flow_map, 4, **options)
    samples = Unsteered("jumps", scheduler_times(flow_map, 4))(flow_map, prompts=PROMPTS, seeds=SEEDS)
    assert gap(samples.images, expected) < CLOSE
    guided = name in ("sd3", "sd3.5", "sana") and options["guidance_scale"] != 1
    assert samples.cost.network_calls == (8 if guided else 4)


def test_the_pipelines_own_guidance_is_the_default(loader: Any):
    assert [loader.map(name).guidance_scale for name in ("sd3", "flux-dev", "flux-schnell", "sana", "lcm")] == [
        7.0, 3.5, 1.0, 4.5, 8.5,
    ]  # fmt: skip
    assert [loader.map(name).guidance_scale for name in ("sd-turbo", "sdxl-turbo", "sana-sprint")] == [1.0, 1.0, 4.5]


@pytest.mark.parametrize("scheduler", ["flow_match", "dpm_solver"])
def test_sana_agrees_under_both_of_its_schedulers(loader: Any, tmp_path: Path, scheduler: str):
    """Its first releases name DPM-Solver, whose times stop short of 1 and whose steps are whole."""
    chosen = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", beta_schedule="linear"
    )
    pipeline = tiny.sana(chosen if scheduler == "dpm_solver" else None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    flow_map = FlowMap.from_pretrained(tmp_path)
    sampler = dpm_solver if scheduler == "dpm_solver" else few_jumps
    assert gap(ours(flow_map, sampler, scheduler_times(flow_map, 4)), theirs(pipeline, flow_map, 4)) < CLOSE


# --- consistency models and one-step distilled models: jumps to data, and noise anew --------------------------


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("lcm", 1, {}),
        ("lcm", 4, {}),
        ("lcm", 4, {"guidance_scale": 1.0}),
        ("sana-sprint", 1, {"intermediate_timesteps": None}),
        ("sana-sprint", 2, {}),
        ("sana-sprint", 4, {"intermediate_timesteps": None, "guidance_scale": 2.0}),
        ("sd-turbo", 1, {"guidance_scale": 0.0}),
        ("sdxl-turbo", 1, {"guidance_scale": 0.0}),
    ],
    ids=str,
)
def test_partial_maps_agree(loader: Any, name: str, steps: int, options: dict[str, Any]):
    flow_map = loader.map(name, guidance_scale=options.get("guidance_scale") or None)
    assert flow_map.partial
    expected = theirs(loader.pipeline(name), flow_map, steps, **options)
    found = ours(flow_map, renoised, scheduler_times(flow_map, steps), draw=noises(flow_map, steps))
    assert gap(found, expected) < CLOSE


@pytest.mark.parametrize("name", ["sd-turbo", "sdxl-turbo"])
def test_distilled_maps_agree_when_noise_is_added_anew(loader: Any, name: str):
    """LCM's scheduler does so; its weighting of the answer is 1 to seven digits at these steps."""
    flow_map = loader.map(name)
    pipeline = loader.pipeline(name)
    times = scheduler_times(flow_map, 4)
    whole = [round(float(k)) for k in flow_map.network.conversion.step(torch.tensor(times[:-1]))]  # type: ignore[union-attr,operator]
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    pipeline.scheduler.set_timesteps(timesteps=whole)
    assert pipeline.scheduler.timesteps.tolist() == whole == [999, 749, 499, 249]
    start = float((1 - pipeline.scheduler.alphas_cumprod[-1]).sqrt())  # of the noise that Euler's scheduler starts from
    expected = theirs(pipeline, flow_map, None, start, timesteps=whole, guidance_scale=0.0)
    assert gap(ours(flow_map, renoised, times, draw=noises(flow_map, 4)), expected) < CLOSE


@pytest.mark.parametrize(
    ("name", "sampler", "options"),
    [
        ("sd-turbo", ddim, {"guidance_scale": 1.0}),
        ("sdxl-turbo", ancestral, {"guidance_scale": 1.0}),
        ("sdxl-turbo", ancestral, {"guidance_scale": 3.0}),
        ("sdxl-turbo", ancestral, {"guidance_scale": 3.0, "negative_prompt": "blurred"}),
        ("sd-epsilon", ddim, {"guidance_scale": 7.5}),
        ("sd-epsilon", ddim, {"guidance_scale": 2.0, "negative_prompt": "blurred"}),
        ("sd-v", ddim, {"guidance_scale": 2.0}),
        ("sd-sample", ddim, {"guidance_scale": 1.0}),
        ("pixart", ddim, {"guidance_scale": 4.5}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_diffusion_agrees_through_its_path(loader: Any, name: str, sampler: Any, options: dict[str, Any]):
    flow_map = loader.map(name, kind="velocity", **options)
    expected = theirs(loader.pipeline(name), flow_map, 4, **options)
    more = {"draw": noises(flow_map, 4)} if sampler is ancestral else {}
    assert gap(ours(flow_map, sampler, scheduler_times(flow_map, 4), **more), expected) < CLOSE


def test_a_map_that_steerfm_saved_loads_as_well(tmp_path: Path):
    network = MLP((2,), width=8, depth=1)
    FlowMap(network).save(tmp_path / "mine")
    back = FlowMap.from_pretrained(tmp_path / "mine")
    x = torch.randn(3, 2)
    with torch.no_grad():
        assert torch.equal(back.jump(x, 0.9, 0.2), FlowMap(network).jump(x, 0.9, 0.2))
    assert not back.partial
