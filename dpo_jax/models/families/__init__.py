"""Model families, one module each: how to read its config.json, and the names and layouts of its tensors.

A family module is named after the `model_type` of config.json and defines:
  CLASS: the class in transformers.
  PREFIX: prefix of tensor names that a file may omit.
  HEAD: name of the head's tensor.
  BUFFERS: endings of names of tensors that are not parameters.
  READS: which settings of `foreign.NEUTRAL` it reads, or refuses by itself.
  architecture(config) -> Architecture: raises UserError for unsupported settings.
  tensors(architecture) -> dict[str, Tensor]: name in the file, with `{i}` or `{i:kind}` for the layer, and `{e}` for
    the expert of a mixture -> `tensor_map.Tensor`.
  unread_tensors(architecture): only if files have tensors that no layer uses; their names.
  fused_tensors(architecture): for mixtures of experts only; the same by transformers' names in memory, which files may
    have too.
"""
