"""A pre-trained CWT-MAE-RoPE encoder with a classification head, and the reading and writing of both models'
files.

Upstream file: model_finetune.py (LatentReasoningHead, ResidualMLPBlock, TF_MAE_Classifier), with its
state-dict keys. The decoder is never allocated, and a checkpoint that does not fit is an error instead of a
random encoder.

    model = TF_MAE_Classifier("checkpoint_last.pth", num_classes=5, signal_len=1000)
    tokens, pooled = model.encode(signal, fs=250)
"""

import inspect
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from common.checkpoint import atomic_path
from common.errors import UserError
from common.weights import load_weights, read_checkpoint, read_weights
from cwt_mae.dataset import Preprocess, is_flat, lay, standardised_leads
from cwt_mae.model import CWT_Encoder, CWT_MAE_RoPE, init_weights, keep_config, numerics_of
from cwt_mae.recording import as_channel, check_rate

ENCODER_ARGS = set(inspect.signature(CWT_Encoder.__init__).parameters) - {"self"}
NO_HEAD_ARGS = ("self", "__class__", "pretrained_path", "mlp_rank_ratio", "encoder")  # of TF_MAE_Classifier
DECODER_ARGS = set(inspect.signature(CWT_MAE_RoPE.__init__).parameters) - {"self", "encoder"}
# Keys of upstream's later models that have no place here; v1 and v2 else have the keys of the seed's stage.
LATER_STAGES = {
    "time_attn.qkv": "upstream's CWT_MAE_v3 (attention over time, leads and depth, no class token)",
    "patch_embed.proj.6": "upstream's CWT_MAE_v1 with convolutions before the patches (use_conv_stem)",
}
NO_RUN = (
    "signal: holds no 8 samples in a row (2 at the model's rate) without NaN that are no flat line; check it"
)
DECODER_KEYS = ("decoder_", "mask_token", "time_reducer", "time_pred", "rope_decoder")


class LatentReasoningHead(nn.Module):
    """Learned tokens that ask the encoder's tokens: cross-attention, self-attention, MLP (post-norm), mean,
    classifier.

    forward: x (B, N, D), real (B, N) bool or None -> logits (B, C).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_classes: int,
        num_reasoning_tokens: int = 8,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.reasoning_tokens = nn.Parameter(torch.empty(1, num_reasoning_tokens, embed_dim))
        self.cross_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, dropout=dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.self_attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, dropout=dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * embed_dim, embed_dim),
        )
        self.norm3 = nn.LayerNorm(embed_dim)
        self.classifier = nn.Linear(embed_dim, num_classes)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.reasoning_tokens, std=0.02)

    def forward(self, x, real=None):
        q = self.reasoning_tokens.expand(len(x), -1, -1)
        ignore = None if real is None else ~real
        # without the attention maps, which nobody reads, a fused kernel serves
        q = self.norm1(q + self.cross_attn(q, x, x, key_padding_mask=ignore, need_weights=False)[0])
        q = self.norm2(q + self.self_attn(q, q, q, need_weights=False)[0])
        return self.classifier(self.norm3(q + self.ffn(q)).mean(1))


class ResidualMLPBlock(nn.Module):
    """x + MLP(LayerNorm(x)), width `dim` throughout."""

    def __init__(self, dim: int, dropout_rate: float = 0.5):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.net = nn.Sequential(
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Dropout(dropout_rate),
            nn.Linear(dim, dim),
            nn.Dropout(dropout_rate),
        )

    def forward(self, x):
        return x + self.net(self.norm(x))


class TF_MAE_Classifier(nn.Module):
    """Encoder without masking, class token dropped, and one of two heads -> logits (B, num_classes).

    pretrained_path: a file of `train.py`, an upstream checkpoint, or None for random weights. The file's own
        configuration builds the encoder; what is passed here overrides it (most often signal_len: the
        position table is interpolated). An upstream file runs with upstream's numerics (legacy) and says so.
    use_cot: `LatentReasoningHead` with num_reasoning_tokens; else an MLP of num_res_blocks blocks of width
        hidden_dim with dropout dropout_rate, on the mean of the tokens.
    center_columns: k > 0 gives the MLP the k time columns around the middle, joined, for windows that are
        about what stands in their middle, such as a heart beat.
    compare: the MLP gets the difference between the middle tokens and `median_beat`, the median over the
        record. That removes what is the patient's own, noise included; there are no layer norms then, because
        it matters how far the two are apart.
    num_features: numbers known beside the signal (say, beat intervals), given to `forward`. A small network
        of their own adds its logits to the head's: joined to many tokens, few strong numbers would be lost.
    hierarchy: h > 0: the first h features alone decide between the first two classes, all the rest whether
        a window belongs to one of these two or to another class (beats: the rhythm tells S from N).
    input_dropout: of what the head is given.
    **encoder: arguments of CWT_MAE_RoPE; those of its decoder are accepted and ignored, so that one
        configuration serves both models.

    `config` holds all of these as plain values: TF_MAE_Classifier(None, **config) builds the same model.
    """

    def __init__(
        self,
        pretrained_path,
        num_classes: int,
        mlp_rank_ratio: float | None = None,
        use_cot: bool = True,
        num_reasoning_tokens: int = 8,
        hidden_dim: int = 512,
        dropout_rate: float = 0.0,
        num_res_blocks: int = 2,
        num_features: int = 0,
        center_columns: int = 0,
        input_dropout: float = 0.0,
        compare: bool = False,
        hierarchy: int = 0,
        **encoder,
    ):
        own = {name: value for name, value in locals().items() if name not in NO_HEAD_ARGS}
        super().__init__()
        unknown = set(encoder) - ENCODER_ARGS - DECODER_ARGS
        if unknown:
            raise TypeError(f"TF_MAE_Classifier got unknown arguments {', '.join(sorted(unknown))}")
        if mlp_rank_ratio is not None:
            encoder["mlp_rank_ratio"] = mlp_rank_ratio
        tensors, config = read_model(pretrained_path) if pretrained_path else ({}, {})
        encoder = {key: value for key, value in (config | encoder).items() if key in ENCODER_ARGS}
        self.encoder_model = CWT_Encoder(**encoder)
        if pretrained_path:
            load_encoder(self.encoder_model, tensors, config, pretrained_path)
        self.config = self.encoder_model.config | own
        self.register_state_dict_post_hook(keep_config)
        self.use_cot, self.compare = use_cot, compare
        self.num_features, self.center_columns = num_features, center_columns
        self.head = self.make_head()
        self.input_dropout = nn.Dropout(input_dropout)
        self.hierarchy = hierarchy

        def network(inputs: int, outputs: int):
            return nn.Sequential(nn.Linear(inputs, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, outputs))

        if num_features:
            self.feature_head = network(num_features, num_classes)
        if hierarchy:
            self.first_head = network(hierarchy, 1)

    def make_head(self):
        """The head that `config` describes; ValueError for columns that do not fit."""
        config, columns = self.config, self.encoder_model.grid_size[1]
        center_columns, hidden_dim = config["center_columns"], config["hidden_dim"]
        if not 0 <= center_columns <= columns or center_columns and config["use_cot"]:
            raise ValueError(
                f"center_columns {center_columns}: expected 0 .. {columns}, above 0 for the MLP head "
                "(use_cot=False) only"
            )
        if config["compare"] and not center_columns:
            raise ValueError(
                "compare needs center_columns above 0: what is compared is the middle of the window"
            )
        if config["use_cot"]:
            heads, tokens = config["num_heads"], config["num_reasoning_tokens"]
            return LatentReasoningHead(config["embed_dim"], heads, config["num_classes"], tokens, dropout=0.2)
        joined, dropout = config["embed_dim"] * max(1, center_columns), config["dropout_rate"]
        norm = nn.Identity if config["compare"] else nn.LayerNorm
        head = nn.Sequential(
            norm(joined),
            nn.Linear(joined, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            *(ResidualMLPBlock(hidden_dim, dropout) for _ in range(config["num_res_blocks"])),
            norm(hidden_dim),
            nn.Linear(hidden_dim, config["num_classes"]),
        )
        init_weights(head)
        return head

    def forward_features(self, x, real=None):
        """x (B, L), (B, 1, L) or with leads (B, M, L), real alike or None -> patch tokens (B, M * N, D), and
        their mask or None."""
        return self.encoder_model.patch_tokens(x, real)

    def middle(self, x, real=None):
        """Tokens of the center_columns in the middle of the window, joined: (B, center_columns * D)."""
        tokens, patches = self.forward_features(x, real)
        grid = (-1, self.encoder_model.grid_size[1])
        columns = tokens.unflatten(1, grid)  # (B, M * H, W, D)
        if self.encoder_model.leads > 1 and patches is not None:
            there = patches.unflatten(1, grid)[..., None]
            columns = (columns * there).sum(1) / there.sum(1).clamp(min=1)
        else:
            columns = columns.mean(1)
        first = (columns.shape[1] - self.center_columns) // 2
        return columns[:, first : first + self.center_columns].flatten(1)

    def forward(self, x, real=None, features=None, median_beat=None):
        """x as in `forward_features`, features (B, num_features), median_beat (B, center_columns * D) ->
        logits (B, num_classes)."""
        given = 0 if features is None else features.shape[1]
        if given != self.num_features:
            raise ValueError(
                f"features holds {given} numbers for each record, the model was built for {self.num_features}"
            )
        if self.compare != (median_beat is not None):
            raise ValueError(
                f"median_beat is {'missing' if self.compare else 'given'}, the model was built with "
                f"compare={self.compare}"
            )
        if self.center_columns:
            tokens = self.middle(x, real)
            logits = self.head(self.input_dropout(tokens - median_beat if self.compare else tokens))
        elif self.use_cot:
            tokens, patches = self.forward_features(x, real)
            logits = self.head(self.input_dropout(tokens), patches)
        else:
            logits = self.head(self.input_dropout(masked_mean(*self.forward_features(x, real))))
        if features is None:
            return logits
        features = features.to(logits.dtype)
        logits = logits + self.feature_head(features)
        if not self.hierarchy:
            return logits
        # Logarithms of probabilities: of the first two classes together and of each other one, then of each
        shares = torch.cat([logits[:, :1], logits[:, 2:]], 1).log_softmax(1)
        second = self.first_head(features[:, : self.hierarchy])
        first_two = torch.cat([-second, second], 1)
        return torch.cat([shares[:, :1] + F.logsigmoid(first_two), shares[:, 1:]], 1)

    @torch.no_grad()
    def encode(self, signal, fs: float, tokens: bool = True):
        """Features of one record of any length and rate: signal (L,), fs in Hz -> tokens (windows, N, D),
        pooled (D,).

        Windows as in `encode_windows`; tokens of padding are 0 and not in `pooled`, the mean of the others.
        tokens=False: (None, pooled), for a long record, whose tokens would not fit into memory.
        """
        kept, total, count = [], 0.0, 0
        for _, found, patches in self.encode_windows(signal, fs):
            found = found * patches[..., None]
            if tokens:
                kept.append(found)
            total, count = total + found.sum((0, 1), dtype=torch.float64), count + patches.sum()
        return torch.cat(kept) if tokens else None, (total / count).float()

    @torch.no_grad()
    def encode_windows(self, signal, fs: float):
        """Yield (seconds (n,) at which n windows begin, their tokens (n, N, D), mask (n, N)), few at a time.

        signal (L,), or of a model of several leads (M, L) with nan for a missing lead, at fs Hz. It is
        prepared as in training (config's `preprocess`), cut at nan into runs, and these into windows of
        signal_len side by side, the last one padded and masked. Only what a few windows need is in memory.
        """
        encoder, training, device = self.encoder_model, self.training, self.encoder_model.cls_token.device
        windows = lead_windows if encoder.leads > 1 else run_windows
        prepare = Preprocess(**(self.config["preprocess"] or {}))
        fs = check_rate(fs, "signal")
        found = windows(prepare, np.asarray(signal), fs, encoder.signal_len, encoder.patch_size_time)
        count = max(1, encoder.windows_at_once() // encoder.leads)
        while some := list(itertools.islice(found, count)):
            seconds, *parts = zip(*some)
            x, real = (torch.from_numpy(np.stack(part)).to(device) for part in parts)
            self.eval()
            tokens, patches = self.forward_features(x, real)
            self.train(training)
            yield seconds, tokens, patches


def runs_of(prepare: Preprocess, signal: np.ndarray, fs: float) -> list:
    """[(samples, second of the first)] of the runs of signal (L,) without nan that are long enough and no
    flat line."""
    runs = [(run, begin) for run, begin in as_channel(signal, fs).runs() if len(run) >= prepare.least(fs)]
    return [(run, begin) for run, begin in runs if not is_flat(run)]


def run_windows(prepare: Preprocess, signal, fs: float, length: int, patch: int):
    """Yield (second, x (length,), real) of each window of one signal (L,)."""
    signal = signal[0] if signal.ndim == 2 and len(signal) == 1 else signal
    if signal.ndim != 1:
        raise UserError(f"signal has shape {signal.shape}, expected (L,)")
    runs = runs_of(prepare, signal, fs)
    if not runs:
        raise UserError(NO_RUN)
    for run, begin in runs:
        kept, start = np.zeros(0, np.float32), 0
        for piece in prepare.pieces(run, fs, "signal"):
            kept = np.concatenate([kept, piece])
            while len(kept) >= length:
                yield begin + start / (prepare.fs or fs), *prepare.window(kept[:length], length)
                kept, start = kept[length:], start + length
        # A rest shorter than one patch is left out, unless it is all there is.
        if len(kept) >= patch or len(kept) and not start:
            yield begin + start / (prepare.fs or fs), *prepare.window(kept, length)


def lead_windows(prepare: Preprocess, signals, fs: float, length: int, patch: int):
    """Yield (second, x (M, length), real) of each window of several leads (M, L), on one clock."""
    leads, rate = prepare.leads, prepare.fs or fs
    if signals.ndim != 2 or len(signals) != len(leads):
        raise UserError(
            f"signal has shape {signals.shape}, expected ({len(leads)}, L) for {', '.join(leads)}"
        )
    runs = []
    for lead, row in enumerate(signals):
        for run, begin in runs_of(prepare, row, fs):
            runs.append((lead, round(begin * rate), prepare.signal(run, fs, "signal")))
    if not runs:
        raise UserError(NO_RUN)
    total = max(place + len(run) for _, place, run in runs)
    some = False
    for start in range(0, max(1, total - patch + 1), length):
        x, real = lead_window(runs, start, len(leads), length)
        if (real.sum(1) > 1).any():  # one sample has no deviation
            yield start / rate, standardised_leads(x, real), real
            some = True
    if not some:  # a rest shorter than one patch, which is all there is
        start = min(place for _, place, _ in runs)
        x, real = lead_window(runs, start, len(leads), length)
        yield start / rate, standardised_leads(x, real), real


def lead_window(runs: list, start: int, leads: int, length: int):
    """(x (leads, length), real) of the window at sample `start` of runs [(lead, place, samples)]."""
    x, real = np.zeros((leads, length), np.float32), np.zeros((leads, length), bool)
    for lead, place, run in runs:
        lay(run, place - start, x[lead], real[lead])
    return x, real


def masked_mean(tokens, mask=None):
    """Mean over N of tokens (B, N, D), of those in mask (B, N) bool where it is given."""
    if mask is None:
        return tokens.mean(1)
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def interpolate_pos_embed(pos_embed, old_grid, new_grid):
    """Position table (1, 1 + N, D) of one grid (rows, columns) for another: bicubic on both axes, class row
    kept."""
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    table = pos_embed[:, 1:].float().unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2)  # (1, D, H, W)
    table = F.interpolate(table, size=tuple(new_grid), mode="bicubic", align_corners=False)
    table = table.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], table], dim=1)


def load_encoder(encoder: CWT_Encoder, tensors: dict, config: dict, source):
    """Load the encoder's part of `tensors` and print the report; UserError if anything that is learned is
    missing or of another shape.

    The position table's old grid comes from the file: from its configuration, else from the height of
    `time_reducer`, which spans it, else (weights of a classifier alone) it counts as high as the new one.
    """
    heads = ("head.", "feature_head.", "first_head.")
    tensors = {key: value for key, value in tensors.items() if not key.startswith(heads)}
    tensors = {key.removeprefix("encoder_model."): value for key, value in tensors.items()}
    rows, columns = encoder.grid_size
    height = rows
    if {"cwt_scales", "patch_size_freq"} <= set(config):
        height = config["cwt_scales"] // config["patch_size_freq"]
    elif "time_reducer.0.weight" in tensors:
        height = tensors["time_reducer.0.weight"].shape[2]

    def fit_positions(given):
        if "pos_embed" in given:
            count = given["pos_embed"].shape[1] - 1
            if count % height:
                raise UserError(
                    f"{source}: pos_embed has {count} patches, which are not {height} rows; pass the "
                    "cwt_scales and patch_size_freq that the model was trained with"
                )
            if (height, count // height) != (rows, columns):
                print(
                    f"{source}: position table interpolated from {height} x {count // height} to {rows} x "
                    f"{columns} patches"
                )
                given["pos_embed"] = interpolate_pos_embed(
                    given["pos_embed"], (height, count // height), (rows, columns)
                )
        return given

    if encoder.leads > 1 and "lead_embed" not in tensors:
        # Weights of one lead serve several: what joins the leads begins as new.
        tensors |= {key: value for key, value in encoder.state_dict().items() if key.startswith("lead_")}
        print(f"{source}: trained on one lead; the attention between {encoder.leads} leads begins as new")
    report = load_weights(encoder, tensors, source, min_share=0.9, convert=fit_positions, ignore=DECODER_KEYS)
    if report.mismatched:
        key, old, new = report.mismatched[0]
        raise UserError(
            f"{source}: {key} has shape {old} in the file, {new} in the model; pass the sizes that it was "
            "trained with"
        )
    lost = [key for key, _ in encoder.named_parameters() if key in report.missing]
    if lost:
        raise UserError(
            f"{source}: lacks {lost[0]}, which would stay random; {len(lost)} tensors are missing"
        )


def read_model(path):
    """(tensors, configuration) of a model file: ours or upstream's, .pth or .safetensors, pre-trained or
    fine-tuned, or a bare state dict.

    Configuration: ours as it stands, which `torch.save(model.state_dict())` keeps too. A file that lost it
    still says whose numerics its weights want (model.numerics_of), with a notice; sizes must then be passed.
    Of an upstream file: what its `config` says.
    """
    path, config = Path(path), None
    if (path / "model.safetensors").is_file():  # a run folder of train.py or finetune.py
        path = path / "model.safetensors"
    tensors = read_weights(path)
    for key, what in LATER_STAGES.items():
        if any(key in name for name in tensors):
            raise UserError(
                f"{path}: weights of {what}, which is another model; those of its first and second version "
                "with a plain patch embedding load here"
            )
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
    elif path.is_file():
        content = read_checkpoint(path)
        config = content.get("config") or kept_config(content)
    if isinstance(config, dict) and "legacy" in config:
        return tensors, config
    legacy = numerics_of(tensors) is not False
    sections = config if isinstance(config, dict) else {}
    config = {"legacy": legacy}
    for section in (sections.get("data"), sections.get("model")):
        config |= {key: value for key, value in (section or {}).items() if key in ENCODER_ARGS | DECODER_ARGS}
    if legacy:
        print(f"{path}: an upstream checkpoint, running with upstream's numerics (legacy)")
    else:
        print(
            f"{path}: weights of ours without their configuration; sizes, scales and preparation are those "
            "that are passed"
        )
    return tensors, config


def kept_config(content: dict):
    """The configuration that a state dict of ours carries in its metadata; of several modules the fullest
    one. None without it."""
    found = []
    for value in (content, *(v for v in content.values() if isinstance(v, dict))):
        for entry in getattr(value, "_metadata", {}).values():
            if isinstance(entry, dict) and isinstance(entry.get("config"), str):
                found.append(json.loads(entry["config"]))
    return max(found, key=len, default=None)


def save_model(path, model, **extra):
    """Write {'model', 'config', **extra} (.pth), or tensors with the configuration in the metadata
    (.safetensors); whole or not at all."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_path(path) as temporary:
        if Path(path).suffix == ".safetensors":
            about = {name: json.dumps(value) for name, value in {"config": model.config, **extra}.items()}
            save_file(tensors, temporary, metadata=about)
        else:
            torch.save({"model": tensors, "config": model.config, **extra}, temporary)


def load_model(path, **config):
    """The model that `path` holds, whole: CWT_MAE_RoPE or TF_MAE_Classifier, on the CPU, in eval mode.

    An upstream file does not say all its sizes: pass those (num_classes and use_cot of a classifier among
    them).
    """
    tensors, found = read_model(path)
    config = found | config
    if any(key.startswith("head.") for key in tensors):
        if "num_classes" not in config:
            raise UserError(
                f"{path}: a classifier without a configuration; pass num_classes, use_cot and the encoder's "
                "sizes"
            )
        model = TF_MAE_Classifier(None, **config)
    else:
        model = CWT_MAE_RoPE(**config)
    report = load_weights(model, tensors, path, min_share=1.0)
    if report.unexpected:
        raise UserError(
            f"{path}: holds {len(report.unexpected)} tensors that the model lacks, such as "
            f"{report.unexpected[0]}; pass the sizes that it was trained with"
        )
    return model.eval()
