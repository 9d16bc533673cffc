"""Lightning modules: training a flow map, a CLIP or a reward, fine-tuning toward a reward, sampling."""

from steerfm.modules.clip_training import ClipTraining
from steerfm.modules.flow_map_training import FlowMapTraining
from steerfm.modules.preference_training import PreferenceTraining
from steerfm.modules.reward_fine_tuning import RewardFineTuning
from steerfm.modules.steered_sampling import SteeredSampling

__all__ = ["ClipTraining", "FlowMapTraining", "PreferenceTraining", "RewardFineTuning", "SteeredSampling"]
