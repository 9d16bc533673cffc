"""Hydra configs only: whole recipes in recipe/, their parts in the folders beside it."""
