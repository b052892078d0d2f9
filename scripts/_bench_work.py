"""What a step has to compute, and how fast the machine multiplies: the yardsticks of scripts/bench."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

# The step's forward passes: the backward pass costs two, and the reference is one more.
POLICY_PASSES, REFERENCE_PASSES = 3, 1
# JAX's names of the TPUs that have a data sheet in dpo_jax/training/targets.py; some have two.
TPUS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
TPUS |= {"TPU7x": "tpu7x"}
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model_path(name: str) -> str:
    """Returns a model's folder or hub id: of `smollm2` the folder that $SMOLLM2 names, or the hub's."""
    return os.environ.get("SMOLLM2", SMOLLM2) if name == "smollm2" else name


def matmul_parameters(config: dict[str, Any]) -> int:
    """Returns how many weights of a llama, gpt2, gpt_neox or qwen3_moe multiply a token, embedding and head apart."""
    width = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * width
    heads = config.get("num_attention_heads") or config["n_head"]
    shared = config.get("num_key_value_heads") or heads
    attention = 2 * width * width + 2 * width * width * shared // heads
    gated = 3 if config["model_type"] in ("llama", "qwen3_moe") else 2
    experts = config.get("num_experts", 0)
    if experts:
        inner = config["num_experts_per_tok"] * config["moe_intermediate_size"]
    return layers * (attention + gated * width * inner + experts * width)


def useful_flops(config: dict[str, Any], prompt: Any, responses: Any, passes: int) -> float:
    """Returns the floating-point operations that a batch needs: every prompt once, no score of a masked pair.

    Args:
      config: the model's config.json.
      prompt: int[B], tokens of each prompt.
      responses: int[B, P], tokens of each response; its last token is predicted and never read.
      passes: forward passes, a backward pass counted as two.
    """
    width = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    prompt, responses = np.asarray(prompt, float), np.asarray(responses, float)
    read = responses - 1
    tokens = prompt.sum() + read.sum()
    seen = (prompt * (prompt + 1) / 2).sum() + (read * (read + 1) / 2 + read * prompt[:, None]).sum()
    head = 2 * width * config["vocab_size"] * responses.sum()
    return passes * (2 * matmul_parameters(config) * tokens + 4 * width * layers * seen + head)


def matmul_peak(dtype: str, seconds: float = 4.0) -> dict[str, float]:
    """Returns floating-point operations a second of JAX's products in the shapes of a large layer: best and median."""
    import jax
    import jax.numpy as jnp

    shapes = [(2048, 2048, 2048), (4096, 768, 3072), (1024, 768, 50257)]
    if jax.default_backend() != "cpu":
        shapes = [(8192, 8192, 8192), (16384, 4096, 16384)]

    @jax.jit
    def product(a: Any, b: Any) -> Any:
        return jnp.einsum("mk,nk->mn", a, b, preferred_element_type=jnp.float32)

    rates = []
    for m, k, n in shapes:
        a, b = (jnp.ones(shape, dtype) for shape in ((m, k), (n, k)))
        product(a, b).block_until_ready()
        end = time.perf_counter() + seconds / len(shapes)
        while time.perf_counter() < end:
            start = time.perf_counter()
            product(a, b).block_until_ready()
            rates.append(2.0 * m * k * n / (time.perf_counter() - start))
    return {"best": max(rates), "median": statistics.median(rates)}


def device_rates(dtype: str) -> dict[str, Any]:
    """Returns `matmul_peak`, the device's name, and the peak of its data sheet or None, as best, median, device, sheet.

    They come from a process of its own, so that this one holds no memory of the device, nor a TPU, which is for one.
    """
    command = [sys.executable, __file__, dtype]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def sheet_peak(device: str, dtype: str) -> float | None:
    """Returns the floating-point operations a second of a device's data sheet, for dense bfloat16; else None.

    Args:
      device: JAX's name of its kind.
      dtype: of the matmuls.
    """
    from dpo_jax.training.targets import CHIPS

    # The data sheets are of whole cards with NVLink (SXM): PCIe, NVL and the parts of MIG have other rates.
    gpu = re.match(r"NVIDIA (A100|H100|H200|B200)\b(?!.*(?:PCIE|NVL|MIG))", device, re.IGNORECASE)
    name = gpu[1].lower() if gpu else TPUS.get(device)
    return CHIPS[name].device().peak if name and dtype == "bfloat16" else None


if __name__ == "__main__":
    import jax

    kind = jax.devices()[0].device_kind
    print(json.dumps({**matmul_peak(sys.argv[1]), "device": kind, "sheet": sheet_peak(kind, sys.argv[1])}))
