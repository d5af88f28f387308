"""A language model that reads radio signals: encoder, projector and any causal LLM (upstream MultiModalModel
of train_mllm.py).

[<IQ_START>] K signal vectors [<IQ_END>]  (once per signal)  question  answer

model, tokenizer = load_model("runs/em_mllm/base/model")       # everything that save_model wrote, with one
call
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GraniteForCausalLM, LlamaTokenizerFast, PreTrainedTokenizerFast

import common.llm
from common.checkpoint import atomic_dir
from common.errors import UserError
from common.files import first_line, read_json, reading
from common.llm import add_lora, check_llm, four_bit
from common.weights import load_weights, read_weights
from em_mllm.em_foundation.models import SiTMAEConfig
from em_mllm.em_foundation.models.modeling_cnn import make_encoder
from em_mllm.em_foundation.utils.utils import encoder_tokens, load_encoder, read_config
from em_mllm.fm9g import granite_config, is_fm9g

IQ_START, IQ_END = "<IQ_START>", "<IQ_END>"
START_ID, IQ_ID, END_ID = -1, -2, -3  # places of what is no text, in ids: no vocabulary has them
LORA_TARGETS = ("q_proj", "v_proj")


class MerlinProjector(nn.Module):
    """Linear(D, 1536) - GELU - Linear(1536, d_llm) - LayerNorm, with MERLIN's key names."""

    def __init__(self, d_em, d_llm, d_inner=1536):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d_em, d_inner), nn.GELU(), nn.Linear(d_inner, d_llm))
        self.norm = nn.LayerNorm(d_llm)

    def forward(self, x):
        return self.norm(self.layers(x))


PROJECTORS = {
    "linear": nn.Linear,  # the seed's README
    "mlp": lambda d_em, d_llm: nn.Sequential(
        nn.Linear(d_em, 4 * d_llm), nn.GELU(), nn.Linear(4 * d_llm, d_llm), nn.LayerNorm(d_llm)
    ),
    "merlin": MerlinProjector,
}


def embedding_scales(llm) -> tuple[float, float]:
    """(factor for looked-up text embeddings, factor for signal vectors) before both go in as `inputs_embeds`.

    Granite multiplies whatever comes in as inputs_embeds, so signal vectors are divided by that factor first.
    Code of the FM9G family from a model folder scales only what it looks up itself, so text that we look up
    must be scaled here.
    """
    config = llm.config
    if getattr(config, "embedding_multiplier", None):
        return 1.0, 1.0 / config.embedding_multiplier
    return float(getattr(config, "scale_emb", 1.0)), 1.0


class MultiModalModel(nn.Module):
    """llm: a causal LM; signal_encoder: SiTMAEModelWithoutMask or SignalCNNModel; projector: of PROJECTORS.

    signal_tokens: 0 gives the LLM one vector per patch, as the seed; n > 0 gives n means over equal stretches
    of the signal and cls. iq_start_id, iq_end_id: their embedding rows start the parameter `iq_tokens` (2,
    d_llm), which stands for them from then on; an LLM whose table does not reach that far is left as it is
    and the rows start like a typical one. So they are trained whether the LLM is frozen, adapted or not
    (upstream resizes the table and leaves the new rows at random under LoRA). legacy: the starter kit's
    arithmetic (specified in `legacy_features`), for checkpoints trained with it.
    """

    def __init__(
        self,
        llm,
        signal_encoder,
        projector: str = "linear",
        iq_start_id: int = 0,
        iq_end_id: int = 1,
        signal_tokens: int = 0,
        legacy: bool = False,
    ):
        super().__init__()
        self.llm, self.signal_encoder = llm, signal_encoder
        self.projector, self.signal_tokens, self.legacy = projector, signal_tokens, legacy
        # whether an earlier run trained the language model, and what it was before; `load_model` knows
        self.llm_changed, self.llm_fingerprint = False, None
        self.text_scale, self.signal_scale = embedding_scales(llm)

        table = llm.get_input_embeddings().weight.detach().float()

        # features are normalised: a linear projector starts as loud as the text embeddings
        width = signal_encoder.config.hidden_size
        self.signal_to_hidden = PROJECTORS[projector](width, table.shape[1])
        if projector == "linear" and not legacy:
            std = table.std().item() * self.text_scale / width**0.5
            nn.init.normal_(self.signal_to_hidden.weight, std=std)
            nn.init.zeros_(self.signal_to_hidden.bias)

        # the two marks around a signal
        if max(iq_start_id, iq_end_id) < len(table):
            rows = table[[iq_start_id, iq_end_id]]
        else:
            rows = table.mean(0) + table.std() * torch.randn(2, table.shape[1]).to(table.device)
        self.iq_tokens = nn.Parameter(rows)

    def signal_features(self, iq, iq_lengths=None, fs=None):
        """iq (S, N, 2) scaled by its peak, iq_lengths (S,) valid points, fs (S,) Hz -> features (S, K, D),
        valid (S, K) bool.

        A patch counts as valid if it holds at least one point of the signal.
        """
        config = self.signal_encoder.config
        iq = F.pad(iq, (0, 0, 0, -iq.shape[1] % config.patch_size[0]))
        lengths = torch.full((len(iq),), iq.shape[1], device=iq.device) if iq_lengths is None else iq_lengths
        tokens, positions, ids = encoder_tokens(config, iq, lengths, fs)
        h = self.signal_encoder(tokens, positions, ids).last_hidden_state
        features, valid = h[:, config.num_special :], ids[:, config.num_special :] >= 0
        if self.signal_tokens:
            counts = (features.shape[1], self.signal_tokens)
            patches, stretches = (torch.arange(n, device=iq.device) for n in counts)
            place = patches * self.signal_tokens // valid.sum(1, keepdim=True)  # (S, K) stretch of each patch
            share = (place[:, None] == stretches[:, None]) & valid[:, None]  # (S, signal_tokens, K)
            share = share.to(h.dtype) / share.sum(-1, keepdim=True).clamp(min=1)
            features = torch.cat([share @ features, h[:, :1]], 1)
            valid = torch.ones(features.shape[:2], dtype=torch.bool, device=iq.device)
        return features, valid

    def legacy_features(self, iq):
        """What the starter kit computes: patch elements interleaved I, Q, I, Q; no cls or rate token, so the
        first two patches are overwritten by them; every patch a sample of its own, so none attends to
        another; no final LayerNorm."""
        patch = self.signal_encoder.config.patch_size[0]
        patches = rearrange(F.pad(iq, (0, 0, 0, -iq.shape[1] % patch)), "s (k p) c -> s k (p c)", p=patch)
        each = torch.arange(patches.shape[1], device=iq.device).expand(patches.shape[:2])
        features = self.signal_encoder(patches, each, each, apply_layernorm=False).last_hidden_state
        return features, torch.ones(features.shape[:2], dtype=torch.bool, device=iq.device)

    def embed(
        self,
        iq,
        input_ids,
        attention_mask,
        iq_lengths=None,
        fs=None,
        signal_index=None,
        labels=None,
        left=False,
    ):
        """Lay signals and text out as one sequence per question.

        input_ids, attention_mask (B, L); signal_index (B, n): which signals a question is about, -1 for none
        (default: row i has signal i). Returns inputs_embeds (B, T, d_llm), attention_mask, labels and
        position_ids (B, T); padded on the right, or left for generation.
        """
        if self.legacy:
            features, valid = self.legacy_features(iq)
        else:
            features, valid = self.signal_features(iq, iq_lengths, fs)
        features = features.to(next(self.signal_to_hidden.parameters()).dtype)
        vectors = self.signal_to_hidden(features) * self.signal_scale
        if signal_index is None:
            signal_index = torch.arange(len(input_ids), device=iq.device)[:, None]

        # every row with room for all its signals and its text, as ids: (B, n * (K + 2) + L)
        block = torch.tensor([START_ID, *[IQ_ID] * vectors.shape[1], END_ID], device=iq.device)
        ids = torch.cat([block.repeat(len(input_ids), signal_index.shape[1]), input_ids], 1)
        shown, which = (signal_index >= 0)[..., None], signal_index.clamp(min=0)
        kept = F.pad(valid[which], (1, 1), value=True) & shown  # (B, n, K + 2)
        # legacy learns with padding tokens and their labels in place, as the starter kit's collator lays them
        padded = self.legacy and not left
        text_kept = torch.ones_like(attention_mask) if padded else attention_mask
        kept = torch.cat([kept.flatten(1), text_kept.bool()], 1)

        # what is kept moves together, in its order; padding goes to the other side
        order = (kept if left else ~kept).long().argsort(dim=1, stable=True)
        length = int(kept.sum(1).max())
        order = order[:, -length:] if left else order[:, :length]
        mask, ids = kept.gather(1, order).long(), ids.gather(1, order)

        # text from the table, signals and their marks in their places
        embeds = self.llm.get_input_embeddings()(ids.clamp(min=0)) * self.text_scale
        start, end = (self.iq_tokens * self.text_scale).to(embeds.dtype)
        embeds[ids == START_ID], embeds[ids == END_ID] = start, end
        embeds[(ids == IQ_ID) & mask.bool()] = vectors[which][valid[which] & shown].to(embeds.dtype)
        embeds = embeds * mask[..., None]
        if labels is not None:
            whole_labels = F.pad(labels, (kept.shape[1] - labels.shape[1], 0), value=-100)
            labels = whole_labels.gather(1, order).masked_fill(mask == 0, -100)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if padded:
            mask = torch.cat([mask[:, : -input_ids.shape[1]], attention_mask], 1)
        return embeds, mask, labels, positions

    def forward(
        self,
        iq,
        input_ids,
        attention_mask,
        labels=None,
        iq_lengths=None,
        fs=None,
        signal_index=None,
        all_logits=False,
    ):
        """Returns {"loss": mean over answer tokens, "logits", "labels"}; logits only where a label is, unless
        all_logits.

        labels (B, L): -100 everywhere but at answer tokens, the end token included.
        """
        embeds, mask, labels, positions = self.embed(
            iq, input_ids, attention_mask, iq_lengths, fs, signal_index, labels
        )
        lay = dict(attention_mask=mask, position_ids=positions, use_cache=False)
        if labels is not None and not all_logits:
            # the columns that predict an answer token in some row
            where = torch.nonzero((labels[:, 1:] != -100).any(0)).flatten()
            logits = predicted = self.llm(inputs_embeds=embeds, logits_to_keep=where, **lay).logits
            target = labels[:, where + 1]
        else:
            logits = self.llm(inputs_embeds=embeds, **lay).logits
            predicted, target = logits[:, :-1], None if labels is None else labels[:, 1:]
        loss = None
        if target is not None:
            loss = F.cross_entropy(predicted.flatten(0, 1).float(), target.flatten(), ignore_index=-100)
        return dict(loss=loss, logits=logits, labels=target, inputs_embeds=embeds, attention_mask=mask)

    @torch.no_grad()
    def generate(self, iq, input_ids, attention_mask, iq_lengths=None, fs=None, signal_index=None, **options):
        """Batched generation with key-value cache; returns the new token ids (B, <= max_new_tokens)."""
        embeds, mask, _, _ = self.embed(
            iq, input_ids, attention_mask, iq_lengths, fs, signal_index, left=True
        )
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)

    @torch.no_grad()
    def option_scores(
        self, iq, input_ids, attention_mask, options, iq_lengths=None, fs=None, signal_index=None
    ):
        """Log-likelihood of each continuation after its prompt, which is read once.

        options: for each row a list of token-id lists. Returns a list of float vectors: the summed
        log-probability of each continuation.
        """
        embeds, mask, _, _ = self.embed(
            iq, input_ids, attention_mask, iq_lengths, fs, signal_index, left=True
        )
        lay = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        prompt = self.llm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1, **lay)

        # the prompts are read once; each option goes on from a copy of its row of the cache
        row = torch.tensor([r for r, choices in enumerate(options) for _ in choices], device=iq.device)
        tails = [torch.tensor(c, device=iq.device) for choices in options for c in choices]
        tail = pad_sequence(tails, batch_first=True)
        tail_mask = pad_sequence([torch.ones_like(t) for t in tails], batch_first=True)
        logits = prompt.logits[row]
        if tail.shape[1] > 1:
            cache = prompt.past_key_values
            cache.batch_select_indices(row)
            text = self.llm.get_input_embeddings()(tail[:, :-1]) * self.text_scale
            whole_mask = torch.cat([mask[row], tail_mask[:, :-1]], 1)
            positions = (whole_mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] :]
            rest = self.llm(
                inputs_embeds=text.to(embeds.dtype),
                attention_mask=whole_mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
            logits = torch.cat([logits, rest], 1)
        scores = (logits.float().log_softmax(-1).gather(-1, tail[..., None])[..., 0] * tail_mask).sum(1)
        return list(scores.cpu().split([len(choices) for choices in options]))


# ---- building, freezing, saving, loading


def load_llm(path, dtype="float32", trust_remote_code=False, load_in_4bit=False):
    """Load a causal language model folder; fm9g and minicpm load natively as Granite unless
    trust_remote_code."""
    options = {"quantization_config": four_bit(dtype)} if load_in_4bit else {}
    path = Path(path)
    check_llm(path, trust_remote_code or is_fm9g(path))
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(
            f"--llm-model-path {path}: holds a configuration but no weights (*.safetensors or *.bin); "
            "download them into it"
        )
    if not is_fm9g(path) or trust_remote_code:
        return common.llm.load_llm(path, dtype, trust_remote_code, **options)
    config = granite_config(read_json(path / "config.json"))
    print(
        f"{path}: {config.num_hidden_layers} layers of FM9G / MiniCPM loaded natively as Granite (the same "
        "arithmetic and names)"
    )
    with reading(path, "language model"):
        return GraniteForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, dtype), **options)


def load_tokenizer(path, trust_remote_code=False):
    """The folder's tokenizer with <IQ_START>, <IQ_END> and a pad token added where it has none.

    Where the tokenizer class is code of the folder (FM9G), tokenizer.json or tokenizer.model is read by the
    Llama class instead.
    """
    path = Path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, AttributeError, ImportError) as error:
        tokenizer = plain_tokenizer(path, first_line(error))
    if tokenizer.eos_token is None:
        markers = [t for t in ("<|im_end|>", "</s>", "<|endoftext|>") if t in tokenizer.get_vocab()]
        if not markers:
            file = path / "tokenizer_config.json"
            raise UserError(f"{path}: the tokenizer has no end-of-text token; set eos_token in {file}")
        tokenizer.eos_token = markers[0]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([IQ_START, IQ_END], special_tokens=True)
    return tokenizer


def plain_tokenizer(path: Path, why: str):
    """The tokenizer of a folder whose tokenizer class is code of its own, by the class of Llama."""
    if not (path / "tokenizer.json").exists():
        if (path / "tokenizer.model").exists():
            return LlamaTokenizerFast.from_pretrained(path)
        raise UserError(
            f"{path}: no readable tokenizer ({why}); copy tokenizer.json or tokenizer.model into it"
        )
    with reading(path / "tokenizer.json", "tokenizer"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    settings = path / "tokenizer_config.json"
    known = read_json(settings) if settings.exists() else {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if value := known.get(name):
            setattr(tokenizer, name, value["content"] if isinstance(value, dict) else value)
    tokenizer.chat_template = known.get("chat_template")
    return tokenizer


def build_model(
    llm_path,
    encoder_path,
    projector="linear",
    signal_tokens=0,
    dtype="float32",
    legacy=False,
    trust_remote_code=False,
    attention_type=None,
    load_in_4bit=False,
):
    """Join the language model and the encoder of two folders; returns (MultiModalModel, tokenizer).

    dtype: of the language model; the encoder computes in float32.
    """
    tokenizer = load_tokenizer(llm_path, trust_remote_code)
    llm = load_llm(llm_path, dtype, trust_remote_code, load_in_4bit)
    encoder = make_encoder(read_config(encoder_path, attention_type=attention_type))
    load_encoder(encoder, encoder_path)
    ids = tokenizer.convert_tokens_to_ids([IQ_START, IQ_END])
    model = MultiModalModel(llm, encoder, projector, *ids, signal_tokens=signal_tokens, legacy=legacy)
    return model, tokenizer


def set_trainable(
    model: MultiModalModel, freeze_llm: bool, freeze_signal_encoder: bool, use_lora: bool, lora=None
):
    """Choose what is trained. The projector and the rows of IQ_START and IQ_END always are.

    use_lora: adapters are trained, those of an earlier run if there are any; the language model under them
    never is. freeze_llm without LoRA: nothing of the language model, its head and adapters included. Neither:
    all of it, with the adapters of an earlier run merged into it. freeze_signal_encoder: nothing of the
    encoder. An unfrozen encoder leaves out the MLP of the sampling rate if it does not use one. lora: {"r",
    "alpha", "dropout", "targets"}, arguments of common.llm.add_lora.
    """
    if isinstance(model.llm, PeftModel) and not (use_lora or freeze_llm):
        model.llm = model.llm.merge_and_unload()  # the adapters of an earlier run become part of it
        model.llm.requires_grad_(True)
    elif isinstance(model.llm, PeftModel):  # those of an earlier run go on, or stay as they are
        for name, parameter in model.llm.named_parameters():
            parameter.requires_grad_(use_lora and "lora_" in name)
    elif use_lora:
        usual = {"r": 8, "alpha": 16, "dropout": 0.1, "targets": LORA_TARGETS}
        model.llm = add_lora(model.llm, **{**usual, **(lora or {})})
    else:
        model.llm.requires_grad_(not freeze_llm)
    model.signal_encoder.requires_grad_(not freeze_signal_encoder)
    # a tensor that gets no gradient breaks DDP
    is_sit = model.signal_encoder.config.encoder == "sit"
    if is_sit and (not model.signal_encoder.config.use_fs or model.legacy):
        model.signal_encoder.embeddings.fs_embedder.requires_grad_(False)
    if model.legacy:
        model.signal_encoder.layernorm.requires_grad_(False)


def in_4bit(llm) -> bool:
    """Whether a language model was loaded in 4-bit numbers."""
    return bool(getattr(llm, "is_loaded_in_4bit", False))


def base_state(llm) -> dict:
    """The tensors of a language model under their own names, without the adapters that stand in it."""
    base = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    tensors = base.state_dict().items()
    return {k.replace(".base_layer.", "."): v for k, v in tensors if "lora_" not in k}


def fingerprint(llm) -> str:
    """Sixteen hex digits of the names, shapes and first values of a language model's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(base_state(llm).items()):
        if in_4bit(llm) and (value.dtype == torch.uint8 or ".weight." in name):
            continue  # 4-bit numbers and their scales, which differ from device to device
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(folder, model: MultiModalModel, tokenizer, llm_path, **notes):
    """Write everything that load_model needs, whole or not at all.

    llm/ (weights if they were trained in this run or an earlier one, PEFT adapter under LoRA, nothing if
    frozen: then `llm_path` is remembered), llm_base/ (the language model under an adapter, where an earlier
    run trained it), tokenizer/, signal_encoder/ and signal_to_hidden.safetensors, and multimodal.json with
    the wiring and `notes`.
    """
    is_peft = isinstance(model.llm, PeftModel)
    trained = not is_peft and any(p.requires_grad for p in model.llm.parameters())
    own_base = trained or model.llm_changed
    kind = "adapter" if is_peft else "full" if own_base else "frozen"
    with atomic_dir(folder) as out:
        if is_peft:
            model.llm.save_pretrained(out / "llm", save_embedding_layers=False)  # the table is never trained
        if own_base:
            base = model.llm.get_base_model() if is_peft else model.llm
            base.save_pretrained(out / ("llm_base" if is_peft else "llm"), state_dict=base_state(model.llm))
        tokenizer.save_pretrained(out / "tokenizer")
        model.signal_encoder.save_pretrained(out / "signal_encoder")
        state = {k: v.detach().contiguous().cpu() for k, v in model.signal_to_hidden.state_dict().items()}
        save_file(
            {**state, "iq_tokens": model.iq_tokens.detach().cpu()}, out / "signal_to_hidden.safetensors"
        )
        content = {
            "llm": kind,
            "llm_model_path": str(Path(llm_path).resolve()),
            "llm_fingerprint": None if own_base else model.llm_fingerprint or fingerprint(model.llm),
            "dtype": str(model.llm.get_input_embeddings().weight.dtype).removeprefix("torch."),
            "load_in_4bit": in_4bit(model.llm),
            "projector": model.projector,
            "signal_tokens": model.signal_tokens,
            "legacy": model.legacy,
            **notes,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (out / "multimodal.json").write_text(text, encoding="utf-8")


def read_notes(folder) -> dict:
    path = Path(folder) / "multimodal.json"
    if not path.exists():
        raise UserError(f"{folder}: no multimodal.json; give the `model` folder that train.py wrote")
    return read_json(path, {"llm": str, "llm_model_path?": str, "signal?": dict, "lineage?": list})


def base_folder(folder, notes: dict, llm_model_path=None) -> Path:
    """Where the language model of a model folder lies: in it, at `llm_model_path`, or where it lay."""
    folder = Path(folder)
    own = folder / ("llm" if notes["llm"] == "full" else "llm_base")
    if notes["llm"] == "full" or own.exists():
        if llm_model_path and Path(llm_model_path).resolve() != Path(notes["llm_model_path"]).resolve():
            raise UserError(
                f"--llm-model-path has no effect: {folder} holds its own language model, which was trained; "
                "leave it out"
            )
        return own
    base = Path(llm_model_path or notes["llm_model_path"])
    if not base.exists():
        raise UserError(
            f"{folder} was trained on the LLM in {base}, which is not there; say where it is with "
            "--llm-model-path"
        )
    return base


def load_model(folder, llm_model_path=None, trust_remote_code=False, dtype=None):
    """What save_model wrote -> (MultiModalModel in eval mode, tokenizer).

    llm_model_path: where the base LLM is now, if it has moved. dtype: of the language model, instead of that
    in which it was trained.
    """
    folder, notes = Path(folder), read_notes(folder)
    base = base_folder(folder, notes, llm_model_path)
    tokenizer = common.llm.load_tokenizer(folder / "tokenizer", trust_remote_code)
    llm = load_llm(base, notes["dtype"], trust_remote_code, notes.get("load_in_4bit", False))
    own_base = base.parent.resolve() == folder.resolve()
    expected = notes.get("llm_fingerprint")
    if not own_base and expected and fingerprint(llm) != expected:
        raise UserError(
            f"{base} is another language model than the one that {folder} was trained on; say where that is "
            "with --llm-model-path"
        )
    encoder = make_encoder(read_config(folder / "signal_encoder"))
    load_encoder(encoder, folder / "signal_encoder", quiet=True)
    ids = tokenizer.convert_tokens_to_ids([IQ_START, IQ_END])
    model = MultiModalModel(
        llm, encoder, notes["projector"], *ids, signal_tokens=notes["signal_tokens"], legacy=notes["legacy"]
    )
    model.llm_changed, model.llm_fingerprint = own_base, expected
    if notes["llm"] == "adapter":
        model.llm = PeftModel.from_pretrained(model.llm, folder / "llm")
    tensors = load_file(folder / "signal_to_hidden.safetensors")
    model.iq_tokens.data.copy_(tensors.pop("iq_tokens"))
    model.signal_to_hidden.load_state_dict(tensors)
    if dtype:
        model.llm.to(getattr(torch, dtype))
    return model.eval(), tokenizer


def load_starter_kit(folder, llm_model_path, encoder_config: SiTMAEConfig, trust_remote_code=False):
    """A checkpoint folder of the starter kit -> (MultiModalModel with legacy=True, tokenizer).

    folder: adapter or LLM weights and tokenizer (save_pretrained), signal_to_hidden.pt, signal_encoder.pt.
    The projector kind is read from the keys. encoder_config: the sizes, which the starter kit does not save.
    """
    folder = Path(folder)
    projection = read_weights(folder / "signal_to_hidden.pt")
    kind = "merlin" if "norm.weight" in projection else "mlp" if "3.weight" in projection else "linear"
    tokenizer = load_tokenizer(folder, trust_remote_code)
    adapter = (folder / "adapter_config.json").exists()
    llm = load_llm(llm_model_path if adapter else folder, trust_remote_code=trust_remote_code)
    if len(tokenizer) > llm.get_input_embeddings().weight.shape[0]:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if adapter:
        llm = PeftModel.from_pretrained(llm, folder)
    encoder = make_encoder(encoder_config)
    load_encoder(encoder, folder / "signal_encoder.pt")
    model = MultiModalModel(
        llm, encoder, kind, *tokenizer.convert_tokens_to_ids([IQ_START, IQ_END]), legacy=True
    )
    load_weights(model.signal_to_hidden, projection, folder / "signal_to_hidden.pt", min_share=1.0)
    return model.eval(), tokenizer
