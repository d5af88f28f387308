"""The vision encoder, the disease prototypes and memories, and the embedding table that mixes words with
volumes.

Upstream: src/Model/my_embedding_layer.py (Dia-LLaMA, arXiv 2403.16386), with the same state-dict keys.
Differences: rows are looked up where upstream multiplies a one-hot matrix with a copy of the table, the
features of the findings come from one matrix product, and several volumes per sample are averaged.
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from dia_pangu.src.Model.helpers import PerceiverResampler
from dia_pangu.src.Model.vit_3d import ViT

NUM_FINDINGS = 14


def lookup(weight: torch.Tensor, extra: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Look up rows of [weight; extra[b]] for ids (B, N): weight (V, E) is shared, extra (B, M, E) belongs to
    sample b.

    Bit-equal to one_hot(ids) @ table, without the (N, V) matrix. Raises ValueError for an id beyond V + M.
    """
    vocabulary = weight.shape[0]
    outside = ids - vocabulary
    if bool((outside >= extra.shape[1]).any()):
        raise ValueError(
            f"text_input: id {int(ids.max())} has no row; the table holds {vocabulary} words and "
            f"{extra.shape[1]} image rows (2 + perceiver_num per volume)"
        )
    words = F.embedding(ids.clamp(max=vocabulary - 1), weight)
    index = outside.clamp(min=0)[..., None].expand(-1, -1, extra.shape[2])
    return torch.where((outside >= 0)[..., None], extra.gather(1, index), words)


class MyEmbedding(nn.Module):
    """Embed a prompt that mentions CT volumes, and compare the volumes with disease prototypes.

    num_embeddings, embedding_dim: size V x E of the word table, replaced by the language model's own
    Parameter. perceiver_num: visual tokens per volume. vis_dim: ViT width. n_tok: patch tokens of one volume,
    which the prototypes fix: with the defaults 256 x 256 x 64 voxels. mem: width of the memory vectors. vit
    and perceiver: overrides of the published sizes, keywords of ViT and PerceiverResampler. min_temp: the
    learned temperature is used no smaller than this; None leaves it free to reach 0 or change its sign, as
    upstream. evidence_head: add a linear head that says which findings each patch shows, and a logistic vote
    of prototypes and patches (studies/dia_pangu/pretrain_vit.py trains both; published checkpoints have
    neither).
    """

    def __init__(
        self,
        num_embeddings: int = 153376,
        embedding_dim: int = 4096,
        perceiver_num: int = 32,
        vis_dim: int = 768,
        patch_size: int = 32,
        frame_patch_size: int = 4,
        n_tok: int = 1024,
        mem: int | None = None,
        vit: dict | None = None,
        perceiver: dict | None = None,
        min_temp: float | None = 0.01,
        evidence_head: bool = False,
    ):
        super().__init__()
        mem = mem or vis_dim
        self.min_temp = min_temp
        self.n_tok, self.perceiver_num = n_tok, perceiver_num
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))
        self.figure_token_weight = nn.Parameter(torch.randn(2, embedding_dim))  # <image> and </image>
        self.prototype = nn.Parameter(torch.randn(NUM_FINDINGS, n_tok))
        # Never used, never trained, present in every published checkpoint.
        self.group_cls_head = nn.ModuleList(
            nn.Linear(vis_dim, 2) for _ in range(NUM_FINDINGS)
        ).requires_grad_(False)
        self.proj = nn.Linear(vis_dim, mem)
        self.pos_sample_memory = nn.Parameter(torch.randn(NUM_FINDINGS, 1, mem))
        self.neg_sample_memory = nn.Parameter(torch.randn(NUM_FINDINGS, 1, mem))
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.vision_encoder = ViT(
            **{
                "image_size": 512,
                "frames": 512,
                "image_patch_size": patch_size,
                "frame_patch_size": frame_patch_size,
                "dim": vis_dim,
                "depth": 12,
                "heads": 8,
                "mlp_dim": 2048,
                "dropout": 0.1,
                "emb_dropout": 0.1,
                **(vit or {}),
            }
        )
        self.perceiver = PerceiverResampler(
            **{"dim": vis_dim, "num_latents": perceiver_num, **(perceiver or {})}
        )
        self.fc = nn.Linear(vis_dim, embedding_dim)
        self.evidence_head = None
        if evidence_head:
            self.evidence_head = nn.Linear(vis_dim, NUM_FINDINGS)
            self.evidence_vote = nn.Linear(2 * NUM_FINDINGS, NUM_FINDINGS)
            nn.init.eye_(self.evidence_vote.weight)  # until it is fitted, the prototypes decide alone
            nn.init.zeros_(self.evidence_vote.bias)

    def encode(self, vision_x: torch.Tensor) -> torch.Tensor:
        """Turn volumes (B, S, 3, H, W, D) in [0, 1] into patch tokens (B, S, n_tok, vis_dim)."""
        if vision_x.ndim != 6:
            raise ValueError(
                f"vision_x: shape {tuple(vision_x.shape)}, expected (batch, volumes, 3, H, W, D)"
            )
        h, w, d = self.vision_encoder.grid(vision_x.shape)
        if h * w * d != self.n_tok:
            raise ValueError(
                f"vision_x: {h}x{w}x{d} = {h * w * d} patches, but the prototypes are made for "
                f"{self.n_tok}; resize the volume to the trained size"
            )
        tokens, _ = self.vision_encoder(vision_x.flatten(0, 1))
        return rearrange(tokens, "(b s) v d -> b s v d", b=vision_x.shape[0])

    def finding_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool tokens (B, S, n_tok, vis_dim) by each prototype and average the volumes: (B, 14, vis_dim)."""
        return (self.prototype.softmax(-1) @ tokens).mean(1)

    def similarity(self, tokens: torch.Tensor, upstream_cls: bool = False) -> torch.Tensor:
        """Return the cosine of every finding's feature with its positive and its negative memory, (B, 14, 2).

        upstream_cls: compute what upstream's `cls` mode does. It sums the weighted tokens over the findings
        where its training mode sums over the tokens, so that finding c is read from patch token c alone; its
        published diagnoses (micro-F1 about 0.29) come from that. The default reads what the contrastive loss
        has trained.
        """
        features = self.finding_features(tokens)
        if upstream_cls:
            features = (tokens * self.prototype.softmax(-1).sum(0)[:, None])[:, 0, :NUM_FINDINGS]
        z = F.normalize(self.proj(features), dim=-1)
        memory = F.normalize(
            torch.cat((self.pos_sample_memory, self.neg_sample_memory), dim=1), dim=-1
        )  # (14, 2, mem)
        return torch.einsum("bcd,ckd->bck", z, memory)

    def own_similarity(self, tokens: torch.Tensor, cls_labels: torch.Tensor) -> torch.Tensor:
        """Return the similarities divided by the temperature (B * 14, 2), to the memory of the finding's own
        sign first; the contrastive loss is their cross entropy with target 0."""
        sim = self.similarity(tokens)
        own_first = torch.where(cls_labels.bool()[..., None], sim, sim.flip(-1))
        return (own_first / self.temperature()).flatten(0, 1)

    def temperature(self) -> torch.Tensor:
        """Return the learned temperature, no smaller than `min_temp`."""
        return self.temp if self.min_temp is None else self.temp.clamp(min=self.min_temp)

    def probability(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of the findings, (B, 14).

        It is the positive memory's part in the softmax that the contrastive loss trains, that is the sigmoid
        of `prototype_logits`; with an evidence head it is the logistic vote of prototypes and patches.
        """
        if self.evidence_head is None:
            return (self.similarity(tokens) / self.temperature()).softmax(-1)[..., 0]
        return self.evidence_vote(self.vote_inputs(tokens)).sigmoid()

    def prototype_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log odds of every finding by its prototype and its two memories, (B, 14)."""
        sim = self.similarity(tokens) / self.temperature()
        return sim[..., 0] - sim[..., 1]

    def patch_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log odds of every finding in the patch that shows it most clearly, (B, 14)."""
        return self.evidence_head(tokens).amax((1, 2))

    def vote_inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the inputs of the vote, (B, 28): the log odds by the prototypes, then by the patches."""
        return torch.cat((self.prototype_logits(tokens), self.patch_logits(tokens)), dim=-1)

    def visual_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Resample (B, S, n_tok, vis_dim) to visual tokens (B, S * perceiver_num, embedding_dim)."""
        return self.fc(self.perceiver(tokens[:, :, None])).flatten(1, 2)

    def forward(
        self, vision_x=None, cls_labels=None, text_input=None, key_words_query=None, mode=None, tokens=None
    ):
        """Embed a prompt, compare a volume with the prototypes, or both, as `mode` says.

        vision_x: (B, S, 3, H, W, D), or tokens: (B, S, n_tok, vis_dim) from `encode`, which saves the second
        ViT pass. text_input: (B, N) ids; V and V+1 are <image> and </image>, V+2+j is visual token j.
        cls_labels: (B, 14), 1 = present. mode "cls": return similarities (B, 14, 2); "cls_upstream": see
        `similarity`. mode "train": return embeddings (B, N, E) and `own_similarity`. mode None: return
        embeddings. key_words_query is accepted and unused, as upstream.
        """
        if tokens is None:
            tokens = self.encode(vision_x)
        if mode in ("cls", "cls_upstream"):
            return self.similarity(tokens, upstream_cls=mode == "cls_upstream")
        visual = self.visual_tokens(tokens)
        extra = torch.cat((self.figure_token_weight.expand(len(visual), -1, -1), visual), dim=1)
        embeds = lookup(self.weight, extra.to(self.weight.dtype), text_input)
        if mode != "train":
            return embeds
        return embeds, self.own_similarity(tokens, cls_labels)
