"""State space models in JAX."""
