import sys
from pathlib import Path

# repository root: every way of importing this package finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

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
