"""The original's quantities in torch, on separate padded-free sequences: the yardstick of several tests."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

FAMILIES = {
    "llama": LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt2": GPT2Config(n_embd=48, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, rotary_pct=0.5
    ),
}


def save_random(family, folder, vocab, seed=0):
    """Saves a small random model of a family, loud enough that its log-probs are far from uniform."""
    torch.manual_seed(seed)
    config = FAMILIES[family]
    config.vocab_size, config.max_position_embeddings, config.initializer_range = vocab, 600, 0.1
    if family == "gpt2":
        config.n_positions = 600
    config.bos_token_id = config.eos_token_id = 0
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def sequence_logps(model, tokens):
    """log pi(y | x), summed, of each response of one comparison, each read alone after its own copy of the prompt."""
    out = []
    for response in tokens.responses:
        ids = torch.tensor(np.concatenate([tokens.prompt, response]).astype(np.int64))[None]
        table = torch.log_softmax(model(ids).logits.float(), -1)[0]
        n = len(tokens.prompt)
        out.append(table[range(n - 1, ids.shape[1] - 1), ids[0, n:]].sum())
    return torch.stack(out)


def token_tables(model, prompt, response):
    """log pi(. | x, y_<t) for each token of a response, float64[n, V]."""
    ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits.double()[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).numpy()


def preference_loss(policy, reference, beta, label_smoothing=0.0, ipo=False, reference_free=False):
    """The original's loss of policy and reference log-probs [B, 2]: DPO, conservative DPO or IPO."""
    logits = policy[:, 0] - policy[:, 1]
    if not reference_free:
        logits = logits - (reference[:, 0] - reference[:, 1])
    if ipo:
        return (logits - 1 / (2 * beta)) ** 2
    kept, flipped = (torch.nn.functional.logsigmoid(sign * beta * logits) for sign in (1, -1))
    return -(1 - label_smoothing) * kept - label_smoothing * flipped
