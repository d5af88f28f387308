"""What every frozen base shares: load it, build its inputs, run it once, keep attention rows and hidden
states.

A new base is a subclass with a few short answers (see the README for a worked example):
    build_inputs  the model inputs of a batch, where they are more than pixels and positions
    image_tokens  how many tokens one picture becomes
    image_ids     those tokens and the separators between them, if there are any
    grid          the shape of its attention map
    to_grid       attention over the image columns -> maps (n, channels, gh, gw)
    unpad         whether the padded border must be cut from the mask
`python flmm/check_base.py` says whether they are right.
The base never trains: no gradient, always in eval mode, not a parameter of anything that is saved.
"""

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoTokenizer
from transformers.image_processing_base import ImageProcessingMixin

from common.errors import UserError
from common.files import reading
from flmm.data.text import encode_parts
from flmm.data.transforms import CLIP_MEAN, CLIP_STD
from flmm.models.attention_rows import NAME, AttentionRows, merge_rows

TEMPLATES = {  # INSTRUCTION only: upstream never adds the system text, nor a newline before the answer
    "vicuna": "USER: {input} ASSISTANT:",
    "mistral": "[INST] {input} [/INST]",
    # Mistral's later tokenizers; their own chat template writes today's date into a system text
    "mistral_v7": "[INST]{input}[/INST]",
    "deepseek": "User: {input}\n\nAssistant:",
    "internlm2": "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<start_of_turn>user\n{input}<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{input}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    # the chat template of Qwen2.5-VL with one user turn
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "plain": "{input}",
}
CHAT = "chat"  # the template that the tokenizer itself carries
QUESTION = "Please give me a description of the image."
IMPLEMENTATIONS = {"rows": NAME, "eager": "eager"}  # how attention is read, as transformers calls it


def positions(attention_mask):
    """Position of every token counted from the first real one (B, S): left padding must not shift the rotary
    phase."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def given(preprocessing, *names):
    """What a preprocessor_config.json says about some of its values; null is as good as nothing."""
    return {name: preprocessing[name] for name in names if preprocessing.get(name) is not None}


def mean_and_std(preprocessing, mean=CLIP_MEAN, std=CLIP_STD):
    """What pixels are normalised with, stated or the family's published values."""
    return preprocessing.get("image_mean") or mean, preprocessing.get("image_std") or std


def log_probs(logits, ids, rows):
    """log p (R,) float32 of the tokens `rows` of ids (S,), whose logits (S + 1, V) begin a token earlier."""
    logits = logits[rows.to(logits.device)].float().log_softmax(-1)
    return logits.gather(1, ids[rows].to(logits.device)[:, None])[:, 0].to(ids.device)


def pictures_of(sample):
    """The processor's outputs of all pictures of a sample, in their order."""
    return sample.get("pictures", [sample])


class FrozenBase:
    """A multimodal LLM that is read, never changed.

    model: the transformers class named by `architecture`. merge: "mean" or "max" over the rows of a phrase.
    attention: "rows" (SDPA plus the rows needed) or "eager" (full matrices, for exact comparison with
    upstream). lead: words before a phrase that is asked alone, without which it could not stand where it does
    in the captions that the base has learned.
    """

    architecture = None  # transformers class
    image_text = None  # how one picture is written in the prompt; exactly one image token in it
    chat_image = None  # what the tokenizer's chat template writes for a picture, if that is not image_text
    template = None  # key of TEMPLATES, or CHAT
    maps_per_head = 1  # channels = layers * heads * maps_per_head
    unpad = True

    def __init__(
        self,
        model,
        tokenizer=None,
        image_processor=None,
        merge="mean",
        attention="rows",
        template=None,
        question=QUESTION,
        lead="",
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.template, self.question, self.lead = template or self.template, question, lead
        self.merge = merge
        for name, value, known in (
            ("template", self.template, (*TEMPLATES, CHAT)),
            ("merge", merge, ("mean", "max")),
            ("attention", attention, IMPLEMENTATIONS),
        ):
            if value not in known:
                raise UserError(f"base.{name} is {value!r}, expected one of {', '.join(known)}")
        self.image_token_id = model.config.image_token_id
        text = model.config.get_text_config()
        self.num_layers, self.hidden_size = text.num_hidden_layers, text.hidden_size
        self.channels = self.num_layers * text.num_attention_heads * self.maps_per_head
        self.read_attention(attention)

    def read_attention(self, attention):
        """Read attention from now on by "rows" or "eager"."""
        self.attention, text = attention, IMPLEMENTATIONS[attention]
        self.model.set_attn_implementation({"text_config": text, "vision_config": "sdpa"})

    # ---- loading

    @classmethod
    def load(cls, path, dtype="auto", random_seed=None, load_in_4bit=False, device_map=None, **options):
        """Base, tokenizer and image processor from a folder or hub name; code that lies there is never run.

        random_seed: random weights instead, the control. dtype, load_in_4bit, device_map: as from_pretrained
        takes them.
        """
        architecture = getattr(transformers, cls.architecture, None)
        if architecture is None:
            version = transformers.__version__
            raise UserError(f"transformers {version} has no {cls.architecture}; install a newer one")
        with reading(path, "folder of the base model"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            held = (config.architectures or [cls.architecture])[0]
            if held != cls.architecture:
                raise UserError(f"{path}: holds a {held}, this configuration needs a {cls.architecture}")
            if random_seed is not None:
                torch.manual_seed(random_seed)
                model = architecture._from_config(config)
            else:
                extra = {}
                if load_in_4bit:
                    extra["quantization_config"] = transformers.BitsAndBytesConfig(
                        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16
                    )
                model = architecture.from_pretrained(path, dtype=dtype, device_map=device_map, **extra)
        try:
            preprocessing, _ = ImageProcessingMixin.get_image_processor_dict(path)
        except OSError:
            preprocessing = {}  # the family's published defaults
        return cls(model, tokenizer, cls.make_processor(model.config, preprocessing), **options)

    @staticmethod
    def make_processor(config, preprocessing):
        """Image processor of the family. preprocessing: the content of preprocessor_config.json, may be
        empty."""
        raise NotImplementedError

    def to(self, device):
        if not self.placed:
            self.model.to(device)
        return self

    @property
    def placed(self) -> bool:
        """Whether from_pretrained has put the weights where they must stay: in 4 bits, or on many devices."""
        names = ("hf_device_map", "hf_quantizer")
        return any(getattr(self.model, name, None) is not None for name in names)

    def shard(self, device):
        """Keep only this process's part of each decoder layer (FSDP2); a layer is gathered while it runs.

        Call it before `to`, in every process; from then on all of them must run the same number of forward
        passes.
        """
        if self.placed:
            raise UserError(
                "--shard-base: a base in 4-bit or spread by device_map cannot be sharded too; choose one of "
                "them"
            )
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in self.decoder.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        return self

    @property
    def values_here(self) -> int:
        """Parameters that this process holds: all of them, or its parts of the sharded ones."""
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in self.model.parameters())

    @property
    def decoder(self):
        """The text model inside the base, with its `layers` and its final `norm`, whatever it is called."""
        decoder = self.model.get_decoder()
        if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
            raise UserError(
                f"{type(self.model).__name__}: its text model {type(decoder).__name__} has no layers and "
                "norm; hidden states cannot be read from it"
            )
        return decoder

    @property
    def dims(self):
        """What a head must fit: attention channels, layers, hidden size."""
        return self.channels, self.num_layers, self.hidden_size

    @property
    def device(self):
        return self.model.get_input_embeddings().weight.device

    # ---- inputs

    def encode_prompt(self, text=None, history=()):
        """Token ids of the instruction with one image token for each picture.

        text: the user's words, default the training question; a list of them has a picture before each.
        history: [(question, answer)] of earlier turns; the pictures come before the first question.
        """
        texts = [self.question] if text is None else [text] if isinstance(text, str) else list(text)
        said = [words for turn in history for words in turn] + texts[-1:]  # questions and answers by turns
        template, options = self.template_parts(1 + len(history))
        parts = [(template[0], False)]
        for words in [*texts[:-1], said[0]]:
            parts += [(self.image_text, False), (words, True)]
        for between, words in zip(template[1:], said[1:]):
            parts += [(between, False), (words, True)]
        ids = encode_parts(self.tokenizer, [*parts, (template[-1], False)], **options)
        if ids.count(self.image_token_id) < 1:
            token = f"{self.image_text!r} (id {self.image_token_id})"
            raise UserError(f"the tokenizer does not know the image token of {token}")
        return ids

    def template_parts(self, rounds=1):
        """The texts before, between and after the words of `rounds` questions with the answers between them,
        and how they are tokenised.

        They are of one of TEMPLATES, or with "chat" what the tokenizer's own template makes of such turns;
        that one writes the special tokens around it itself.
        """
        if self.template != CHAT:
            before, after = TEMPLATES[self.template].split("{input}")
            again = (self.tokenizer.eos_token or "") + before
            return [before, *[after, again] * (rounds - 1), after], {}
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                "base.template is 'chat', but the tokenizer has no chat template; choose one of "
                f"{', '.join(TEMPLATES)}"
            )
        mark, image = "<<<words>>>", self.chat_image or self.image_text
        picture, words = {"type": "image"}, {"type": "text", "text": mark}
        for content in ([picture, words], [words], mark):  # templates take parts, or text alone
            later = mark if content == mark else [words]
            turns = [{"role": "user", "content": content}]
            for _ in range(rounds - 1):
                turns += [{"role": "assistant", "content": later}, {"role": "user", "content": later}]
            try:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except (TypeError, ValueError, TemplateError):
                continue
            # a template that does not know parts writes their dictionaries, or leaves words out
            parts, pictured = text.split(mark), content == [picture, words]
            if len(parts) != 2 * rounds or "'type'" in text or pictured and not parts[0].endswith(image):
                continue
            if pictured:
                parts[0] = parts[0].removesuffix(image)
            return parts, {"add_special_tokens": False}
        raise UserError(
            "the tokenizer's chat template does not give back the user's words; set base.template"
        )

    def image_tokens(self, sample):
        """Number of image tokens that the picture of `sample` becomes."""
        gh, gw = self.grid(sample)
        return gh * gw

    def grid(self, sample):
        """(rows, columns) of the attention map."""
        raise NotImplementedError

    def build_inputs(self, samples, input_ids, attention_mask):
        """Model inputs besides the ids: input_ids and attention_mask are (B, S), expanded and left-padded."""
        return {"pixel_values": self.pixels(samples), "position_ids": positions(attention_mask)}

    def pixels(self, samples, name="pixel_values"):
        """The pixels of several pictures as the model takes them; where one has fewer tiles, rows or columns
        than another, zeros stand behind them."""
        parts = [sample[name] for sample in samples]
        sides = [max(lengths) for lengths in zip(*(part.shape for part in parts))]
        padded = parts[0].new_zeros(len(parts), *sides)
        for whole, part in zip(padded, parts):
            whole[tuple(slice(length) for length in part.shape)] = part
        return padded.to(self.device, self.model.dtype)

    def image_ids(self, sample):
        """The ids that one image token becomes: the picture's features, and separators between its parts."""
        return [self.image_token_id] * self.image_tokens(sample)

    def expand(self, ids, sample, values=None, fill=None):
        """One image token of each picture -> as many as it has features, with the separators between its
        parts.

        ids (S,) holds one image token for each of sample["pictures"], which are outputs of the processor; by
        default the sample is its only picture. values (S,): mask_ids (fill -1) or labels (fill -100) to widen
        in step, default ids.
        """
        spans = [self.image_ids(picture) for picture in pictures_of(sample)]
        values = ids if values is None else values
        at = (ids == self.image_token_id).nonzero().flatten().tolist()
        tokens = [span.count(self.image_token_id) for span in spans]
        if len(at) == sum(tokens) and self.holds_spans(ids, at, spans, tokens):
            return values
        if len(at) != len(spans):
            raise ValueError(f"input_ids hold {len(at)} image tokens, expected {len(spans)} or {sum(tokens)}")
        pieces, last = [], 0
        for position, span in zip(at, spans):
            inner = ids.new_tensor(span) if values is ids else values.new_full((len(span),), fill)
            pieces, last = [*pieces, values[last:position], inner], position + 1
        return torch.cat([*pieces, values[last:]])

    def holds_spans(self, ids, at, spans, tokens):
        """Whether ids are expanded already: around the image tokens `at` stand the spans of the pictures."""
        first = 0
        for span, count in zip(spans, tokens):
            start = max(0, at[first] - span.index(self.image_token_id))
            if ids[start : start + len(span)].tolist() != span:
                return False
            first += count
        return True

    def to_grid(self, maps, grid):
        """One (H, n, N) tensor per layer, N image columns -> (n, channels, gh, gw); channel = layer * H +
        head."""
        return torch.cat([m.unflatten(-1, grid) for m in maps]).transpose(0, 1)

    def batch(self, samples):
        """Model inputs of several samples, left-padded, and by how many tokens each was shifted."""
        ids = [self.expand(s["input_ids"], s) for s in samples]
        length = max(len(i) for i in ids)
        shifts = [length - len(i) for i in ids]
        # nothing looks at the padding, so any word will do; a configuration's own may be none or the image's
        padded = [F.pad(i, (k, 0), value=int(i[-1])) for i, k in zip(ids, shifts)]
        tokens = {
            "input_ids": torch.stack(padded).to(self.device),
            "attention_mask": torch.stack([torch.arange(length) >= k for k in shifts]).long().to(self.device),
        }
        pictures = [picture for sample in samples for picture in pictures_of(sample)]
        return {**tokens, "use_cache": False, **self.build_inputs(pictures, *tokens.values())}, shifts

    # ---- the one forward pass

    @torch.no_grad()
    def __call__(self, samples, likelihood=False):
        """Run the base on a list of samples and keep what the heads need.

        A sample has input_ids (S,), mask_ids (S,) (-1 = no phrase, k = token of phrase k) and the processor's
        output; of several `pictures` the phrases are looked for in that of number `look`, which the sample
        itself holds.

        Returns per sample {"mask_attentions" (n, channels, gh, gw) float32, "hidden_states" (L, R, d): the
        phrase rows of the last L entries of the hidden-state tuple (after the final norm at the end),
        "mask_ids" (R,)}; likelihood adds "log_probs" (R,), log p of each phrase token after all before it.
        """
        inputs, shifts = self.batch(samples)
        ids = [row[k:] for row, k in zip(inputs["input_ids"].cpu(), shifts)]
        mask_ids = [self.expand(s["input_ids"], s, s["mask_ids"], fill=-1) for s in samples]
        rows = [(m >= 0).nonzero().flatten() for m in mask_ids]
        phrases = [m[r] for m, r in zip(mask_ids, rows)]
        for sample, p in zip(samples, phrases):
            if len(p) == 0 or len(p.unique()) != int(p.max()) + 1:
                raise UserError(
                    f"{sample.get('file_name', 'input')}: a phrase has no token; leave out empty phrases"
                )
        wanted = AttentionRows(
            rows=[(r + k).to(self.device) for r, k in zip(rows, shifts)],
            phrases=[p.to(self.device) for p in phrases],
            columns=[self.columns_of(i, s).to(self.device) + k for i, s, k in zip(ids, samples, shifts)],
            merge=self.merge,
        )
        hidden, words = self._run(inputs, wanted, likelihood)
        if len(wanted.maps) != self.num_layers:
            name, got = type(self.model).__name__, len(wanted.maps)
            raise UserError(f"{name}: {got} of {self.num_layers} layers gave attention; all of a base must")
        outputs = []
        for b, sample in enumerate(samples):
            maps = [layer[b].to(self.device) for layer in wanted.maps]
            output = {
                "mask_attentions": self.to_grid(maps, self.grid(sample)),
                "hidden_states": torch.stack([h[b] for h in hidden]),
                "mask_ids": phrases[b].to(self.device),
            }
            if likelihood:
                output["log_probs"] = words[b]
            outputs.append(output)
        return outputs

    def columns_of(self, ids, sample):
        """Positions in expanded ids of the picture in which phrases are looked for."""
        columns = (ids == self.image_token_id).nonzero().flatten()
        tokens = [self.image_ids(p).count(self.image_token_id) for p in pictures_of(sample)]
        return columns.split(tokens)[sample.get("look", 0)]

    def _run(self, inputs, wanted, likelihood):
        """Fill wanted.maps; returns per layer a list of (R_b, d) hidden states of the phrase rows, and with
        `likelihood` the log p of these tokens (R_b,) float32, else None of each."""
        model, options = self.model.model, {}
        if likelihood:  # by the whole model: what it makes of its logits, such as a cap, is its own
            first = min(int(rows.min()) for rows in wanted.rows) - 1
            model, options = self.model, {"logits_to_keep": inputs["input_ids"].shape[1] - first}
        if self.attention == "eager":
            out = model(**inputs, **options, output_attentions=True, output_hidden_states=True)
            for layer in out.attentions:
                samples = zip(layer, wanted.rows, wanted.parts, wanted.columns)
                wanted.maps.append(
                    [merge_rows(a[:, r][..., c].float(), p, self.merge) for a, r, p, c in samples]
                )
            states = out.hidden_states[-self.num_layers :]
            hidden = [[h[b, r] for b, r in enumerate(wanted.rows)] for h in states]
        else:
            # hooks keep the phrase rows of each layer only; the last entry is the one after the final norm
            hidden, text = [], self.decoder

            def keep(module, args, output):
                output = output[0] if isinstance(output, tuple) else output
                hidden.append(
                    [output[b, r.to(output.device)].to(self.device) for b, r in enumerate(wanted.rows)]
                )

            hooks = [m.register_forward_hook(keep) for m in [*text.layers[:-1], text.norm]]
            try:
                out = model(**inputs, **options, attention_rows=wanted)
            finally:
                for hook in hooks:
                    hook.remove()
        if not likelihood:
            return hidden, [None] * len(wanted.rows)
        samples = zip(out.logits, inputs["input_ids"], wanted.rows)
        return hidden, [log_probs(logits, ids[first + 1 :], r - first - 1) for logits, ids, r in samples]

    # ---- conversation

    @torch.no_grad()
    def generate(self, sample, max_new_tokens=128, **options):
        """Greedy answer to sample["input_ids"] (1-D, one image token a picture); returns the new ids without
        the end token and without image tokens."""
        ids = self.expand(sample["input_ids"], sample)[None].to(self.device)
        mask = torch.ones_like(ids)
        extra = self.build_inputs(pictures_of(sample), ids, mask)
        extra.pop("position_ids", None)  # generate makes its own as the sequence grows
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **{**extra, **options},
        )
        new = out[0, ids.shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        new = new[: next((i for i, token in enumerate(new) if token in ends), len(new))]
        return [token for token in new if token != self.image_token_id]  # a picture that nobody has given
