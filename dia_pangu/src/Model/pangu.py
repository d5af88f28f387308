"""openPangu-Embedded under its own names, without remote code.

Its blocks are Llama's with a bias on q, k, v and o: the same state dict gives bit-equal logits under
LlamaForCausalLM with attention_bias=True. Importing this file registers the model type `PanguEmbedded`, so
that AutoModelForCausalLM loads the published folder. The tokenizer is the folder's own sentencepiece model,
run by sentencepiece itself.
"""

from pathlib import Path

import sentencepiece
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from common.errors import UserError
from common.files import read_json, reading


class PanguEmbeddedConfig(LlamaConfig):
    model_type = "PanguEmbedded"
    attribute_map = {"bias": "attention_bias"}


class PanguEmbeddedForCausalLM(LlamaForCausalLM):
    config_class = PanguEmbeddedConfig
    # The published index lists these although they are no weights.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]


AutoConfig.register("PanguEmbedded", PanguEmbeddedConfig, exist_ok=True)
AutoModelForCausalLM.register(PanguEmbeddedConfig, PanguEmbeddedForCausalLM, exist_ok=True)


class PanguTokenizer(SentencePieceBackend):
    """openPangu's `tokenizer.model`: bos before every text, no eos, spaces as the pieces have them."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        add_bos_token=True,
        add_eos_token=False,
        **kwargs,
    ):
        kwargs.pop("legacy", None)
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            legacy=True,
            special_tokens_pattern="none",
            **kwargs,
        )

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        body = list(token_ids_0) + list(token_ids_1 or [])
        return [self.bos_token_id] * self.add_bos_token + body + [self.eos_token_id] * self.add_eos_token

    def convert_tokens_to_string(self, tokens):
        """Join pieces to text; sentencepiece joins byte pieces such as <0xE8> to characters."""
        text, pieces = "", []
        for token in tokens:
            if token in self.all_special_tokens:
                text, pieces = text + self.sp_model.decode(pieces) + token, []
            else:
                pieces.append(token)
        return text + self.sp_model.decode(pieces)


def load_tokenizer(folder, trust_remote_code: bool = False):
    """Load the tokenizer of a language-model folder; that of a Pangu folder needs no remote code."""
    folder = Path(folder)
    settings_file = folder / "tokenizer_config.json"
    if not settings_file.is_file():
        raise UserError(
            f"{folder}: no tokenizer_config.json; give --tokenizer-path the folder of the tokenizer"
        )
    settings = read_json(settings_file, {"tokenizer_class?": str})
    if settings.get("tokenizer_class") != "PanguTokenizer" or trust_remote_code:
        with reading(folder, "tokenizer"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder / 'tokenizer.model'}: not a sentencepiece model ({str(error).splitlines()[0]}); "
            "download it again, a Git LFS pointer is not enough"
        ) from error
    return PanguTokenizer.from_pretrained(folder)
