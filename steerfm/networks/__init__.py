"""Networks: each predicts u(x, s, t, condition) and says the shape of one sample in `data_shape`."""

from steerfm.networks.critic import Critic
from steerfm.networks.dit import DiT
from steerfm.networks.mlp import MLP, PlainMLP
from steerfm.networks.text import SlotEncoder, TextEmbeddings, WordEncoder
from steerfm.networks.unet import UNet
from steerfm.networks.wrappers import ApartDiagonal, VelocityNetwork

__all__ = [
    "MLP",
    "ApartDiagonal",
    "Critic",
    "DiT",
    "PlainMLP",
    "SlotEncoder",
    "TextEmbeddings",
    "UNet",
    "VelocityNetwork",
    "WordEncoder",
]
