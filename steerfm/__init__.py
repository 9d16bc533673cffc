"""Reward fine-tuning and steering of flow maps.

Names are loaded when they are first used, so that importing steerfm imports neither torch nor Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerfm.analytic import GaussianMixture, QuadraticReward, analytic_flow_map
    from steerfm.backbones import ChosenLayers, LoRA
    from steerfm.building import remembered
    from steerfm.callbacks import EMA, DurableCheckpoints, GuardRails, LossByInterval, RandomState, SampleGrid
    from steerfm.conditions import CaptionWords, FrozenText, Labels, Pictures
    from steerfm.data import Digits, HuggingFaceData, ImageFolder, Latents, Points, Prompts, PromptSeeds, Shapes
    from steerfm.finetuning import (
        AdaptedNoise,
        AdjointMatching,
        DirectBackprop,
        DirectPreference,
        LeapAlign,
        NegativeAware,
        NoiseAdapter,
        PolicyGradient,
        RewardAdaptive,
        RewardDistillation,
        RewardFeedback,
        TiltMatching,
        ValueMatching,
        WeightedRegression,
    )
    from steerfm.flow_map import FlowMap
    from steerfm.modules import ClipTraining, FlowMapTraining, PreferenceTraining, RewardFineTuning, SteeredSampling
    from steerfm.networks import MLP, DiT, UNet, WordEncoder
    from steerfm.objectives import Adaptive, Compositional, Eulerian, FlowMatching, Lagrangian
    from steerfm.paths import Linear, Trigonometric, VariancePreserving
    from steerfm.report import compare
    from steerfm.reward import Reward, Scores, as_reward
    from steerfm.sampling import Unsteered
    from steerfm.steering import (
        BeamSearch,
        BestOfN,
        Budget,
        FlowMapControl,
        FlowMapTilting,
        LookAheadGuidance,
        NoiseOptimisation,
        NoiseSampling,
        PathSearch,
        PosteriorDrawGuidance,
        SequentialMonteCarlo,
        SuccessiveHalving,
        Watch,
        ZeroOrderSearch,
    )
    from steerfm.times import Anchored, LogitNormal, Triangle
    from steerfm.types import Condition, Cost, Samples

__version__ = "0.1.0"

_HOMES = {
    "steerfm.analytic": ("GaussianMixture", "QuadraticReward", "analytic_flow_map"),
    "steerfm.backbones": ("ChosenLayers", "LoRA"),
    "steerfm.building": ("remembered",),
    "steerfm.callbacks": ("EMA", "DurableCheckpoints", "GuardRails", "LossByInterval", "RandomState", "SampleGrid"),
    "steerfm.conditions": ("CaptionWords", "FrozenText", "Labels", "Pictures"),
    "steerfm.data": (
        "Digits",
        "HuggingFaceData",
        "ImageFolder",
        "Latents",
        "Points",
        "PromptSeeds",
        "Prompts",
        "Shapes",
    ),
    "steerfm.finetuning": (
        "AdaptedNoise",
        "AdjointMatching",
        "DirectBackprop",
        "DirectPreference",
        "LeapAlign",
        "NegativeAware",
        "NoiseAdapter",
        "PolicyGradient",
        "RewardAdaptive",
        "RewardDistillation",
        "RewardFeedback",
        "TiltMatching",
        "ValueMatching",
        "WeightedRegression",
    ),
    "steerfm.flow_map": ("FlowMap",),
    "steerfm.modules": ("ClipTraining", "FlowMapTraining", "PreferenceTraining", "RewardFineTuning", "SteeredSampling"),
    "steerfm.networks": ("MLP", "DiT", "UNet", "WordEncoder"),
    "steerfm.objectives": ("Adaptive", "Compositional", "Eulerian", "FlowMatching", "Lagrangian"),
    "steerfm.paths": ("Linear", "Trigonometric", "VariancePreserving"),
    "steerfm.report": ("compare",),
    "steerfm.reward": ("Reward", "Scores", "as_reward"),
    "steerfm.sampling": ("Unsteered",),
    "steerfm.steering": (
        "BeamSearch",
        "BestOfN",
        "Budget",
        "FlowMapControl",
        "FlowMapTilting",
        "LookAheadGuidance",
        "NoiseOptimisation",
        "NoiseSampling",
        "PathSearch",
        "PosteriorDrawGuidance",
        "SequentialMonteCarlo",
        "SuccessiveHalving",
        "Watch",
        "ZeroOrderSearch",
    ),
    "steerfm.times": ("Anchored", "LogitNormal", "Triangle"),
    "steerfm.types": ("Condition", "Cost", "Samples"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "EMA",
    "MLP",
    "AdaptedNoise",
    "Adaptive",
    "AdjointMatching",
    "Anchored",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "CaptionWords",
    "ChosenLayers",
    "ClipTraining",
    "Compositional",
    "Condition",
    "Cost",
    "DiT",
    "Digits",
    "DirectBackprop",
    "DirectPreference",
    "DurableCheckpoints",
    "Eulerian",
    "FlowMap",
    "FlowMapControl",
    "FlowMapTilting",
    "FlowMapTraining",
    "FlowMatching",
    "FrozenText",
    "GaussianMixture",
    "GuardRails",
    "HuggingFaceData",
    "ImageFolder",
    "Labels",
    "Lagrangian",
    "Latents",
    "LeapAlign",
    "Linear",
    "LoRA",
    "LogitNormal",
    "LookAheadGuidance",
    "LossByInterval",
    "NegativeAware",
    "NoiseAdapter",
    "NoiseOptimisation",
    "NoiseSampling",
    "PathSearch",
    "Pictures",
    "Points",
    "PolicyGradient",
    "PosteriorDrawGuidance",
    "PreferenceTraining",
    "PromptSeeds",
    "Prompts",
    "QuadraticReward",
    "RandomState",
    "Reward",
    "RewardAdaptive",
    "RewardDistillation",
    "RewardFeedback",
    "RewardFineTuning",
    "SampleGrid",
    "Samples",
    "Scores",
    "SequentialMonteCarlo",
    "Shapes",
    "SteeredSampling",
    "SuccessiveHalving",
    "TiltMatching",
    "Triangle",
    "Trigonometric",
    "UNet",
    "Unsteered",
    "ValueMatching",
    "VariancePreserving",
    "Watch",
    "WeightedRegression",
    "WordEncoder",
    "ZeroOrderSearch",
    "analytic_flow_map",
    "as_reward",
    "compare",
    "remembered",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'steerfm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
