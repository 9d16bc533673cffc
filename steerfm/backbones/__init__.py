"""Pretrained models, and what of a map is trained: low-rank additions to its layers, or some of its layers alone."""

from steerfm.backbones.base_teacher import LoRABase
from steerfm.backbones.chosen_layers import ChosenLayers
from steerfm.backbones.diffusers import encoders, scheduler_times, unquantised
from steerfm.backbones.export import export_diffusers
from steerfm.backbones.lora import LoRA, merged, with_scale, without_lora
from steerfm.backbones.lora_files import load_adapter, save_adapter
from steerfm.backbones.two_times import adapted, two_times

__all__ = [
    "ChosenLayers",
    "LoRA",
    "LoRABase",
    "adapted",
    "encoders",
    "export_diffusers",
    "load_adapter",
    "merged",
    "save_adapter",
    "scheduler_times",
    "two_times",
    "unquantised",
    "with_scale",
    "without_lora",
]
