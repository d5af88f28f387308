"""Configuration of the signal encoder SiT-MAE (arXiv 2508.00274, 2508.18785)."""

from transformers import PretrainedConfig

REGRESSION_TASKS = ("pulse_width", "pulse_time_delay", "pri", "num_pulses", "isr")
# of utils.log_spectra, the pre-training target beside the patches
SPECTRUM_POWERS, SPECTRUM_BANDS = (1, 2, 4, "envelope"), 32
CHOICES = {
    "attention_type": ("eager", "sdpa", "fa2"),
    "fs_unit": ("hz", "mhz"),
    "position_init": ("xavier", "sincos"),
    "pooling": ("cls", "mean"),
    "encoder": ("sit", "cnn"),
    "stem": ("patch", "overlap"),
}
DEFAULTS = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.02,
    layer_norm_eps=1e-12,
    max_seq_len=(4096, 1),
    patch_size=(8, 1),
    num_channels=2,
    qkv_bias=True,
    decoder_hidden_size=512,
    decoder_num_hidden_layers=8,
    decoder_num_attention_heads=16,
    decoder_intermediate_size=2048,
    mask_ratio=0.75,
    norm_pix_loss=False,
    use_fs=True,
    attention_type="eager",
    fs_unit="mhz",
    position_init="xavier",
    spectrum_weight=0.0,
    contrast_weight=0.0,
    pooling="cls",
    encoder="sit",
    stem="patch",
    label_weights=None,
    signal=None,
)


class SiTMAEConfig(PretrainedConfig):
    """Sizes of encoder and decoder; every field that upstream has, with its default.

    max_seq_len (points, 1) and patch_size (points, 1) may be tuples, lists (as JSON gives them) or plain
    integers. attention_type: "eager", "sdpa" (same weights, same results) or "fa2" (fused Wqkv / Wo weights,
    variable-length kernel where the device has one). fs_unit: unit in which the sampling rate is put into its
    token, "mhz" or "hz". In Hz the phases of the sinusoids are huge and mean little; published weights do not
    say which they used. position_init: "xavier" (upstream's) or "sincos" (as in the image MAE): how the
    trained position tables start. Neighbouring patches start alike with "sincos", which short training runs
    need. spectrum_weight: what the prediction of log spectra (utils.log_spectra) from the cls token counts in
    pre-training beside the reconstruction; 0, upstream's, leaves it and its head `decoder.spectrum_pred` out.
    contrast_weight: what it counts there that the cls tokens of two views of a signal find each other; 0
    leaves it and its head `decoder.contrast_pred` out. pooling: what the heads read for one signal, its cls
    token ("cls", as upstream) or the mean over its IQ tokens ("mean"), which the bursts of a noisy capture
    need. stem: what a token is made of, its patch ("patch", upstream's), or ("overlap") also the patches
    before and behind it. encoder: "sit", or "cnn" for the convolutional one of modeling_cnn, which reads
    hidden_size and patch_size alone. label_weights: {task: weight} of SiTForMultiTask. signal: what its
    training signals were, as prepare.SignalSpec writes it; None in published files. Other keyword arguments
    are kept and not used.
    """

    model_type = "sit_mae"

    def __init__(self, **fields):
        fields = {**DEFAULTS, **fields}
        for name in ("max_seq_len", "patch_size"):
            size = fields[name]
            fields[name] = [size, 1] if isinstance(size, int) else list(size)
        super().__init__(**fields)
        self.check()

    def check(self):
        """Raise ValueError naming the field whose value is not among the possible ones."""
        for field, values in CHOICES.items():
            if getattr(self, field) not in values:
                choices = f"{', '.join(values[:-1])} or {values[-1]}"
                raise ValueError(f"{field}={getattr(self, field)!r}: choose {choices}")
        for part in ("", "decoder_"):
            size, heads = getattr(self, f"{part}hidden_size"), getattr(self, f"{part}num_attention_heads")
            if size % heads:
                raise ValueError(
                    f"{part}hidden_size={size} does not divide by {part}num_attention_heads={heads}"
                )

    @property
    def num_positions(self) -> int:
        """Rows of the position table. The 16 (with fs) or 8 extra points are constants of upstream, whatever
        the patch."""
        return (self.max_seq_len[0] + (16 if self.use_fs else 8)) // self.patch_size[0]

    def in_fs_unit(self, fs_hz):
        """A sampling rate in Hz in the unit that its token takes."""
        return fs_hz / 1e6 if self.fs_unit == "mhz" else fs_hz

    @property
    def num_special(self) -> int:
        """Tokens before the first IQ patch: cls, and the sampling rate if used."""
        return 2 if self.use_fs else 1
