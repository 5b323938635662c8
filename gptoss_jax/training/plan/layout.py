"""How a training config lies on so many devices, without the devices: an abstract mesh, shapes of the state, and the sizes that follow from them.

Legend: S tokens of a device's microbatch  E experts of a device while it computes  P slots of its expert buffer
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gptoss_jax.data import Batch
from gptoss_jax.model import GptOssConfig, abstract_params
from gptoss_jax.ops.grouped_matmul import block_rows, max_slots
from gptoss_jax.sharding import DEFAULT_RULES, MESH_AXES, param_shardings
from gptoss_jax.sharding.experts import choose_transport
from gptoss_jax.training.config import BatchConfig, MeshConfig, TrainConfig
from gptoss_jax.training.plan.architecture import architecture
from gptoss_jax.training.step import Shardings, Teacher, TrainState, abstract_state


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`."""
    shape = lambda leaf: leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Layout:
    """A config on its mesh. `kernels` is the implementation whose buffers are counted, "triton" for a GPU."""

    config: GptOssConfig
    train: TrainConfig
    kernels: str = "triton"

    @property
    def sizes(self) -> MeshConfig:
        return self.train.mesh

    @cached_property
    def mesh(self) -> AbstractMesh:
        return AbstractMesh(tuple(getattr(self.sizes, a) for a in MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    @cached_property
    def shardings(self) -> Shardings | None:
        """None on one device.

        Raises:
          UsageError: what the rules cannot lay out, by name.
        """
        if self.sizes.size == 1:
            return None
        return Shardings.on(self.config, self.mesh)

    @cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of all that a step takes and gives back."""
        # what changes no shape is left out, so that a search traces the state once
        same = dict(steps=1, epochs=None, batch=BatchConfig(), mesh=MeshConfig(), remat="layer")
        return abstract_state(self.config, self.train.model_copy(update=same), self.shardings)

    @cached_property
    def teacher(self) -> Teacher | None:
        """Shapes and shardings of the model that the config distils from."""
        if self.train.distill is None:
            return None
        config, _ = architecture(self.train.distill.teacher)
        places = self.shardings and param_shardings(config, self.mesh)
        shapes = abstract_params(config, jnp.dtype(self.train.compute_dtype)).items()
        params = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places and places[name]) for name, x in shapes}
        return Teacher(config, params, places)

    @cached_property
    def batch(self) -> Batch:
        shape, sharding = (self.train.batch.rows, self.train.data.row_length), self.shardings and self.shardings.batch
        dtypes = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
        return Batch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in dtypes))

    # ---- sizes on one device ----------------------------------------------------------------------------------------------------
    def over(self, *logical: str) -> int:
        """Devices among which a logical axis is cut."""
        return math.prod(self.mesh.shape[a] for axis in logical for a in DEFAULT_RULES.axes(axis, self.mesh))

    @property
    def gathered(self) -> int:
        """Devices over which experts are stored, and put together to compute."""
        return math.prod(self.mesh.shape[a] for a in DEFAULT_RULES.axes("expert", self.mesh) if a in DEFAULT_RULES.gathered)

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return self.train.batch.rows // self.train.batch.accumulation // self.sizes.row_groups

    @property
    def tokens(self) -> int:
        """S."""
        return self.rows * self.train.data.row_length // self.sizes.context

    @property
    def exchanged_tokens(self) -> int:
        """Tokens that come together over `expert`."""
        return self.tokens * self.sizes.expert

    @property
    def transport(self) -> str:
        """How rows get to the experts of other devices: "gather" or "ragged", which sends `expected_share` of a gather's rows at even routing."""
        config = self.config
        return choose_transport(
            self.train.expert_transport, self.kernels == "triton", config.num_local_experts, config.num_experts_per_tok, self.sizes.expert
        )

    @property
    def experts(self) -> int:
        """E."""
        return self.config.num_local_experts * self.gathered // self.over("expert")

    @property
    def slots(self) -> int:
        """P, with room for every token at the experts of this device: nothing is dropped."""
        return max_slots(self.exchanged_tokens * self.config.num_experts_per_tok, self.experts, block_rows(self.kernels))

    @property
    def expert_elements(self) -> tuple[int, int]:
        """Elements of gate_up_proj and down_proj of a layer, whole on this device."""
        down = self.experts * self.config.hidden_size * self.config.intermediate_size
        return 2 * down, down

    @property
    def compute_bytes(self) -> int:
        return jnp.dtype(self.train.compute_dtype).itemsize

    @property
    def master_bytes(self) -> int:
        return jnp.dtype(self.train.master_dtype).itemsize

    @property
    def code_bytes(self) -> float:
        """Bytes per expert weight that travel when experts are put together: codes with their scales, or the compute dtype."""
        return self.compute_bytes if self.train.quant is None or self.train.cast_at == "step" else self.stored_code_bytes

    @property
    def stored_code_bytes(self) -> float:
        """Bytes per expert weight of codes and scales; 0 in SFT."""
        if self.train.quant is None:
            return 0
        return 0.5 + (1 / 32 if self.train.quant.format == "mxfp4" else 1 / 16)
