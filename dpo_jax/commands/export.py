"""`dpo-jax export`: writes a checkpoint as a Hugging Face folder, and uploads it."""

from pathlib import Path

from dpo_jax import distributed, losses
from dpo_jax.commands.common import leading_arguments, log_line
from dpo_jax.config.commands import ExportConfig
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.hub import check_push, push_folder
from dpo_jax.models.huggingface.replace import check_replaceable
from dpo_jax.paths import is_run
from dpo_jax.training.export import save_policy
from dpo_jax.training.load import export_notes, load_policy, load_run_tokenizer
from dpo_jax.training.restore import restore_state
from dpo_jax.training.run_folder import run_config
from dpo_jax.training.tables import reward_encoding, template_file_text


def export_command(argv: list[str]) -> None:
    """Runs `dpo-jax export RUN OUT [--checkpoint best|last|STEP] [--dtype bfloat16] [--push owner/name]`."""
    (path, out), rest = leading_arguments(argv, "export", "RUN", "OUT")
    options = parse_config(ExportConfig, None, rest, prog="dpo-jax export RUN OUT")
    if options.public and not options.push:
        raise UserError("--public: has no effect without --push; remove it, or name a repository")
    if not is_run(path):
        raise UserError(f"{path}: not the folder of a run (it holds no config.yaml); name a run folder")
    settings = run_config(path)
    _refuse_sources(settings, Path(out))
    check_replaceable(Path(out).absolute())
    if options.push:
        check_push(options.push)  # before the work
    tokenizer, template = load_run_tokenizer(settings.model), template_file_text(settings.data)
    loss = losses.build(settings.loss)
    rewarded = reward_encoding(settings, loss)
    loaded = load_policy(settings.model, tokenizer, settings.seed, settings.lora, rewarded)
    if options.language_model:
        loaded = loaded.language_model()
    state = restore_state(path, settings, loaded, loss, options.checkpoint)
    title = options.push.rpartition("/")[2] or Path(out).resolve().name
    names = {"run": Path(path), "title": title, "dtype": options.dtype, "repository": options.push}
    save_policy(loaded, tokenizer, template, settings, state.params, Path(out), int(state.step), **names)
    for line in export_notes(settings, loaded, options.dtype):
        log_line(line)
    log_line(f"wrote {out}; transformers loads it with from_pretrained, and vllm serve {out} serves it")
    if options.push and distributed.is_primary():
        log_line(f"uploaded it to {push_folder(Path(out), options.push, public=options.public)}")


def _refuse_sources(settings: Config, out: Path) -> None:
    """Refuses to replace a model that the run still reads: its start, its base or its reference."""
    sources = {"model.path": settings.model.path, "reference.path": settings.reference.path}
    sources |= {"lora.path": settings.lora.path, "model.tokenizer": settings.model.tokenizer}
    for key, source in sources.items():
        for folder in (Path(source), Path(source) / "model", Path(source) / "adapter") if source else ():
            if out.exists() and folder.exists() and out.samefile(folder):
                raise UserError(f"{out}: is {key} of this run, which would be replaced; choose another folder")
