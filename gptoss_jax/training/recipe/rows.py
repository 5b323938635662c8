"""The lines of the table: which weights, exported how; and what NVIDIA measured for them on gpt-oss-20b."""

from dataclasses import dataclass
from typing import Literal

Stage = Literal["base", "sft", "sft_longer", "qat_mxfp4", "qat_nvfp4", "qad_mxfp4", "direct"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    stage: Stage
    format: Literal["mxfp4", "mxfp4 sr", "nvfp4", "bf16"]


ROWS = {
    "original": Row("original MXFP4", "base", "mxfp4"),
    "sft": Row("SFT BF16", "sft", "bf16"),
    "sft_ptq": Row("SFT + PTQ MXFP4", "sft", "mxfp4"),
    "sft_sr": Row("SFT + stochastic export MXFP4", "sft", "mxfp4 sr"),
    "qat_mxfp4": Row("SFT + QAT MXFP4", "qat_mxfp4", "mxfp4"),
    "qat_nvfp4": Row("SFT + QAT NVFP4", "qat_nvfp4", "nvfp4"),
    "qad_mxfp4": Row("SFT + QAD MXFP4", "qad_mxfp4", "mxfp4"),
    "sft_ptq_nvfp4": Row("SFT + PTQ NVFP4", "sft", "nvfp4"),
    "sft_longer": Row("longer SFT BF16", "sft_longer", "bf16"),
    "sft_longer_ptq": Row("longer SFT + PTQ MXFP4", "sft_longer", "mxfp4"),
    "direct": Row("direct QAT MXFP4", "direct", "mxfp4"),
}
RowName = Literal[
    "original", "sft", "sft_ptq", "sft_sr", "qat_mxfp4", "qat_nvfp4", "qad_mxfp4", "sft_ptq_nvfp4", "sft_longer", "sft_longer_ptq", "direct"
]  # fmt: skip
FOUR_ROWS = ("original", "sft", "sft_ptq", "qat_mxfp4")  # those of NVIDIA's table
DEMO_ROWS = (*FOUR_ROWS, "qat_nvfp4")
QAT_ROWS = tuple(name for name, row in ROWS.items() if row.stage in ("qat_mxfp4", "qat_nvfp4", "qad_mxfp4", "direct"))

# pass rates in % of gpt-oss-20b on the validation splits of Multilingual-Thinking and FalseReject (LMSYS blog, 2025-08-28)
NVIDIA_20B = {
    "multilingual": {"original": 16, "sft": 99, "sft_ptq": 89, "qat_mxfp4": 100},
    "over_refusal": {"original": 30, "sft": 98, "sft_ptq": 59, "qat_mxfp4": 97},
}
NvidiaTask = Literal["multilingual", "over_refusal"]
