"""A linear output layer whose training step costs the same for any number of classes, for losses of the spherical family."""

from .factors import Drift
from .layer import SphericalLinear
from .statistics import SphericalStats

__all__ = ["Drift", "SphericalLinear", "SphericalStats"]
