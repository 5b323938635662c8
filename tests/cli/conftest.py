from tests.checkpoint.conftest import mxfp4_dir, tensors  # noqa: F401  (fixtures)
