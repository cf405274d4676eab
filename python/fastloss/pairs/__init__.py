"""The pairs engine: statistics of S = q kᵀ that is never stored."""
