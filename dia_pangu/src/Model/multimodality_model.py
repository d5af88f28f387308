"""Language model + MyEmbedding: loss, diagnosis and report generation. Upstream: src/Model/multimodality_model.py.

Upstream defects left behind: device names, generation of one sample only and without attention mask, two ViT passes
per report, frozen parts that run with dropout, image tokens found by an assumed vocabulary size.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from common.files import reading
from dia_pangu.src.Model import pangu  # noqa: F401  registers model type PanguEmbedded
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding

LAMBDA_CTR = 4.0

# What each stage trains, as parts of parameter names. `pre` is upstream's stage 1; `ft` its LoRA stage, where the whole
# embedding layer trains as well. The word table and the unused group_cls_head never train, the evidence head only in
# pretrain_vit.py.
TRAINED = {"pre": ("embedding_layer.perceiver.",), "ft": ("lora_", "embedding_layer.")}
NEVER_TRAINED = ("embedding_layer.weight", "embed_tokens.", "group_cls_head.", "evidence_")


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss_reweight: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed cross entropy of the next labels (B, N) that are not -100, each times its weight (B, N) where weights are given."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return losses.sum() if loss_reweight is None else (losses * loss_reweight[:, 1:].flatten()).sum()


class MultiPanguForCausalLM(nn.Module):
    """Reports from CT volumes.

    lang_model: any causal LM of transformers, bare or with LoRA. embedding_layer: MyEmbedding; its word table is replaced
    by the language model's (one tensor under two state-dict keys, as in published checkpoints).
    """

    def __init__(self, lang_model: nn.Module, embedding_layer: MyEmbedding, lambda_ctr: float = LAMBDA_CTR):
        super().__init__()
        table = lang_model.get_input_embeddings().weight
        if table.shape != embedding_layer.weight.shape:
            raise ValueError(
                f"word table: the language model has {tuple(table.shape)}, the embedding layer "
                f"{tuple(embedding_layer.weight.shape)}"
            )
        self.lang_model = lang_model
        self.embedding_layer = embedding_layer
        self.embedding_layer.weight = table
        self.lambda_ctr = lambda_ctr
        self._no_split_modules = getattr(
            lang_model, "_no_split_modules", None
        )  # what FSDP2 shards as one piece

    def set_trained(self, patterns, never=NEVER_TRAINED) -> list[str]:
        """Train the parameters whose names contain one of `patterns`, freeze the rest; returns the trained names."""
        names = []
        for name, parameter in self.named_parameters():
            trained = any(p in name for p in patterns) and not any(p in name for p in never)
            parameter.requires_grad_(trained)
            if trained:
                names.append(name)
        if not names:
            raise UserError(
                f"--train {' '.join(patterns)}: no parameter has such a name; names look like "
                "embedding_layer.perceiver.latents"
            )
        return names

    def train(self, mode: bool = True):
        """Frozen parts stay in eval mode: no dropout in a ViT that does not learn."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def forward(
        self,
        lang_x,
        vision_x=None,
        cls_labels=None,
        attention_mask=None,
        labels=None,
        loss_reweight=None,
        key_words_query=None,
        tokens=None,
        num_tokens=None,
        num_samples=None,
    ) -> dict:
        """lang_x, attention_mask, labels: (B, N); vision_x: (B, S, 3, H, W, D) or tokens from `encode`; cls_labels: (B, 14).

        Returns loss = lm_loss + lambda_ctr * ctr_loss, both parts, logits (B, N, V), and the findings' probability (B, 14) as
        `diagnose` gives it (so that evaluation needs nothing but this forward, sharded or not). The losses are means over this
        batch; num_tokens and num_samples, counted over a larger global batch, turn them into this batch's share of
        its mean, so that accumulation and several processes give the loss of one large batch. loss_reweight: (B, N) weights
        of the labels' losses, which upstream accepts and ignores; key_words_query is accepted and unused, as upstream.
        """
        tokens = self.encode(vision_x) if tokens is None else tokens
        embeds, sim = self.embedding_layer(None, cls_labels, lang_x, mode="train", tokens=tokens)
        logits = self.lang_model(
            inputs_embeds=embeds.to(self.lang_model.dtype), attention_mask=attention_mask
        ).logits
        targets = labels[:, 1:].flatten()
        lm_sum = token_loss(logits, labels, loss_reweight)
        lm_loss = lm_sum / ((targets != -100).sum() if num_tokens is None else num_tokens)
        ctr_loss = F.cross_entropy(sim.float(), sim.new_zeros(len(sim), dtype=torch.long))
        if num_samples is not None:
            ctr_loss = ctr_loss * len(lang_x) / num_samples
        return {
            "loss": lm_loss + self.lambda_ctr * ctr_loss,
            "lm_loss": lm_loss,
            "ctr_loss": ctr_loss,
            "logits": logits,
            "probability": self.diagnose(tokens),
        }

    def encode(self, vision_x: torch.Tensor) -> torch.Tensor:
        """Patch tokens (B, S, n_tok, vis_dim); compute them once and pass them to `diagnose`, `generate` or forward."""
        return self.embedding_layer.encode(vision_x)

    @torch.no_grad()
    def diagnose(self, tokens: torch.Tensor) -> torch.Tensor:
        """Probability of the 14 findings (B, 14). At threshold 0.5 this is upstream's similarity vote, ties present."""
        return self.embedding_layer.probability(tokens)

    @torch.no_grad()
    def generate(self, lang_x, attention_mask, tokens, **generation) -> torch.Tensor:
        """New token ids (B, M) after the left-padded prompts lang_x (B, N); keywords as in transformers' generate."""
        embeds = self.embedding_layer(text_input=lang_x, tokens=tokens)
        return self.lang_model.generate(
            inputs_embeds=embeds.to(self.lang_model.dtype), attention_mask=attention_mask, **generation
        )


def load_language_model(folder, trust_remote_code: bool = False, dtype="auto", attn: str = "sdpa"):
    """A causal LM from a local folder: openPangu by its registered alias, Llama-2 and every other class by its own."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json; --lang-encoder-path takes the folder of the language model"
        )
    with reading(folder, "language model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=attn, trust_remote_code=trust_remote_code
        )


def add_lora(lang_model, r: int = 4, alpha: int = 16, dropout: float = 0.1, targets=("q_proj", "v_proj")):
    """LoRA as the later Dia-Pangu has it (Dia-LLaMA: r 8, alpha 32)."""
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lang_model, config)
