"""Measures tasks on the shipped model, its experts and rows cut over the devices of all processes, and says the rates: ROOT TASK.yaml ..."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp

from gptoss_jax import initialize
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.data import load_tokenizer
from gptoss_jax.sharding import storage_shardings
from gptoss_jax.training.task_rates import TaskRates

root, *files = sys.argv[1:]
initialize()
model = load_model("nano", jnp.float32, storage_shardings)
rates = TaskRates(files, model.config, None, load_tokenizer(model.directory), "float32", Path(root))(3, model.params)
sys.stdout.write("SAID " + json.dumps(rates) + "\n")
