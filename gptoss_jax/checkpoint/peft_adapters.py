"""Adapters in PEFT's own layout: `adapter_config.json` and `adapter_model.safetensors`, written and read.

    attention   base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight [r, in]     .lora_B.weight [out, r]
    experts     base_model.model.model.layers.N.mlp.experts.lora_A.weight [E*r, in]        .lora_B.weight [out, r*E]

PEFT wraps the experts, which are parameters and no modules, once for each of `target_parameters`. A names experts first, [E, r, in]; B names them
last, [out, r, E] (another reading has the same shape and is silently wrong). Of two wrappers the outer one, `experts.lora_A`, is down_proj and the
inner one, `experts.base_layer.lora_A`, gate_up_proj. Of a single one the keys do not say which it is, nor does A, whose width is the same in the
releases: `target_parameters` do if they name one alone, else the rows of B, 2F or D. Layers that are adapted in part are named one by one. Found out
with peft 0.21.2, which the tests run.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoint.hf_layout import pieces_of
from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from gptoss_jax.checkpoint.staging import staged_directory, write_json
from gptoss_jax.checkpoint.store import read_json
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.model import GptOssConfig
from gptoss_jax.model.lora import EXPERTS, LORA_A, LORA_B, PROJECTIONS, LoraSpec, abstract_adapters, adapted_weights, adapter_name

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.experts(?:\.base_layer)?)\.lora_([AB])\.weight")


def is_peft(path: str | Path) -> bool:
    return (Path(path) / ADAPTER_CONFIG).is_file()


def write_peft(out_dir: str | Path, config: GptOssConfig, spec: LoraSpec, adapters: Mapping[str, Any], base: str) -> Path:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads over the model `base`.

    Raises:
      UsageError: the target exists and is not an empty directory. RunError: it cannot be written.
    """
    tensors, module_layers = dict(_to_peft(config, spec, adapters)), _layers_of(config, spec)
    both = lambda layer: all(layer in module_layers.get(name, ()) for name in EXPERTS)
    tensors = {_key(layer, name, which, both(layer)): array for (layer, name, which), array in tensors.items()}

    def targets(experts: bool) -> list[str]:
        found = []
        for name in PROJECTIONS:  # gate_up_proj first: the inner one
            layers = module_layers.get(name)
            if layers and (name in EXPERTS) == experts:
                where = f"mlp.experts.{name}" if experts else f"self_attn.{name}"
                found += [where if experts else name] if len(layers) == config.num_hidden_layers else [f"{layer}.{where}" for layer in layers]
        return found

    raw = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": spec.rank, "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "target_modules": targets(experts=False), "target_parameters": targets(experts=True) or None,
    }  # fmt: skip
    with staged_directory(Path(out_dir), sum(array.nbytes for array in tensors.values())) as staging:
        write_json(staging / ADAPTER_CONFIG, raw)
        with SafetensorsWriter(staging / ADAPTER_MODEL, {key: ("F32", array.shape) for key, array in tensors.items()}) as writer:
            for key, array in tensors.items():
                writer.write(key, array)
    return Path(out_dir)


def read_peft(path: str | Path, config: GptOssConfig) -> tuple[LoraSpec, dict[str, jnp.ndarray]]:
    """(spec, adapters) of such a directory. Layers without adapters where others of the same stack have them get zeros.

    Raises:
      CorruptError: tensors that do not fit the model or the config. UsageError: a kind of adapter that we do not have.
    """
    raw, file = _settings(path), SafetensorsFile(Path(path) / ADAPTER_MODEL)
    found: dict[tuple[int, str, str], np.ndarray] = {}
    for key in file.tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise UsageError(f"{path}: {key} is no adapter of attention or experts, which are all that can be read")
        layer, module, which = int(match[1]), match[2], match[3]
        name = module.removeprefix("self_attn.") if module.startswith("self_attn") else _expert_name(path, config, raw, file, key, module)
        found[layer, name, which] = np.asarray(file.array(key)).astype(np.float32)
    layers = {layer for layer, name, _ in found if name in EXPERTS}
    targets = tuple(dict.fromkeys(name for _, name, _ in sorted(found)))
    every = set(range(config.num_hidden_layers))
    if not found or not {layer for layer, *_ in found} <= every:
        raise CorruptError(f"{path}: layers {sorted({layer for layer, *_ in found})}, the model has {config.num_hidden_layers}")
    some = None if layers in (set(), every) else tuple(sorted(layers))
    spec = LoraSpec(raw["r"], float(raw["lora_alpha"]), bool(raw.get("use_rslora")), targets, some)
    return spec, {name: jnp.asarray(array) for name, array in _from_peft(path, config, spec, found)}


def base_of_peft(path: str | Path) -> str:
    """The model that the adapters belong to, by path or hub id."""
    return _settings(path)["base_model_name_or_path"]


def _settings(path: str | Path) -> dict[str, Any]:
    raw = read_json(Path(path) / ADAPTER_CONFIG)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA" or not isinstance(raw.get("r"), int):
        raise UsageError(f"{path}: {ADAPTER_CONFIG} describes no LoRA adapters")
    # what changes the arithmetic; everything else is about training or speed
    plain_values = {"use_dora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for key, plain in plain_values.items():
        if raw.get(key, plain) not in (plain, None):
            raise UsageError(f"{path}: {ADAPTER_CONFIG}: {key} = {json.dumps(raw[key])} is not known here")
    return raw


# ---- the two layouts ------------------------------------------------------------------------------------------------------------


def _layers_of(config: GptOssConfig, spec: LoraSpec) -> dict[str, list[int]]:
    """Adapted layers by name of the projection."""
    layers: dict[str, list[int]] = {}
    for weight, leaf in adapted_weights(config, spec).items():
        for piece in pieces_of(config, weight, leaf.shape):
            name = adapter_name(weight).rpartition(".")[2]
            if name not in EXPERTS or spec.expert_layers is None or piece.layer in spec.expert_layers:
                layers.setdefault(name, []).append(piece.layer)
    return {name: sorted(found) for name, found in layers.items()}


def _pieces(config: GptOssConfig, spec: LoraSpec) -> Iterator[tuple[str, str, int, int | None]]:
    """(weight, projection, layer, slot among stacked layers) of every adapted weight and layer."""
    for weight, leaf in adapted_weights(config, spec).items():
        for piece in pieces_of(config, weight, leaf.shape):
            yield weight, adapter_name(weight).rpartition(".")[2], piece.layer, piece.slot


def _key(layer: int, name: str, which: str, both: bool) -> str:
    module = f"self_attn.{name}" if name not in EXPERTS else "mlp.experts.base_layer" if both and name == "gate_up_proj" else "mlp.experts"
    return f"base_model.model.model.layers.{layer}.{module}.lora_{which}.weight"


def _expert_name(path, config: GptOssConfig, raw: Mapping[str, Any], file: SafetensorsFile, key: str, module: str) -> str:
    inner = key.replace(".experts.lora_", ".experts.base_layer.lora_")
    if module.endswith("base_layer") or inner in file.tensors:
        return "gate_up_proj" if module.endswith("base_layer") else "down_proj"
    named = {target.rpartition(".")[2] for target in raw.get("target_parameters") or ()} & set(EXPERTS)
    if len(named) == 1:
        return named.pop()
    rows = file.tensors[key.replace("lora_A", "lora_B")].shape[0] if key.replace("lora_A", "lora_B") in file.tensors else None
    names = {2 * config.intermediate_size: "gate_up_proj", config.hidden_size: "down_proj"}
    if len(names) < 2 or rows not in names:
        raise CorruptError(f"{path}: {key}: lora_B with {rows} rows belongs to no expert projection of this model")
    return names[rows]


def _to_peft(config: GptOssConfig, spec: LoraSpec, adapters: Mapping[str, Any]) -> Iterator[tuple[tuple[int, str, str], np.ndarray]]:
    layers = _layers_of(config, spec)
    for weight, name, layer, slot in _pieces(config, spec):
        if layer in layers[name]:
            a, b = (adapters[adapter_name(weight) + suffix] for suffix in (LORA_A, LORA_B))
            a, b = (np.asarray(x if slot is None else x[slot], np.float32) for x in (a, b))
            if name in EXPERTS:
                a, b = a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)  # [E, r, in], [E, out, r]
            yield (layer, name, "A"), np.ascontiguousarray(a)
            yield (layer, name, "B"), np.ascontiguousarray(b)


def _from_peft(path, config: GptOssConfig, spec: LoraSpec, found: Mapping[tuple, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    out = {name: np.zeros(leaf.shape, np.float32) for name, leaf in abstract_adapters(config, spec).items()}
    experts, rank = config.num_local_experts, spec.rank
    for weight, name, layer, slot in _pieces(config, spec):
        for which, suffix in (("A", LORA_A), ("B", LORA_B)):
            array, target = found.get((layer, name, which)), out[adapter_name(weight) + suffix]
            target = target if slot is None else target[slot]
            if array is None:
                if (layer, name, "B" if which == "A" else "A") in found:
                    raise CorruptError(f"{path}: layer {layer}, {name}: lora_{which} is missing")
                continue
            flat = target.shape if name not in EXPERTS else (experts * rank, target.shape[2]) if which == "A" else (target.shape[1], rank * experts)
            if array.shape != flat:
                raise CorruptError(f"{path}: layer {layer}, {name}: lora_{which} has shape {array.shape}, expected {flat}")
            if name in EXPERTS:
                array = array.reshape(target.shape) if which == "A" else array.reshape(-1, rank, experts).transpose(2, 0, 1)
            target[...] = array
    return iter(out.items())
