#!/usr/bin/env python
"""Makes single mistakes in a temporary copy of the project and runs the tests that should notice; fails if one survives.

The mistakes are those that people make with gpt-oss and with MXFP4: each changes results silently, all shapes stay right.

    python scripts/mutants.py [--only NAME ...] [--jobs 2]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARITY = "tests/model/test_transformers_parity.py -k module_matches"
DIAGNOSE = "tests/training/test_diagnose.py"
GATE = "tests/training/recipe/test_gate.py"
EXAMPLES = "tests/data/test_examples.py --deselect tests/data/test_examples.py::test_loss_of_shared_documents_is_that_of_one_document_for_each_turn"
CODEC = "tests/formats/test_mxfp4.py"
ESTIMATORS = "tests/quant/test_estimators.py -k backward_is"
OSCILLATION = "tests/lab/test_oscillation.py -k"
SCALES = "tests/lab/test_learned_scale.py -k lsq_value"
DECODE = "tests/ops/test_decode_attention.py"
CACHE = "tests/model/test_inference.py -k alternating_with_tail"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    before: str
    after: str
    tests: str = PARITY


MUTANTS = (
    Mutant("window_127", "gptoss_jax/model/attention.py", "self.window = config.sliding_window if", "self.window = config.sliding_window - 1 if"),
    Mutant("window_129", "gptoss_jax/model/attention.py", "self.window = config.sliding_window if", "self.window = config.sliding_window + 1 if"),
    Mutant("layer_kinds_swapped", "gptoss_jax/model/attention.py", "if kind == SLIDING else None", "if kind != SLIDING else None"),
    Mutant("sinks_removed", "gptoss_jax/model/attention.py", "out_BTNH = run(q_BTNH, k_BTKH, v_BTKH, self.sinks[...],",
           "out_BTNH = run(q_BTNH, k_BTKH, v_BTKH, self.sinks[...] - 1e9,"),
    Mutant("kv_heads_interleaved", "gptoss_jax/model/attention.py", "rotate(product(heads(self.k_proj(x_BTD)))", "rotate(product(heads(self.k_proj(x_BTD)))[:, :, ::-1]"),
    Mutant("alpha_1", "gptoss_jax/ops/swiglu.py", "ALPHA = 1.702", "ALPHA = 1.0"),
    Mutant("swiglu_limit_off", "gptoss_jax/model/moe.py", "self.limit = config.swiglu_limit", "self.limit = 1e9"),
    Mutant("gate_clamped_below", "gptoss_jax/ops/swiglu.py", "jnp.clip(up_PF, -limit, limit)\n    return", "jnp.clip(up_PF, -limit, limit)\n    g_PF = jnp.maximum(g_PF, -limit)\n    return"),
    Mutant("gate_up_not_interleaved", "gptoss_jax/ops/swiglu.py", "wide_PFX = h_PU.astype(wide(h_PU.dtype)).reshape(*h_PU.shape[:-1], -1, 2)",
           "wide_PFX = h_PU.astype(wide(h_PU.dtype)).reshape(*h_PU.shape[:-1], 2, -1).swapaxes(-1, -2)"),
    Mutant("gate_up_swapped", "gptoss_jax/ops/swiglu.py", "return wide_PFX[..., 0], wide_PFX[..., 1]", "return wide_PFX[..., 1], wide_PFX[..., 0]"),
    Mutant("router_bias_0", "gptoss_jax/model/moe.py", "x_BTD, w_ED) + bias_E", "x_BTD, w_ED)"),
    Mutant("router_softmax_over_all", "gptoss_jax/model/moe.py", "return experts_BTA, jax.nn.softmax(top_BTA, axis=-1), stats",
           "return experts_BTA, jnp.take_along_axis(jax.nn.softmax(logits_BTE, axis=-1), experts_BTA, axis=2), stats"),
    Mutant("rope_truncate", "gptoss_jax/model/rope.py", "if rope.truncate:", "if True:"),
    Mutant("rope_no_concentration", "gptoss_jax/model/rope.py", "0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0", "1.0"),
    Mutant("rope_interleaved", "gptoss_jax/model/rope.py", "jnp.split(x_BTNH, 2, axis=-1)", "(x_BTNH[..., 0::2], x_BTNH[..., 1::2])"),
    Mutant("norm_eps_1e-6", "gptoss_jax/model/layers.py", "self.eps = eps", "self.eps = 1e-6"),
    Mutant("dispatch_gradient_of_one_slot", "gptoss_jax/ops/grouped_matmul/groups.py", "jnp.sum(take_or_zero(y_PD, groups.slot_SA), axis=1, dtype=wide(y_PD.dtype))",
           "take_or_zero(y_PD, groups.slot_SA)[:, 0]", "tests/ops/test_grouped_matmul.py"),
    Mutant("piece_counted_twice", "gptoss_jax/ops/grouped_matmul/xla.py", "blocks_E // size % 2, blocks_E", "blocks_E // size, blocks_E", "tests/ops/test_grouped_matmul.py"),
    Mutant("swiglu_gradient_without_sigmoid_slope", "gptoss_jax/ops/swiglu.py", "(1 + ALPHA * g_PF * (1 - s_PF))", "(1 + ALPHA * g_PF)", "tests/ops/test_experts.py"),
    Mutant("loss_gradient_without_target", "gptoss_jax/ops/cross_entropy/__init__.py", "jnp.where(is_target_SV, weights_S[:, None], 0)", "0", "tests/ops/test_cross_entropy.py"),
    Mutant("segments_leak", "gptoss_jax/ops/attention/reference.py", "(key_index <= query_index) & (key_segment == query_segment)", "(key_index <= query_index)",
           "tests/ops/test_attention.py -k definition"),
    Mutant("window_skips_a_block", "gptoss_jax/ops/attention/blockwise.py", "jnp.maximum(start - (self.window - 1), 0)", "jnp.maximum(start - (self.window - 2), 0)",
           "tests/ops/test_attention.py -k equal_dense"),
    Mutant("sink_not_in_softmax", "gptoss_jax/ops/attention/triton_kernels.py", "jnp.ones(token_R.shape, jnp.float32)", "jnp.zeros(token_R.shape, jnp.float32)",
           "tests/ops/test_attention.py -k equal_dense"),
    Mutant("cached_window_128_is_129", "gptoss_jax/ops/attention/decode.py", "lengths_B[:, None] - position_BS < window", "lengths_B[:, None] - position_BS <= window", DECODE),
    Mutant("cached_sink_dropped", "gptoss_jax/ops/attention/decode.py", "+ own_BKG + jnp.exp(sinks_KG - top_BKG)", "+ own_BKG", DECODE),
    Mutant("ring_slot_off_by_one", "gptoss_jax/model/cache.py", "lengths_B % cache.slots", "(lengths_B + 1) % cache.slots", CACHE),
    Mutant("cached_position_off_by_one", "gptoss_jax/model/inference.py", "_context(lengths_B[:, None],", "_context(lengths_B[:, None] + 1,", CACHE),
    Mutant("prefill_keeps_the_first_window", "gptoss_jax/model/cache.py", "index = jnp.clip(position_BS, 0, tokens - 1)", "index = jnp.clip(position_BS % cache.slots, 0, tokens - 1)", CACHE),
    Mutant("resting_rows_get_longer", "gptoss_jax/model/inference.py", "active_B.astype(jnp.int32)", "1", "tests/model/test_inference.py -k rest"),
    Mutant("nibbles_swapped", "gptoss_jax/formats/bits.py", "pairs << jnp.array([0, 4], jnp.uint32)", "pairs << jnp.array([4, 0], jnp.uint32)", CODEC),
    Mutant("block_axis", "gptoss_jax/quant/fake_quant.py", "_encode_decode(jnp.moveaxis(x, axis, -1), key", "_encode_decode(jnp.moveaxis(x, -2, -1), key", "tests/quant/test_fake_quant.py"),
    Mutant("cell_below_a_grid_point", "gptoss_jax/quant/cells.py", "above = size >= border * unit", "above = size > border * unit", ESTIMATORS),
    Mutant("ewgs_sign", "gptoss_jax/quant/estimators/zoo.py", "jnp.sign(grad) * (cells.y - cells.q)", "jnp.sign(grad) * (cells.q - cells.y)", ESTIMATORS),
    Mutant("scale_gradient_to_all", "gptoss_jax/quant/estimators/zoo.py", "jnp.where(sets_scale, jnp.sign", "jnp.where(True, jnp.sign", ESTIMATORS),
    Mutant("freezes_at_the_new_value", "gptoss_jax/lab/oscillation/hold.py", "before[name], after[name])\n                for", "after[name], after[name])\n                for", f"{OSCILLATION} freezing"),
    Mutant("reset_keeps_its_window", "gptoss_jax/lab/oscillation/reset.py", "jnp.where(is_due, 0.0, array)", "array", f"{OSCILLATION} osci_reset"),
    Mutant("interval_with_n_degrees", "gptoss_jax/lab/statistics.py", "stdtrit(n - 1, 0.975)", "stdtrit(n, 0.975)", "tests/lab/test_plots.py -k students"),
    Mutant("tool_of_gradients_after_adam", "gptoss_jax/lab/trainer.py", "*first, optax.scale_by_adam(settings.b1, settings.b2, settings.eps)]", "optax.scale_by_adam(settings.b1, settings.b2, settings.eps), *first]", "tests/lab/test_trainer.py -k before_or_after"),
    Mutant("measured_weights_are_not_the_files", "gptoss_jax/lab/held_out.py", "name: weight.astype(jnp.bfloat16).astype(jnp.float32)", "name: weight", "tests/lab/test_held_out.py -k deployed"),
    Mutant("layers_share_rounding_bits", "gptoss_jax/lab/held_out.py", "expert_keys(fmt, piece, 0,", "expert_keys(fmt, pieces[0], 0,", "tests/lab/test_held_out.py -k deployed"),
    Mutant("moved_base_has_other_scales", "gptoss_jax/lab/noise.py", "jnp.where(largest, elements, elements + noise)", "(elements + noise)", "tests/lab/test_held_out.py -k moved_base"),
    Mutant("curve_of_another_export", "gptoss_jax/lab/grid.py", ".get(label_of(arm.export), [])", '.get("same", [])', "tests/lab/test_experiment.py -k curves_of_their_own"),
    Mutant("lsq_clips_nothing", "gptoss_jax/lab/learned_scale.py", "jnp.where(jnp.abs(blocks) <= 6 * constant, y, 0.0)", "y", SCALES),
    Mutant("scale_bias_126", "gptoss_jax/formats/mxfp4.py", "jnp.where(is_finite, finite_scales, NAN_SCALE)", "jnp.where(is_finite, finite_scales + 1, NAN_SCALE)", CODEC),
    Mutant("ties_away", "gptoss_jax/formats/block_grid.py", "2 * _STEP + _ROUND - g.one", "2 * _STEP + _ROUND + 1 - g.one", CODEC),
    Mutant("stochastic_rounding_with_a_bias", "gptoss_jax/formats/element_round.py", "noise.reshape(bits.shape) < position", "noise.reshape(bits.shape) < position - (position >> 4)",
           "tests/formats/test_element_round.py -k mean"),
    Mutant("noise_counts_from_the_slice", "gptoss_jax/checkpoint/compare.py", "range(start, stop)) if fmt", "range(stop - start)) if fmt", "tests/checkpoint/test_rounded_export.py -k cut"),
    Mutant("four_over_six_takes_the_worse", "gptoss_jax/formats/nvfp4.py", "is_less(errors[1], errors[0])", "is_less(errors[0], errors[1])", "tests/formats/test_nvfp4_options.py"),
    Mutant("mxfp8_scale_of_ocp", "gptoss_jax/formats/mx.py", 'if scale_rule == "rceil" else 0', 'if scale_rule == "" else 0', "tests/formats/test_mx.py"),
    Mutant("rceil_is_floor", "gptoss_jax/formats/scale_rules.py", "bump = (amax & _MANTISSA) > 0x400000", "bump = 0", CODEC),
    Mutant("kl_the_other_way", "gptoss_jax/evaluation/compare.py", "jnp.sum(jnp.exp(a_SV) * (a_SV - b_SV), axis=1)", "jnp.sum(jnp.exp(b_SV) * (a_SV - b_SV), axis=1)",
           "tests/evaluation/test_compare.py -k definitions"),
    Mutant("served_place_off_by_one", "gptoss_jax/evaluation/served.py", "packed.start_of[i] + t - 1) for", "packed.start_of[i] + t) for",
           "tests/evaluation/test_served.py -k recognised"),
    Mutant("cut_answer_counts_as_stopped", "gptoss_jax/evaluation/endpoint.py", 'completion.finish_reason == "stop"', "True", "tests/evaluation/test_endpoint.py"),
    Mutant("experts_not_transposed", "gptoss_jax/checkpoint/hf_layout.py", 'return self.naming == "hf" and self.experts == "bf16"', "return False", "tests/checkpoint/test_load.py"),
    Mutant("old_thoughts_shown", "gptoss_jax/data/rendering.py", "with_thought=i > answered", "with_thought=True", EXAMPLES),
    Mutant("earlier_answers_learn_end", "gptoss_jax/data/examples.py", ', label="<|return|>")', ")", EXAMPLES),
    Mutant("thoughts_of_a_loop_stay", "gptoss_jax/data/examples.py", "stale = open_thoughts and is_final(message)", "stale = bool(thought(message)) and is_final(message)", EXAMPLES),
    Mutant("tool_result_not_json", "gptoss_jax/data/rendering.py", 'to_json(message["content"]), "commentary")', 'str(message["content"]), "commentary")', EXAMPLES),
    Mutant("held_out_rows_trained", "gptoss_jax/data/pipeline.py", "train, rest = split_rows(", "_, rest = split_rows(", "tests/data/test_pipeline.py"),
    Mutant("weight_of_the_wrong_source", "gptoss_jax/data/pipeline.py", "for count in corpus.counts], seed)", "for count in corpus.counts[::-1]], seed)",
           "tests/data/test_pipeline.py"),
    Mutant("documents_shifted_by_one_token", "gptoss_jax/data/documents.py", "dtype=np.int64) - lengths, lengths)", "dtype=np.int64) - lengths + 1, lengths)",
           "tests/data/test_pipeline.py"),
    Mutant("labels_taken_from_ids", "gptoss_jax/data/documents.py", "labels = ids if same else", "labels = ids if True else", "tests/data/test_pipeline.py"),
    Mutant("system_text_lost", "gptoss_jax/data/columns.py", '"system", "content": _text(row, system)}] if', '"system", "content": _text(row, system)}][:0] if',
           "tests/data/test_columns.py"),
    Mutant("layer_stays_rounded", "gptoss_jax/training/diagnose/gap.py", "_put(params, piece, leaf)", "_put(params, piece, _round(leaf, fmt))", DIAGNOSE),
    Mutant("pull_back_forward", "gptoss_jax/training/diagnose/weights.py", "-jnp.sum(error * delta)", "jnp.sum(error * delta)", DIAGNOSE),
    Mutant("gate_passes_nan", "gptoss_jax/training/recipe/gate.py", "measured.kl <= gate.max_kl", "not measured.kl > gate.max_kl", GATE),
    Mutant("rejected_stays_exported", "gptoss_jax/training/recipe/run.py", "os.rename(export, rejected)", "shutil.copytree(export, rejected)", GATE),
    Mutant("drop_against_itself", "gptoss_jax/training/recipe/gate.py", "reference.rate(task) - measured.rate(task)", "0 * measured.rate(task)", GATE),
)  # fmt: skip


def copy_project(target: Path) -> None:
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", "*.egg-info", ".hypothesis")
    shutil.copytree(ROOT, target, ignore=skip)


def run(mutant: Mutant) -> tuple[Mutant, bool, str, float]:
    """Applies one mistake; True if a test failed because of it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "project"
        copy_project(copy)
        file = copy / mutant.file
        text = file.read_text()
        if text.count(mutant.before) != 1:
            return mutant, False, f"{mutant.file} holds the text to change {text.count(mutant.before)} times: the mutant is out of date", 0.0
        file.write_text(text.replace(mutant.before, mutant.after))
        # the copy must be what is imported, not the installed project
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *mutant.tests.split()]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    # exit code 1: a test failed. Anything else (2 interrupted, 4 usage, 5 nothing collected) proves nothing.
    return mutant, done.returncode == 1, last[0], time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these mutants alone")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known = {mutant.name: mutant for mutant in MUTANTS}
    unknown = set(args.only or ()) - set(known)
    if unknown:
        parser.error(f"unknown mutants {sorted(unknown)}; known are {', '.join(known)}")
    chosen = [known[name] for name in args.only] if args.only else list(MUTANTS)
    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, noticed, summary, seconds in pool.map(run, chosen):
            print(f"{'noticed ' if noticed else 'SURVIVED'}  {mutant.name:<30} {seconds:5.0f} s  {summary}", flush=True)
            if not noticed:
                survivors.append(mutant.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed" + (f"; survivors: {', '.join(survivors)}" if survivors else ""))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
