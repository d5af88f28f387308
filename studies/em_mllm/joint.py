"""What the recipes of this study share: the settings of pre-training, and joint training in two stages."""

from studies.recipe import size, stage

ENCODER = dict(
    optimizer="muon",
    lr=2e-3,
    mask_ratio=0.5,
    spectrum_weight=0.5,
    batch_size=32,
    log_every=100,
    overwrite=True,
)
LLM_STEPS = size(800, smoke=4)


def join(out, seed: int, encoder, llm, **options):
    """Join `encoder` and `llm` into out/model: first the projector alone learns to speak to the language
    model, then encoder, projector and language model learn together. options: further flags of both stages,
    the data among them.
    """
    options = dict(
        weight_decay=0.05,
        warmup=0.03,
        schedule="cosine",
        batch_size=32,
        questions_per_signal=2,
        log_every=50,
        seed=seed,
        overwrite=True,
        **options,
    )
    aligned = out.with_name(f"{out.name}_align")
    stage(
        "em_mllm/train.py",
        signal_encoder_path=encoder,
        llm_model_path=llm,
        signal_tokens=8,
        freeze_llm=True,
        freeze_signal_encoder=True,
        lr=3e-3,
        max_steps=size(100, smoke=2),
        output_dir=aligned,
        **options,
    )
    stage(
        "em_mllm/train.py",
        trained_dir=aligned / "model",
        optimizer="muon",
        lr=5e-4,
        max_steps=size(250, smoke=2),
        output_dir=out,
        **options,
    )
