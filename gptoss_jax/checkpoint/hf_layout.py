"""One table between our parameters and the tensors of checkpoint files, read in both directions: load, export, verify.

Three layouts hold the same model (E experts, D hidden, F expert hidden, gate and up rows interleaved):

    naming   experts   what differs
    hf       mxfp4     `..._blocks` U8 [E, out, in/32, 16] and `..._scales` U8 [E, out, in/32]
    hf       bf16      expert matrices transposed: [E, in, out]
    openai   mxfp4     other names, q|k|v fused along rows, `.blocks`/`.scales`; the MXFP4 bytes are those of hf
    openai   bf16      the same with expert matrices as [E, out, in]
    hf       nvfp4     ours alone: `..._packed` U8 [E, out, in/2], `..._scales` F8_E4M3 [E, out, in/16], `..._global_scale` F32 [E]

NVFP4 in the dialects of other programs is shown and taken under these names (`nvfp4_layouts`).

Our parameters are [out, in] and [E, out, in] throughout, so MXFP4 bytes are only renamed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gptoss_jax.model import GptOssConfig, abstract_params

MXFP4_BLOCK = 32
NVFP4_BLOCK = 16


@dataclass(frozen=True)
class Layout:
    naming: Literal["hf", "openai"]
    experts: Literal["mxfp4", "nvfp4", "bf16"]
    dialect: Literal["own", "modelopt", "compressed-tensors"] = "own"  # of NVFP4

    @property
    def transposed(self) -> bool:
        """Whether expert matrices are stored as [E, in, out]."""
        return self.naming == "hf" and self.experts == "bf16"

    def __str__(self) -> str:
        dialect = f" ({self.dialect})" if self.dialect != "own" else ""
        return f"{'Hugging Face' if self.naming == 'hf' else 'OpenAI original'}, experts in {self.experts.upper()}{dialect}"


@dataclass(frozen=True)
class Row:
    """One parameter of a layer (or of the whole model). `{}` in the keys stands for the layer index."""

    path: str  # ours, below `blocks.{j}.` and `tail.{j}.`
    hf: str
    openai: str
    fused: Literal["q", "k", "v"] | None = None  # its rows of OpenAI's fused tensor
    matrix: bool = False  # an expert matrix: encoded, or transposed

    def key(self, naming: str, layer: int | None) -> str:
        return (self.hf if naming == "hf" else self.openai).format(layer)


def _layer_row(path: str, openai: str, **kind) -> Row:
    return Row(path, f"model.layers.{{}}.{path}", f"block.{{}}.{openai}", **kind)


ROWS: tuple[Row, ...] = (
    Row("embed_tokens.weight", "model.embed_tokens.weight", "embedding.weight"),
    _layer_row("input_layernorm.weight", "attn.norm.scale"),
    _layer_row("self_attn.q_proj.weight", "attn.qkv.weight", fused="q"),
    _layer_row("self_attn.k_proj.weight", "attn.qkv.weight", fused="k"),
    _layer_row("self_attn.v_proj.weight", "attn.qkv.weight", fused="v"),
    _layer_row("self_attn.q_proj.bias", "attn.qkv.bias", fused="q"),
    _layer_row("self_attn.k_proj.bias", "attn.qkv.bias", fused="k"),
    _layer_row("self_attn.v_proj.bias", "attn.qkv.bias", fused="v"),
    _layer_row("self_attn.o_proj.weight", "attn.out.weight"),
    _layer_row("self_attn.o_proj.bias", "attn.out.bias"),
    _layer_row("self_attn.sinks", "attn.sinks"),
    _layer_row("post_attention_layernorm.weight", "mlp.norm.scale"),
    _layer_row("mlp.router.weight", "mlp.gate.weight"),
    _layer_row("mlp.router.bias", "mlp.gate.bias"),
    _layer_row("mlp.experts.gate_up_proj", "mlp.mlp1_weight", matrix=True),
    _layer_row("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    _layer_row("mlp.experts.down_proj", "mlp.mlp2_weight", matrix=True),
    _layer_row("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
    Row("norm.weight", "model.norm.weight", "norm.scale"),
    Row("lm_head.weight", "lm_head.weight", "unembedding.weight"),
)
_BY_PATH = {row.path: row for row in ROWS}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a layout demands; the first of `dtypes` is the one that export writes."""

    key: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One layer of one of our parameters: where it is among ours, and where among the files' tensors.

    `slot` is the index along the stacked dim of parameter `name`, None if it has none. `shape` is [out, in] or [E, out, in] as in our model.
    """

    name: str
    slot: int | None
    layer: int | None
    row: Row
    shape: tuple[int, ...]

    @property
    def hf_key(self) -> str:
        """HF name of the tensor (without suffix where it is stored encoded); the name used in reports and code hashes."""
        return self.row.key("hf", self.layer)

    def tensors(self, layout: Layout, config: GptOssConfig) -> dict[str, TensorSpec]:
        """The stored tensors by role: "plain", or those of the encoding ("packed", "scales", "global_scale")."""
        key, shape = self.row.key(layout.naming, self.layer), self.shape
        if not self.row.matrix or layout.experts == "bf16":
            if layout.naming == "openai" and self.row.fused:
                shape = (fused_rows(config)[1], *shape[1:])
            if self.row.matrix and layout.transposed:
                shape = (shape[0], shape[2], shape[1])
            return {"plain": TensorSpec(key, ("BF16", "F32"), shape)}
        experts, rows, width = shape
        if layout.experts == "nvfp4":
            return {
                "packed": TensorSpec(key + "_packed", ("U8",), (experts, rows, width // 2)),
                "scales": TensorSpec(key + "_scales", ("F8_E4M3",), (experts, rows, width // NVFP4_BLOCK)),
                "global_scale": TensorSpec(key + "_global_scale", ("F32",), (experts,)),
            }
        dot = "_" if layout.naming == "hf" else "."
        blocks = width // MXFP4_BLOCK
        return {
            "packed": TensorSpec(f"{key}{dot}blocks", ("U8",), (experts, rows, blocks, MXFP4_BLOCK // 2)),
            "scales": TensorSpec(f"{key}{dot}scales", ("U8",), (experts, rows, blocks)),
        }

    def stored_rows(self, layout: Layout, config: GptOssConfig) -> int:
        """Row of the stored tensor at which this parameter begins (not 0 only for k and v of OpenAI's fused tensor)."""
        return fused_rows(config)[0][self.row.fused] if layout.naming == "openai" and self.row.fused else 0


def fused_rows(config: GptOssConfig) -> tuple[dict[str, int], int]:
    """First row of q, k and v in OpenAI's fused tensor, and its number of rows."""
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {"q": 0, "k": q, "v": q + kv}, q + 2 * kv


def pieces_of(config: GptOssConfig, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """All layers of one parameter, `shape` being that of the whole (stacked) parameter.

    Raises:
      KeyError: not a parameter of this architecture.
    """
    part, _, rest = name.partition(".")
    if part not in ("blocks", "tail"):
        return [Piece(name, None, None, _BY_PATH[name], shape)]
    position, _, path = rest.partition(".")
    row = _BY_PATH[path]
    if part == "tail":
        return [Piece(name, None, config.repeats * config.period + int(position), row, shape)]
    return [Piece(name, i, i * config.period + int(position), row, shape[1:]) for i in range(shape[0])]


def all_pieces(config: GptOssConfig) -> Iterator[Piece]:
    """Every piece of the model in file order: embedding, layer by layer in the order of the table, norm, head."""
    found = itertools.chain.from_iterable(pieces_of(config, name, leaf.shape) for name, leaf in abstract_params(config).items())
    order = {row.path: index for index, row in enumerate(ROWS)}

    def position(piece: Piece) -> tuple[int, int]:
        rank = order[piece.row.path]
        if piece.layer is not None:
            return piece.layer, rank
        return (-1, rank) if rank == 0 else (config.num_hidden_layers, rank)

    return iter(sorted(found, key=position))


def expected_tensors(config: GptOssConfig, layout: Layout) -> dict[str, TensorSpec]:
    """Exactly the tensors that a checkpoint of this layout holds, by key."""
    specs = (spec for piece in all_pieces(config) for spec in piece.tensors(layout, config).values())
    return {spec.key: spec for spec in specs}
