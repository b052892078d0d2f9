"""`dpo-jax export`: a checkpoint as a Hugging Face folder."""

from pathlib import Path

from dpo_jax import assemble, folders, keys, loading, losses, policies
from dpo_jax.records import UserError
from dpo_jax.terminal import leading, say


def export_command(argv: list[str]) -> None:
    """`dpo-jax export RUN OUT [--checkpoint newest|best|STEP]`."""
    (path, out), rest = leading(argv, "export", "RUN", "OUT")
    given = keys.arguments(rest)
    if any(key != "checkpoint" or len(values) != 1 for key, values in given):
        raise UserError("dpo-jax export takes RUN, OUT and perhaps --checkpoint newest, best or a step; nothing else")
    which = given[-1][1][0] if given else "newest"
    if not folders.is_run(path):
        raise UserError(f"{path}: not the folder of a run (it holds no config.yaml)")
    settings = folders.config_of(path)
    tokenizer = loading.tokenizer_of(settings.model)
    loss = losses.build(settings.loss)
    rewarded = assemble.reward_encoding(settings, loss)
    loaded = loading.load_model(settings.model, tokenizer, settings.seed, settings.lora, rewarded)
    state = policies.state(path, settings, loaded, loss, which)
    loaded.save(state.params, Path(out), tokenizer)
    for line in loading.notes(settings, loaded):
        say(line)
    say(f"wrote {out}, which transformers loads with from_pretrained")
