"""Preference data: from files to batches of token ids. Nothing in this package imports JAX.

The way of the data, with the function that takes each step:

    files, folders, hub ids -> items                   sources/<name>.read (contract in sources/base.py)
    items -> training and held-out items               sources.base.holdout, by prompt
    training items -> the same with label noise        noise.add_noise (optional)
    items -> Tokens                                    encode.encode_stream: chat template, tokenizer, truncation
    Tokens -> Table, flat arrays on disk               cache.cached_encode, once for the same content
    Table -> Tokens of another Table                   noise.append_token, noise.add_mismatched (some losses)
    step number -> indices of comparisons              order.example_indices
    Table, indices -> Batch, several comparisons a row pack.build_batch

An item is a `Comparison`, the `UserError` of a bad example, or a `Note` on examples that were left out. Beside the way
stand `build_pairs` (makes preference pairs) and `audit` and `shortcuts` (describe data before training).
"""
