"""Oscillation tools against their formulas, step by step, on weights whose way is written down; then all of them in one jitted loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.formats import Mxfp4
from gptoss_jax.lab.oscillation import Dampening, EdgeReset, IterativeFreezing, OscillationTracker, OsciReset, QEma, TrackEma

NAME = "blocks.0.mlp.experts.down_proj"


def to_integers(params):
    """A quantizer whose grid is the integers."""
    return {**params, NAME: jnp.round(params[NAME])}


def walk(tool, way, round=to_integers):
    """Leads the weights along way [steps + 1, n] as far as the tool lets them; (weights after each step, states after each step)."""
    transform = tool.transform(round)
    params = {NAME: jnp.asarray(way[0], jnp.float32), "router.weight": jnp.ones(3)}
    state, weights, states = transform.init(params), [], []
    step = jax.jit(lambda updates, state, params: transform.update(updates, state, params), donate_argnums=1)
    for target in way[1:]:
        updates = {NAME: jnp.asarray(target, jnp.float32) - params[NAME], "router.weight": jnp.full(3, 0.5)}
        updates, state = step(updates, jax.tree.map(jnp.copy, state), params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(updates["router.weight"], 0.5)
        weights.append(np.asarray(params[NAME]))
        states.append(jax.tree.map(np.asarray, state))
    return np.stack(weights), states


# at the border .5; through it once; at rest; at the border by larger steps
WAY = np.array([[0.49, 0.2, 1.0, 0.3], [0.51, 0.6, 1.0, 0.7], [0.49, 0.8, 1.0, 0.3], [0.51, 0.9, 1.0, 0.7], [0.49, 0.95, 1.0, 0.3]])


def test_tracker_counts_flips_returns_dwell_and_travel():
    weights, states = walk(OscillationTracker(window=4), WAY)
    np.testing.assert_allclose(weights, WAY[1:], atol=1e-7)
    reports = [{name: float(value) for name, value in state.report().items()} for state in states]
    # three of four flip at step 1, after one step; then the first and the last flip back at every step
    assert [r["flip_rate"] for r in reports] == [0.75, 0.5, 0.5, 0.5] and [r["return_rate"] for r in reports] == [0, 0.5, 0.5, 0.5]
    assert [r["dwell"] for r in reports] == [1, 1, 1, 1] and [s.stood[NAME].tolist() for s in states][-1] == [0, 3, 4, 0]
    # ratios over the window: 4 / .08 = 50, 1 / .75, 0, 4 / 1.6 = 2.5
    assert [r["oscillating"] for r in reports] == [0, 0, 0, 0.25]
    assert reports[-1]["travel_ratio"] == pytest.approx(9 / (0.08 + 0.75 + 1.6), rel=1e-4)
    _, states = walk(OscillationTracker(), np.array([[0.2], [0.3], [0.4], [0.6]]))
    assert float(states[-1].report()["dwell"]) == 3


def test_osci_reset_puts_onto_the_grid_what_traveled_16_times_as_far_and_starts_a_new_window():
    weights, states = walk(OsciReset(window=4), WAY)
    np.testing.assert_allclose(weights[:3], WAY[1:4], atol=1e-7)
    np.testing.assert_allclose(weights[3], [0.0, 0.95, 1.0, 0.3], atol=1e-7)
    assert [float(s.report()["reset_rate"]) for s in states] == [0, 0, 0, 0.25]
    assert all((array == 0).all() for array in (states[-1].moved[NAME], states[-1].moved_q[NAME]))
    assert walk(OsciReset(window=4, ratio=2), WAY)[0][3].tolist() == pytest.approx([0.0, 0.95, 1.0, 0.0], abs=1e-7)
    assert walk(OsciReset(window=3), WAY)[0][2].tolist() == pytest.approx([1.0, 0.9, 1.0, 0.7], abs=1e-7)


def test_edge_reset_moves_what_stands_at_a_border_of_its_bin():
    y = np.zeros(32, np.float32)
    y[:11] = [6, 0.2475, 0.2485, 0.7485, -1.2485, 2.372, 2.37, 2.499, 3.49, 4.745, 1.751]
    #            .2475 = .495 * .5        2.371 = 2 + .495 * .75: only the upper side of 2's bin is that wide     1.751 -> 2: .249
    weights, states = walk(EdgeReset(Mxfp4()), np.stack([y, *[y] * 20])[:, None] / 8)
    expected = y.copy()
    expected[[2, 3, 4, 5, 7, 9]] = [0, 0.5, -1, 2, 2, 4]
    np.testing.assert_array_equal(weights[18, 0], y / 8)
    np.testing.assert_allclose(weights[19, 0] * 8, expected, atol=1e-6)
    assert float(states[19].report()["reset_rate"]) == 6 / 32


def test_dampening_adds_the_gradient_of_the_squared_distance():
    params, grads = {NAME: jnp.array([0.3, 1.8, -2.4])}, {NAME: jnp.array([1.0, 2.0, 3.0])}
    transform = Dampening(weight=0.1, steps=4).transform(to_integers)
    state, factors = transform.init(params), []
    for _ in range(6):
        updates, state = transform.update(grads, state, params)
        factors.append(((updates[NAME] - grads[NAME]) / (2 * (params[NAME] - jnp.round(params[NAME]))))[1])
    np.testing.assert_allclose(factors, 0.05 * (1 - np.cos(np.pi * np.array([0, 1, 2, 3, 4, 4]) / 4)), atol=1e-6)
    assert float(state.report()["distance_to_grid"]) == pytest.approx(np.sqrt((0.09 + 0.04 + 0.16) / 3))

    term = lambda params: 0.1 * jnp.sum((params[NAME] - jax.lax.stop_gradient(jnp.round(params[NAME]))) ** 2)
    constant = Dampening(weight=0.1).transform(to_integers)
    updates, _ = constant.update(grads, constant.init(params), params)
    np.testing.assert_allclose(updates[NAME], grads[NAME] + jax.grad(term)(params)[NAME], rtol=1e-6)


def test_dampening_leaves_out_what_the_grid_clips():
    fmt = Mxfp4("floor")
    x = jnp.zeros((1, 32)).at[0, :3].set(jnp.array([7.5, 6.5, 2.2]))
    tool = Dampening(weight=0.5, format=fmt).transform(lambda params: {NAME: fmt.encode_decode(params[NAME], jnp.float32)[0]})
    updates, _ = tool.update({NAME: jnp.zeros((1, 32))}, tool.init({NAME: x}), {NAME: x})
    np.testing.assert_allclose(updates[NAME][0, :3], [0, 0, 0.2], atol=1e-6)


def freezing_by_hand(way, threshold, m):
    """One element: (latent weight after each step, frozen after each step)."""
    w, frequency, direction, average, value, result = way[0], 0.0, 0, np.round(way[0]), None, []
    for target in way[1:]:
        new = value if value is not None else target
        before, after = np.round(w), np.round(new)
        sign = np.sign(after - before)
        frequency = m * (sign * direction == -1) + (1 - m) * frequency
        if frequency > threshold and value is None:
            new = value = before if abs(before - average) <= abs(after - average) else after
        direction, average = sign or direction, m * after + (1 - m) * average
        w = new
        result.append((w, value is not None))
    return result


def test_iterative_freezing_holds_for_good_what_flips_back_too_often():
    rng = np.random.default_rng(71)
    steady = 0.5 + 0.02 * rng.standard_normal((40, 6))
    way = np.concatenate([steady, np.linspace(0, 3, 40)[:, None]], axis=1)  # the last one only travels
    weights, states = walk(IterativeFreezing(threshold=0.25, momentum=0.1), way)
    for element in range(7):
        by_hand = freezing_by_hand(way[:, element].astype(np.float32), 0.25, 0.1)
        np.testing.assert_allclose(weights[:, element], [w for w, _ in by_hand], atol=1e-6)
        assert [bool(s.is_frozen[NAME][element]) for s in states] == [frozen for _, frozen in by_hand]
    assert states[-1].is_frozen[NAME][:6].sum() >= 4 and not states[-1].is_frozen[NAME][6]
    falling = walk(IterativeFreezing(threshold=1.0, final_threshold=0.05, steps=20, momentum=0.1), way)[1]
    assert [float(s.report()["frozen"]) > 0 for s in falling].index(True) > 5


# ---- Q-EMA ----------------------------------------------------------------------------------------------------------------------


def test_q_ema_rounds_to_the_end_of_the_cell_of_w_that_the_mean_says():
    w, mean = np.zeros((1, 32), np.float32), np.zeros((1, 32), np.float32)
    w[0, :9] = [6, 0.26, 0.26, -2.4, -2.4, 5.5, 1.5, 3.9, -0.7]
    mean[0, :9] = [1, 0.2, 0.3, -2.6, -2.4, 4.5, 9.9, 9.0, 0.9]
    expected = w.copy()
    expected[0, :9] = [6, 0.0, 0.5, -3.0, -2.0, 4.0, 1.5, 4.0, -0.5]
    quantizer = QEma("mxfp4")
    params = {NAME: jnp.asarray(w / 4), "router.weight": jnp.ones(3)}
    rounded = quantizer.round(params, {NAME + ".ema": jnp.asarray(mean / 4)})
    np.testing.assert_array_equal(rounded[NAME] * 4, expected)
    same = quantizer.round(params, quantizer.init(params))[NAME]
    np.testing.assert_array_equal(same, Mxfp4().encode_decode(params[NAME], jnp.float32)[0])
    # straight through, nothing to the means, and MXFP4 files hold the values
    loss = lambda params, extra: (quantizer(params, extra, jax.random.key(0), jnp.int32(0))[NAME] * w).sum()
    grads = jax.grad(loss, argnums=(0, 1))(params, {NAME + ".ema": jnp.asarray(mean / 4)})
    np.testing.assert_array_equal(grads[0][NAME], w)
    assert not np.any(grads[1][NAME + ".ema"])
    np.testing.assert_array_equal(Mxfp4().encode_decode(rounded[NAME], jnp.float32)[0], rounded[NAME])


def test_track_ema_moves_the_mean_toward_the_weight_after_the_update():
    params = {NAME: jnp.array([1.0]), NAME + ".ema": jnp.array([3.0])}
    transform = TrackEma(decay=0.9).transform(lambda params: params)
    updates, _ = transform.update({NAME: jnp.array([1.0]), NAME + ".ema": jnp.array([7.0])}, transform.init(params), params)
    np.testing.assert_allclose(updates[NAME + ".ema"], 0.1 * (2.0 - 3.0), rtol=1e-5)
    assert float(updates[NAME][0]) == 1.0


# ---- together -------------------------------------------------------------------------------------------------------------------


def test_all_tools_chain_with_adam_in_a_donated_jitted_step():
    """A quadratic whose optimum lies between grid points: plain QAT oscillates to the end, each tool lowers the flip rate."""
    fmt, rng = Mxfp4(), np.random.default_rng(72)
    start = jnp.asarray(rng.standard_normal((2, 8, 64)), jnp.float32)
    goal = start + 0.05 * jnp.asarray(rng.standard_normal(start.shape), jnp.float32)
    round = lambda params: {NAME: fmt.encode_decode(params[NAME], jnp.float32)[0]}

    def late_flip_rate(*tools):
        ahead = [tool.transform(round) for tool in tools if tool.acts_on == "gradients"]
        behind = [tool.transform(round) for tool in (*tools, OscillationTracker(window=10)) if tool.acts_on == "updates"]
        optimizer = optax.chain(*ahead, optax.adam(3e-3), *behind)

        def step(carry, _):
            params, state = carry
            grads = {NAME: round(params)[NAME] - goal}
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), state[-1].report()

        train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=80), donate_argnums=0)
        params = {NAME: jnp.copy(start)}
        rates = train((params, optimizer.init(params)))[1]["flip_rate"]
        return float(rates[-40:].mean())

    plain = late_flip_rate()
    assert plain > 0.1
    for tools in ((Dampening(weight=0.5),), (IterativeFreezing(threshold=0.02, momentum=0.02),), (OsciReset(window=10), EdgeReset(fmt, window=10))):
        assert late_flip_rate(*tools) < 0.2 * plain, tools
