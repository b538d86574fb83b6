"""Float64 for a test, under every jax that is supported."""

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

__all__ = ["enable_x64"]
