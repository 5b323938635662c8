"""Configuration, optimizer, training step and loop. Modules are imported one by one, so that reading a config needs no jax."""
