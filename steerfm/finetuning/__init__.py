"""How a flow map is moved toward a reward: one method, one file."""

from steerfm.finetuning.adjoint_matching import AdjointMatching
from steerfm.finetuning.common import Batch, FineTuning, Tuned
from steerfm.finetuning.direct import DirectBackprop
from steerfm.finetuning.leap_align import LeapAlign
from steerfm.finetuning.negative_aware import NegativeAware
from steerfm.finetuning.new_classes import NewClasses
from steerfm.finetuning.noise_adapter import AdaptedNoise, NoiseAdapter
from steerfm.finetuning.policy_gradient import PolicyGradient
from steerfm.finetuning.preferences import DirectPreference
from steerfm.finetuning.reward_adaptive import RewardAdaptive
from steerfm.finetuning.reward_distillation import RewardDistillation
from steerfm.finetuning.reward_feedback import RewardFeedback
from steerfm.finetuning.tilt_matching import TiltMatching
from steerfm.finetuning.value_matching import ValueMatching
from steerfm.finetuning.weighted_regression import WeightedRegression

__all__ = [
    "AdaptedNoise",
    "AdjointMatching",
    "Batch",
    "DirectBackprop",
    "DirectPreference",
    "FineTuning",
    "LeapAlign",
    "NegativeAware",
    "NewClasses",
    "NoiseAdapter",
    "PolicyGradient",
    "RewardAdaptive",
    "RewardDistillation",
    "RewardFeedback",
    "TiltMatching",
    "Tuned",
    "ValueMatching",
    "WeightedRegression",
]
