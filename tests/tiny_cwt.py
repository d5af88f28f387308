"""Sizes of a tiny CWT-MAE, and a way to run the scripts of cwt_mae and of its study, for their tests."""

SIZES = dict(
    signal_len=200, patch_size_time=20, cwt_scales=8, patch_size_freq=8, embed_dim=16, depth=1, num_heads=2
)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
CHANGES = [f"{name}={value}" for name, value in (SIZES | DECODER).items()]  # of --set


def run(script, *words):
    """Run the main function of a script, an imported module, as the command line would."""
    script.main(script.parse_args(list(map(str, words))))
