"""Qwen3-VL as a frozen base: inputs and grid of Qwen2.5-VL; the features that its deep layers get beside the
text lie on image tokens alone, so the rows of phrases are what the layers give."""

from flmm.models.frozen_qwen import FrozenQwen


class FrozenQwen3VL(FrozenQwen):
    architecture = "Qwen3VLForConditionalGeneration"
    template = "chat"
