"""Every knob of every command, typed, with its unit and its source."""

from finemask_ds.config.doctor import DoctorConfig
from finemask_ds.config.finetune import CellKnobs, FinetuneConfig, SweepConfig
from finemask_ds.config.knobs import VOLATILE, Config, knob
from finemask_ds.config.recipes import TamtRecipeConfig
from finemask_ds.config.search import (
    PAPER_INTERVAL_STEPS,
    PAPER_SCHEDULE_STEPS,
    TABLE_2_STEPS,
    HeadConfig,
    ImpConfig,
    MagnitudeConfig,
    PretrainConfig,
    SearchConfig,
    TamtConfig,
    TrainingConfig,
)

__all__ = [
    "PAPER_INTERVAL_STEPS",
    "PAPER_SCHEDULE_STEPS",
    "TABLE_2_STEPS",
    "VOLATILE",
    "CellKnobs",
    "Config",
    "DoctorConfig",
    "FinetuneConfig",
    "HeadConfig",
    "ImpConfig",
    "MagnitudeConfig",
    "PretrainConfig",
    "SearchConfig",
    "SweepConfig",
    "TamtConfig",
    "TamtRecipeConfig",
    "TrainingConfig",
    "knob",
]
