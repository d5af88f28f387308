"""Small language models and tokenizers, built locally, for the built-in runs and the tests. Nothing is
downloaded."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from common.checkpoint import atomic_dir

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


def make_tokenizer(texts, vocab_size: int = 512, special_tokens=()) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts` (iterable of str, any language: no character is unknown).

    It has <s>, </s>, <pad>, the chat markers of `CHAT_TEMPLATE` and `special_tokens`. vocab_size is at least
    256 bytes plus the special tokens. Deterministic for equal texts.
    """
    named = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", *special_tokens]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=named,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=named[3:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_llm(folder, tokenizer, model_type: str = "llama", seed: int = 0, **config):
    """Write a randomly initialised causal LM and its tokenizer to `folder`, as `from_pretrained` reads them.

    model_type: any decoder of transformers ("llama", "qwen2", "qwen3", ...). config: overrides of `TINY`.
    Returns the model, float32, in eval mode.
    """
    ids = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {**TINY, "vocab_size": len(tokenizer), **ids, **config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return model.eval()
