"""Trains one sharded model: models, layout, engines, data, budget, checkpoints.

Knows nothing of jobs, Ray, HTTP or MLflow; a plain ``torchrun`` can drive it. Importing this package, or any module
that only describes things (options, layouts, presets, accounting), does not import torch.
"""

from parallelism import fusing

fusing.install()
