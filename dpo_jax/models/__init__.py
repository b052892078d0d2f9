"""Decoder-only language models as pure functions of their parameters.

Reading order: `model` (the interface: `build_model` -> `Model`), `decoder` (one Linen decoder for all families),
`layers` and `attention` (its mathematics), `architecture` (its shapes and options). `kernels` has library attention,
`lora` and `qlora` adapters, `quantized` 4-bit and 8-bit kernels, `reward_head` reward models, `init` random
parameters. `huggingface` reads and writes model folders; `families` has one module per family.

To add a family: write `families/<model_type>.py` with `architecture(config)` and `tensors(architecture)` (see
`families/__init__.py`; `llama.llama_like` and `gpt2.gpt_like` do most of it), and add a row to `tests/tiny.py`, with
which the tests compare it to transformers: logits, gradients, cache, files. Unsupported settings must raise UserError.
"""
