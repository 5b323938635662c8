"""What every client demands of a checkpoint directory, one small generator of problems per demand; `CHECKS` says who needs it.

The demands come from reading and running the loaders of transformers 5.23, vLLM 0.33, SGLang 0.5.23, TensorRT-LLM, llama.cpp and OpenAI's
reference. Where a demand is broken most of them load in silence something else: experts initialised at random, scales left at 1, experts
exchanged, positions beyond the training length rotated differently.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gptoss_jax.checkpoint.hf_config import COMPANIONS, MODELOPT_CONFIG, NOT_CONVERTED
from gptoss_jax.checkpoint.hf_layout import MXFP4_BLOCK, NVFP4_BLOCK, all_pieces
from gptoss_jax.checkpoint.source import SourceCheckpoint, check_finite, check_scales, dtype_problems, shape_problems
from gptoss_jax.checkpoint.store import SINGLE
from gptoss_jax.errors import CorruptError
from gptoss_jax.model.config import FULL, SLIDING

_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_EXPLICIT_KEYS = ("head_dim", "num_local_experts", "num_experts_per_tok", "layer_types", "rms_norm_eps", "sliding_window", "swiglu_limit",
                  "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip


class Note(str):
    """A finding that does not fail the check."""


Findings = Iterator[str]


@dataclass(frozen=True)
class Demand:
    title: str
    clients: str
    find: Callable[[SourceCheckpoint], Findings]
    applies: Callable[[SourceCheckpoint], bool] = lambda source: True


def tensor_set(source: SourceCheckpoint) -> Findings:
    """Exactly the tensors that the config demands, with their shapes."""
    yield from shape_problems(source)


def stored_dtypes(source: SourceCheckpoint) -> Findings:
    """U8 codes and scales (an F8_E8M0 scale loads silently wrong in transformers), BF16 for everything else."""
    yield from dtype_problems(source, as_released=True)


def block_multiples(source: SourceCheckpoint) -> Findings:
    """Blocks run along hidden_size (gate_up_proj) and intermediate_size (down_proj)."""
    block = MXFP4_BLOCK if source.layout.experts == "mxfp4" else NVFP4_BLOCK
    for name in ("hidden_size", "intermediate_size"):
        if getattr(source.config, name) % block:
            yield f"{name} = {getattr(source.config, name)} is no multiple of {block}"


def finite_values(source: SourceCheckpoint) -> Findings:
    """No NaN or infinity, no scale byte from 253 on."""
    for piece in all_pieces(source.config):
        for role, spec in piece.tensors(source.layout, source.config).items():
            info = source.store.infos.get(spec.key)
            if role == "packed" or info is None or info.dtype not in spec.dtypes:
                continue  # every code is a value; wrong dtypes are reported above
            try:
                check = check_scales if role == "scales" else check_finite
                for part in source.store.chunks(spec.key):
                    check(part, source.where(spec.key))
            except CorruptError as error:
                yield str(error)


def codes_beside_scales(source: SourceCheckpoint) -> Findings:
    """All tensors of one projection in one file."""
    for piece in all_pieces(source.config):
        specs = piece.tensors(source.layout, source.config).values()
        files = {source.store.infos[spec.key].file.name for spec in specs if spec.key in source.store.infos}
        if len(files) > 1:
            yield f"{piece.hf_key!r} is spread over {', '.join(sorted(files))}"


def file_names(source: SourceCheckpoint) -> Findings:
    """Released file names, and no safetensors file that the index does not name (llama.cpp reads all `model*.safetensors`).

    That the index equals the shards, with each tensor once, was checked when the files were opened.
    """
    for path in sorted(source.path.glob("*.safetensors")):
        if path.name not in source.store.files:
            yield f"{path.name} is a stale file: the index does not name it"
    if source.layout.naming == "hf":
        for name in source.store.files:
            if name != SINGLE and not _SHARD_NAME.fullmatch(name):
                yield f"{name} is not named model-XXXXX-of-XXXXX.safetensors"
        if source.store.index is not None and "total_size" not in source.store.index.get("metadata", {}):
            yield "the index lacks metadata.total_size"


def file_metadata(source: SourceCheckpoint) -> Findings:
    """The mark without which transformers refuses a file."""
    for name, file in source.store.files.items():
        if file.metadata.get("format") != "pt":
            yield f"{name} lacks the metadata {{'format': 'pt'}}"


def config_keys(source: SourceCheckpoint) -> Findings:
    """Everything that a client would otherwise replace by a default of its own."""
    raw = source.raw_config
    if raw.get("architectures") != ["GptOssForCausalLM"]:
        yield f"architectures is {raw.get('architectures')!r}, not ['GptOssForCausalLM']"
    if raw.get("model_type") != "gpt_oss":
        yield f"model_type is {raw.get('model_type')!r}, not 'gpt_oss'"
    missing = [key for key in _EXPLICIT_KEYS if key not in raw]
    if missing:
        yield f"keys {missing} are missing"
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if "truncate" not in rope:
        yield "the RoPE settings lack 'truncate', which clients then take as true (the release has false)"
    elif rope["truncate"]:
        yield Note("RoPE 'truncate' is true, the release has false")
    for key in ("beta_fast", "beta_slow"):
        if key not in rope:
            yield f"the RoPE settings lack {key!r}, which vLLM and TensorRT-LLM read without a default"
    if raw.get("dtype", raw.get("torch_dtype", "bfloat16")) != "bfloat16":
        yield f"dtype is {raw.get('dtype', raw.get('torch_dtype'))!r}, not 'bfloat16'"
    if source.layout.experts == "mxfp4":
        excluded = (raw.get("quantization_config") or {}).get("modules_to_not_convert")
        if not isinstance(excluded, list) or sorted(map(str, excluded)) != sorted(NOT_CONVERTED):
            yield f"quantization_config.modules_to_not_convert is {excluded!r}, the release has {list(NOT_CONVERTED)}"
    if source.layout.dialect == "modelopt":
        if not (source.path / MODELOPT_CONFIG).exists():
            yield f"{MODELOPT_CONFIG} is missing; TensorRT-LLM finds ModelOpt's quantization there"
    elif (source.path / MODELOPT_CONFIG).exists():
        yield f"{MODELOPT_CONFIG} is present; TensorRT-LLM lets it win over config.json"
    if raw.get("eos_token_id") is None:
        yield Note("eos_token_id is not set: generation will not stop by itself")
    if source.config.swiglu_limit != 7.0:
        yield Note(f"swiglu_limit is {source.config.swiglu_limit}; TensorRT-LLM and llama.cpp compute with 7")
    if source.config.rms_norm_eps != 1e-5:
        yield Note(f"rms_norm_eps is {source.config.rms_norm_eps}; vLLM computes with 1e-5")
    if any(kind != (SLIDING, FULL)[i % 2] for i, kind in enumerate(source.config.layer_types)):
        yield Note("layer_types do not alternate from sliding_attention; vLLM and llama.cpp take that for granted")


def companion_files(source: SourceCheckpoint) -> Findings:
    """Tokenizer and chat template; whether they are unchanged is a matter of hashes and of the comparison."""
    missing = [name for name in COMPANIONS if not (source.path / name).is_file()]
    if missing:
        yield Note(f"no {', '.join(missing)}: serving text needs them")


def _is_hf(source: SourceCheckpoint) -> bool:
    return source.layout.naming == "hf"


def _is_encoded(source: SourceCheckpoint) -> bool:
    return source.layout.experts != "bf16"


DEMANDS = (
    Demand("1 tensors and shapes", "all", tensor_set),
    Demand("2 stored dtypes", "transformers, llama.cpp, vLLM", stored_dtypes),
    Demand("3 block multiples", "vLLM, SGLang, TensorRT-LLM", block_multiples, _is_encoded),
    Demand("4 scales and finite values", "all", finite_values),
    Demand("5 codes beside scales", "llama.cpp", codes_beside_scales, _is_encoded),
    Demand("6 index and file names", "transformers, vLLM, llama.cpp", file_names),
    Demand("7 file metadata", "transformers", file_metadata, _is_hf),
    Demand("8 config.json", "all", config_keys, _is_hf),
    Demand("9 tokenizer files", "all that serve text", companion_files, _is_hf),
)
