"""The architecture that a config names, without its weights: a release by its name, or a directory that is there."""

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.source import NANO, open_checkpoint
from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig

RELEASES = {"20b": GptOssConfig.gpt_oss_20b, "120b": GptOssConfig.gpt_oss_120b}


def architecture(model: str | None) -> tuple[GptOssConfig, str]:
    """(config, where it comes from). A path that does not exist yet, as a QAT config's `model`, is taken for the release that its name names.

    Raises:
      UsageError: no model is set, or its architecture cannot be told.
    """
    if not model:
        raise UsageError("config: model is not set; for a plan model=20b or model=120b is enough")
    found = orbax_store.locate(model)
    if found is not None:
        return GptOssConfig.from_dict(orbax_store.read_meta(*found).model), "its checkpoint"
    words = model.lower().replace("/", "-").replace("_", "-").replace(".", "-").split("-")
    named = [size for size in RELEASES if size in words]
    if named and not _exists(model):
        return RELEASES[named[-1]](), "the release of that name"
    if model == "nano" or _exists(model):
        return open_checkpoint(str(NANO) if model == "nano" else model).config, "its config.json"
    raise UsageError(f"model {model!r}: no directory of that name, and the name holds none of {', '.join(RELEASES)}")


def _exists(path: str) -> bool:
    from pathlib import Path

    return Path(path).expanduser().exists()
