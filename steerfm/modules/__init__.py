"""Lightning modules: training a flow map, fine-tuning it toward a reward, sampling from it, training a CLIP."""

from steerfm.modules.clip_training import ClipTraining
from steerfm.modules.flow_map_training import FlowMapTraining
from steerfm.modules.reward_fine_tuning import RewardFineTuning
from steerfm.modules.steered_sampling import SteeredSampling

__all__ = ["ClipTraining", "FlowMapTraining", "RewardFineTuning", "SteeredSampling"]
