"""The language model and MyEmbedding together: losses, diagnosis, generation. Upstream:
src/Model/multimodality_model.py.

What differs from upstream: no device is named; a batch is generated together and with its attention mask; the
ViT runs once per report; frozen parts run without dropout; image tokens are found by name, not by an assumed
size of the vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from common.llm import load_llm as load_language_model  # noqa: F401  upstream's users look for it here
from dia_pangu.src.Model import pangu  # noqa: F401  registers model type PanguEmbedded
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding

LAMBDA_CTR = 4.0
# LoRA of the later Dia-Pangu; Dia-LLaMA has r 8 and alpha 32.
LORA = {"r": 4, "alpha": 16, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}

# What each stage trains, as parts of parameter names. `pre` is upstream's stage 1; `ft` is its LoRA stage,
# where the whole embedding layer trains as well. The word table and the unused group_cls_head never train;
# the evidence head is trained by studies/dia_pangu/pretrain_vit.py alone.
TRAINED = {"pre": ("embedding_layer.perceiver.",), "ft": ("lora_", "embedding_layer.")}
NEVER_TRAINED = ("embedding_layer.weight", "embed_tokens.", "group_cls_head.", "evidence_")


def label_count(labels: torch.Tensor) -> torch.Tensor:
    """Number of labels (B, N) that a loss is taken over: all but the first column, which nothing predicts,
    and the ignored -100."""
    return (labels[:, 1:] != -100).sum()


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss_reweight: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the cross entropy over the labels that are not -100, each at the position that predicts it.

    logits: (..., V), labels: (...). loss_reweight: (...) factors on the single losses; None: all 1.
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.sum() if loss_reweight is None else (losses * loss_reweight.flatten()).sum()


# What some architectures do to the logits behind the head; those models compute all of them.
SCALED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def answer_logits(lang_model, answered: torch.Tensor, **inputs) -> torch.Tensor:
    """Return the logits (M, V) at the M positions of `answered` (B, N - 1) bool, whose next token is a label.

    inputs: of the language model. The prompt's positions, most of a sample, get no logits: at openPangu's
    vocabulary that is a sixth of the memory.
    """
    base = lang_model.get_base_model() if hasattr(lang_model, "get_base_model") else lang_model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    scaled = any(getattr(base.config, name, None) for name in SCALED)
    if head is None or scaled or not hasattr(base, "get_decoder"):
        return lang_model(**inputs).logits[:, :-1][answered]
    return head(base.get_decoder()(**inputs).last_hidden_state[:, :-1][answered])


class MultiPanguForCausalLM(nn.Module):
    """Write reports about CT volumes with a language model that sees the volume as visual tokens.

    lang_model: any causal LM of transformers, bare or with LoRA. embedding_layer: MyEmbedding; its word table
    is replaced by the language model's (one tensor under two state-dict keys, as in published checkpoints).
    lambda_ctr: weight of the contrastive loss in the sum of the losses.
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
        """Train the parameters whose names contain one of `patterns`, freeze the rest; return their names."""
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
        """Switch to training mode, but keep frozen parts in eval mode: no dropout in a ViT that does not
        learn.

        A frozen layer with gradient checkpointing says that it trains, because transformers would not
        checkpoint it otherwise; the parts of that layer stay in eval mode.
        """
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        for module in self.modules():
            if mode and getattr(module, "gradient_checkpointing", False):
                module.training = True
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
        all_logits=None,
    ) -> dict:
        """Compute the losses and the diagnosis of one batch.

        lang_x, attention_mask, labels: (B, N) token ids, 1 for real tokens, next-token targets with -100 =
        ignored. vision_x: (B, S, 3, H, W, D) in [0, 1], or tokens: (B, S, n_tok, vis_dim) from `encode`.
        cls_labels: (B, 14), 1 = present. loss_reweight: (B, N) weights of the labels' losses, which upstream
        accepts and ignores. key_words_query is accepted and unused, as upstream.

        all_logits: whether the logits of all positions are computed, as upstream does; None: in eval mode
        alone. num_tokens, num_samples: what the sums of the two losses are divided by, instead of this
        batch's numbers of labels and of samples.

        Returns lm_loss, the mean over the labels of this batch; ctr_loss, the mean over its samples; loss =
        lm_loss + lambda_ctr * ctr_loss; logits (B, N, V), or (M, V) at the M positions that predict a
        label (see `answer_logits`); and probability (B, 14) as `diagnose` gives it, so that an evaluation
        needs nothing but this forward pass, also of a sharded model.
        """
        tokens = self.encode(vision_x) if tokens is None else tokens
        embeds, sim = self.embedding_layer(None, cls_labels, lang_x, mode="train", tokens=tokens)
        embeds = embeds.to(self.lang_model.dtype)
        inputs = {"inputs_embeds": embeds, "attention_mask": attention_mask}
        # Each position predicts the next token.
        targets, weights = labels[:, 1:], None if loss_reweight is None else loss_reweight[:, 1:]
        if all_logits is None:
            all_logits = not self.training
        if all_logits:
            logits = self.lang_model(**inputs).logits
            lm_loss = token_loss(logits[:, :-1], targets, weights)
        else:
            answered = targets != -100
            logits = answer_logits(self.lang_model, answered, **inputs)
            lm_loss = token_loss(logits, targets[answered], None if weights is None else weights[answered])
        lm_loss = lm_loss / (num_tokens or label_count(labels).clamp(min=1))
        ctr_loss = F.cross_entropy(sim.float(), sim.new_zeros(len(sim), dtype=torch.long))
        if num_samples:
            ctr_loss = ctr_loss * len(lang_x) / num_samples
        return {
            "loss": lm_loss + self.lambda_ctr * ctr_loss,
            "lm_loss": lm_loss,
            "ctr_loss": ctr_loss,
            "logits": logits,
            "probability": self.diagnose(tokens),
        }

    def encode(self, vision_x: torch.Tensor) -> torch.Tensor:
        """Turn volumes into patch tokens (B, S, n_tok, vis_dim), which the methods below take."""
        return self.embedding_layer.encode(vision_x)

    @torch.no_grad()
    def diagnose(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of the 14 findings, (B, 14). At threshold 0.5 without an evidence head this
        is upstream's choice of the more similar memory, where a tie counts as present."""
        return self.embedding_layer.probability(tokens)

    @torch.no_grad()
    def generate(self, lang_x, attention_mask, tokens, **generation) -> torch.Tensor:
        """Return the new token ids (B, M) after the left-padded prompts lang_x (B, N).

        attention_mask: (B, N), 0 for padding. generation: keyword arguments of transformers' `generate`.
        """
        embeds = self.embedding_layer(text_input=lang_x, tokens=tokens)
        return self.lang_model.generate(
            inputs_embeds=embeds.to(self.lang_model.dtype), attention_mask=attention_mask, **generation
        )
