"""README.md of an exported directory: what it holds, how it was rounded, and how each program serves it, with the limits known of each."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from gptoss_jax.checkpoint.hf_layout import Layout
from gptoss_jax.model import GptOssConfig, abstract_params

CARD = "README.md"

# program: (command, what to know); DIR is the directory. Read in the sources of TensorRT-LLM (commit 050b6cb9), vLLM 0.33 and SGLang 0.5.23, run with
# llama.cpp (llama-cpp-python 0.3.36) and transformers 5.24.
_TRTLLM = ("trtllm-serve DIR", "YaRN's correction range is rounded to whole dimensions there; no pipeline parallelism for gpt-oss.")
_VLLM = ("vllm serve DIR", "Activations in bfloat16; layers are taken to alternate, beginning with a sliding one, and rms_norm_eps to be 1e-5.")
_SGLANG = ("python3 -m sglang.launch_server --model DIR", "The number of experts must be a multiple of the expert-parallel size.")
_LLAMA = (
    "python convert_hf_to_gguf.py DIR --outfile model.gguf && llama-server -m model.gguf",
    "The tokenizer must be the release's. YaRN's correction range is rounded to whole dimensions, whatever config.json says (`truncate`), and the "
    "CPU kernels round activations to 8 bits: a mean KL of 0.004 and 0.002 to float32 arithmetic on a random model.",
)
_TRANSFORMERS = 'AutoModelForCausalLM.from_pretrained("DIR")'
_SERVERS = {
    "mxfp4": {
        "TensorRT-LLM": (
            _TRTLLM[0],
            "On Blackwell it rounds activations to MXFP8 (W4A8) unless told otherwise: `OVERRIDE_QUANT_ALGO=W4A16_MXFP4 trtllm-serve DIR` computes "
            f"with 16-bit activations, as training did. {_TRTLLM[1]}",
        ),
        "vLLM": _VLLM,
        "SGLang": _SGLANG,
        "llama.cpp": _LLAMA,
        "transformers": (
            _TRANSFORMERS,
            "Where its MXFP4 kernels are missing it decodes to BF16 and says so; `quantization_config=Mxfp4Config(dequantize=True)` asks for that.",
        ),
    },
    "bf16": {"TensorRT-LLM": _TRTLLM, "vLLM": _VLLM, "SGLang": _SGLANG, "llama.cpp": _LLAMA,
             "transformers": (_TRANSFORMERS, "Also for further training there; a checkpoint that it saves can be imported again.")},
}  # fmt: skip
_REFERENCE = ("python -m gpt_oss.generate DIR", "The PyTorch and Triton backends read this layout; at most 36 layers.")
_NVFP4 = (
    "No inference engine is known to load NVFP4 gpt-oss today: TensorRT-LLM and SGLang 0.5.23 have no names for these scales, vLLM 0.33 drops "
    "them in silence (vllm-project/vllm issue 46641), llama.cpp has none for experts, transformers 5.24 leaves global scales of experts out. "
)
_NVFP4_READERS = {
    "own": "This library alone reads this layout.",
    "modelopt": "It is the layout of NVIDIA's Model-Optimizer, whose `NVFP4QTensor.dequantize` gives the trained values.",
    "compressed-tensors": "It is `nvfp4-pack-quantized`, which the package compressed-tensors decompresses to the trained values.",
}


def model_card(config: GptOssConfig, layout: Layout, manifest: Mapping[str, Any]) -> str:
    """The text of README.md for an export with this manifest."""
    fmt, bake, hashes = manifest["format"], manifest["bake"], manifest["xxh3_128"]
    count = sum(math.prod(leaf.shape) for leaf in abstract_params(config).values())
    facts = {
        "architecture": f"gpt-oss, {config.num_hidden_layers} layers, {config.num_local_experts} experts, {count:,} parameters",
        "layout": str(layout),
        "expert weights": _said(fmt),
        **({"values": f"those that {_said(bake)} decodes to: what quantization-aware training computed with"} if bake else {}),
        "all other weights": "BF16",
        "made from": json.dumps(manifest["provenance"], sort_keys=True) if manifest["provenance"] else "not recorded",
        "made by": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        "fingerprint": f"`{fingerprint(hashes['tensors'])}` (SHA-256 of the hashes of all tensors, which are in gptoss_jax_export.json)",
    }
    lines = ["---", "pipeline_tag: text-generation", f"tags: [gpt_oss, {layout.experts}]", "---", "", "# gpt-oss, exported by gptoss_jax", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in facts.items()), ""]
    lines += ["Check: `gptoss-jax verify .` (structure, hashes, what every client demands).", "", "## Serving", "", *_serving(layout)]
    return "\n".join(lines) + "\n"


def fingerprint(tensor_hashes: Mapping[str, str]) -> str:
    """One number for all weights, whatever files they are spread over."""
    return hashlib.sha256(json.dumps(dict(sorted(tensor_hashes.items()))).encode()).hexdigest()


def _said(fmt: Mapping[str, Any]) -> str:
    """A format with its options, as `format_from_dict` reads them."""
    options = ", ".join(f"{name} {value}" for name, value in fmt.items() if name != "name" and value is not None)
    return f"{fmt['name'].upper()} ({options})" if options else fmt["name"].upper()


def _serving(layout: Layout) -> list[str]:
    if layout.experts == "nvfp4":
        return [_NVFP4 + _NVFP4_READERS[layout.dialect]]
    programs = _SERVERS[layout.experts]
    if layout.naming == "openai":
        programs = {"OpenAI's reference": _REFERENCE, "TensorRT-LLM": programs["TensorRT-LLM"]}
    lines = []
    for program, (command, limits) in programs.items():
        lines += [f"**{program}**", "", f"    {command}", "", limits, ""]
    return lines[:-1]
