"""Which implementation of an operation runs: plain XLA, which works everywhere, or Triton kernels on NVIDIA GPUs."""

import jax

BACKENDS = ("xla", "triton")


def resolve_backend(backend: str | None) -> str:
    """The backend asked for; None means Triton kernels where JAX runs on a GPU and XLA elsewhere.

    Raises:
      ValueError: unknown name.
    """
    if backend is None:
        return "triton" if jax.default_backend() == "gpu" else "xla"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known are {', '.join(BACKENDS)}")
    return backend
