"""Shrinks a checkpoint: pruning, quantisation, evaluation, export, verification, frontier.

Pure functions on tensors plus thin drivers. Knows nothing of jobs, Ray, HTTP or MLflow. Modules that only describe
things (config, recipes, registry, frontier) do not import torch.
"""
