import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

from em_mllm.em_foundation.models.configuration_em import SiTMAEConfig
from em_mllm.em_foundation.models.modeling_em import (
    SiTForMultiTask,
    SiTMAEForClassification,
    SiTMAEForPreTraining,
    SiTMAEModel,
    SiTMAEModelWithoutMask,
)

__all__ = [
    "SiTForMultiTask",
    "SiTMAEConfig",
    "SiTMAEForClassification",
    "SiTMAEForPreTraining",
    "SiTMAEModel",
    "SiTMAEModelWithoutMask",
]
