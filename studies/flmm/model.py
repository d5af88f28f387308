"""Where the recipes of this folder keep the models that they make."""

from studies.recipe import ROOT, RUNS

OUT = RUNS / "flmm"
SAM = OUT / "sam" / "sam_tiny.safetensors"
CONFIG = ROOT / "flmm/configs/tiny/scenes.yaml"


def builtin_model(base: str, seed: int) -> list[str]:
    """Overrides of a configuration that name the tiny base of one seed and the tiny SAM."""
    return [f"base.family={base}", f"base.path={OUT / f'base-{base}-{seed}' / 'base'}", f"sam.path={SAM}"]
