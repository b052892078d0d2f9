"""`dpo-jax export`: writes a checkpoint as a Hugging Face folder."""

from pathlib import Path

from dpo_jax import losses
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import arguments
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.replace import check_replaceable
from dpo_jax.paths import is_run
from dpo_jax.training.load import export_notes, load_policy, load_run_tokenizer
from dpo_jax.training.restore import restore_state
from dpo_jax.training.run_folder import run_config
from dpo_jax.training.tables import reward_encoding, template_file_text


def export_command(argv: list[str]) -> None:
    """Runs `dpo-jax export RUN OUT [--checkpoint newest|best|STEP]`."""
    (path, out), rest = leading_arguments(argv, "export", "RUN", "OUT")
    given = arguments(rest)
    if any(key != "checkpoint" or len(values) != 1 for key, values in given):
        raise UserError("dpo-jax export takes RUN, OUT and --checkpoint newest, best or a step; remove the rest")
    which = given[-1][1][0] if given else "newest"
    if not is_run(path):
        raise UserError(f"{path}: not the folder of a run (it holds no config.yaml); name a run folder")
    settings = run_config(path)
    _refuse_sources(settings, Path(out))
    check_replaceable(Path(out).absolute())
    tokenizer = load_run_tokenizer(settings.model)
    loss = losses.build(settings.loss)
    rewarded = reward_encoding(settings, loss)
    loaded = load_policy(settings.model, tokenizer, settings.seed, settings.lora, rewarded)
    state = restore_state(path, settings, loaded, loss, which)
    loaded.save(state.params, Path(out), tokenizer, template_file_text(settings.data))
    for line in export_notes(settings, loaded):
        log_line(line)
    log_line(f"wrote {out}; transformers loads it with from_pretrained")


def _refuse_sources(settings: Config, out: Path) -> None:
    """Refuses to replace a model that the run still reads: its start, its base or its reference."""
    sources = {"model.path": settings.model.path, "reference.path": settings.reference.path}
    sources |= {"lora.path": settings.lora.path, "model.tokenizer": settings.model.tokenizer}
    for key, source in sources.items():
        for folder in (Path(source), Path(source) / "model", Path(source) / "adapter") if source else ():
            if out.exists() and folder.exists() and out.samefile(folder):
                raise UserError(f"{out}: is {key} of this run, which would be replaced; choose another folder")
