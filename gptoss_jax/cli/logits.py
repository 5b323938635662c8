"""`gptoss-jax logits`: for comparisons with other programs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def logits(
    checkpoint: Annotated[str, tyro.conf.Positional],
    tokens: Path,
    out: Path,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> None:
    """Runs a model on token ids and writes its logits.

    A training checkpoint of a QAT run is evaluated through the quantization that it was trained with.

    Args:
        checkpoint: HF directory, OpenAI's original layout, training checkpoint, or hub id.
        tokens: integer array [B, T] as .npy; every row is one document from position 0.
        out: written as .npy, float32 [B, T, V].
        dtype: of weights and activations; float32 uses full float32 products on every device.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptoss_jax.checkpoint.models import load_model
    from gptoss_jax.errors import UsageError
    from gptoss_jax.model import compute_logits, forward

    try:
        tokens_BT = np.load(tokens, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{tokens}: not a readable .npy array ({error})") from None
    if tokens_BT.ndim != 2 or not np.issubdtype(tokens_BT.dtype, np.integer) or not tokens_BT.size:
        raise UsageError(f"{tokens}: token ids are integers [B, T], not {tokens_BT.dtype} {list(tokens_BT.shape)}")
    model = load_model(checkpoint, jnp.dtype(dtype))
    if tokens_BT.min() < 0 or tokens_BT.max() >= model.config.vocab_size:
        raise UsageError(f"{tokens}: ids from {tokens_BT.min()} to {tokens_BT.max()}; the vocabulary has {model.config.vocab_size}")

    @jax.jit
    def run(params, tokens_BT):
        quant = model.expert_quant(jnp.dtype(dtype))
        hidden_BTD = forward(model.config, params, tokens_BT, dtype=jnp.dtype(dtype), expert_quant=quant).hidden_BTD
        return compute_logits(params, hidden_BTD, jnp.dtype(dtype))

    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        rows = [np.asarray(run(model.params, row_T[None].astype(np.int32))) for row_T in tokens_BT]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "wb") as file:
        np.save(file, np.concatenate(rows))
    print(f"{out}: float32 [{', '.join(map(str, (*tokens_BT.shape, model.config.vocab_size)))}]")
