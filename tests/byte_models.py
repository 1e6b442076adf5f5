"""Language models over bytes with random weights: quick to make, and with every part that a real one has."""

import torch
from tokenizers import Tokenizer, decoders, models as token_models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from preceptor.data.sequences import Sequence, collate
from preceptor.models.language_model import LanguageModel

SPECIALS = ["<pad>", "<s>", "<turn>", "<end>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def byte_tokenizer(extra=(), template=TEMPLATE):
    """One token a byte, and four special ones in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet, *extra])}
    inner = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<end>",
        additional_special_tokens=["<turn>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny(config=None, *, rows=None, seed=0, tokenizer=None):
    """A random language model over bytes."""
    tokenizer = tokenizer or byte_tokenizer()
    config = config or LlamaConfig(**WIDTHS, num_hidden_layers=3)
    config.vocab_size = rows or len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 3, 0
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return LanguageModel(model, tokenizer).eval()


def batch_of(*lengths, rows=250):
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(4, rows, (length,), generator=generator).tolist()) for length in lengths]
    return collate([Sequence(one, (False,) * 2 + (True,) * (len(one) - 2)) for one in ids], pad_id=0)
