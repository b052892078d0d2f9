"""Writes the policy of a run as a Hugging Face folder with a model card, the run's config and its license."""

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax import distributed
from dpo_jax.config.schema import Config
from dpo_jax.config.yaml import as_lists, dump, flatten
from dpo_jax.data.sources.names import data_names
from dpo_jax.intervals import interval_text
from dpo_jax.models.huggingface.card import CARD, card_source, code, markdown_table, model_card, one_line
from dpo_jax.training.best import Evaluated, run_evaluation
from dpo_jax.training.checkpoint import best_checkpoint
from dpo_jax.training.load import LoadedModel
from dpo_jax.training.loss_text import NOTATION, describe_loss
from dpo_jax.training.run_folder import check_secrets

SETTINGS = "training_config.yaml"
KEYS = ("batch_size", "epochs", "max_steps", "seed", "data.max_length", "data.split", "model.compute", "lora")
KEYS += ("reference", "optim")
PACKAGES = ("dpo_jax", "jax", "flax", "optax", "transformers")
DPO = """@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and
            Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2305.18290},
  archivePrefix = {arXiv}
}"""


def export_run(
    loaded: LoadedModel, tokenizer: Any, template: str, config: Config, trained: Any, out: Path, step: int
) -> None:
    """Writes the policy of a run to its folder `model`, and adapters beside it. Call it from all processes.

    Args:
      loaded: the policy at the start.
      tokenizer: of the policy.
      template: text of `data.chat_template`; "" for the tokenizer's.
      config: of the run.
      trained: the trained parameters: all, or adapters.
      out: the folder `model`.
      step: updates done.
    """
    run, title = out.parent, out.parent.resolve().name
    save_policy(loaded, tokenizer, template, config, trained, out, step, run=run, title=title)
    files = {}
    if loaded.lora is not None and distributed.is_primary():
        files = _card_files(loaded, config, run, step, f"{title} (adapters)", "float32", adapters=True)
    loaded.save_adapters(trained, out, files)


def save_policy(
    loaded: LoadedModel,
    tokenizer: Any,
    template: str,
    config: Config,
    trained: Any,
    out: Path,
    step: int,
    *,
    run: Path,
    title: str,
    dtype: str = "",
    repository: str = "",
) -> None:
    """Writes the policy of a run as a Hugging Face folder with a card; arguments are those of `export_run`.

    Args:
      run: the run folder, which has the evaluations.
      title: name of the model in its card.
      dtype: dtype of the weights; "" for that of the initial model.
      repository: owner/name on the hub, "" if it is not known.

    Raises:
      UserError: the config holds a password or token; the folder holds other files.
    """
    check_secrets(config)
    files = {}
    if distributed.is_primary():
        written_as = dtype or loaded.hf_config.get("dtype", "float32")
        files = _card_files(loaded, config, run, step, title, written_as, repository)
    loaded.save(trained, out, tokenizer, dtype=dtype or None, template=template, files=files)


def _card_files(
    loaded: LoadedModel,
    config: Config,
    run: Path,
    step: int,
    title: str,
    dtype: str,
    repository: str = "",
    adapters: bool = False,
) -> dict[str, str]:
    """Returns name -> text of the card, the config and the licenses of an exported folder."""
    source, found = card_source(config.model.path), run_evaluation(run, step)
    hubs, shown = data_names(config.data.name, config.data.path)
    terms = [config.loss] if isinstance(config.loss, dict) else list(config.loss)
    best = config.keep_best and best_checkpoint(run / "checkpoints", config.keep_best) == step
    weights = f"those of step {step}{f', the best by {code(config.keep_best)}' if best else ''}, in {dtype}"
    sections = [
        ("Training", _training(config, weights, source.name, shown)),
        ("Loss", "\n\n".join(map(loss_section, terms)) + "\n\n" + _notation()),
        ("Held-out results", _results(found, step)),
        ("Citation", citations([term["name"] for term in terms])),
    ]
    card = model_card(
        title,
        source,
        loaded.hf_config,
        sections,
        repository,
        adapters,
        tags=[*(["lora"] if adapters else []), *(term["name"] for term in terms)],
        datasets=hubs or None,
        eval_results=_eval_results(found, loaded, hubs, shown) or None,
    )
    return {**source.files, CARD: card, SETTINGS: dump(config)}


def _training(config: Config, weights: str, base: str, data: Sequence[str]) -> str:
    """Returns what was trained on what, and the hyper-parameters, as Markdown."""
    rows = [("base model", code(base) if base else "random weights"), ("data", ", ".join(map(code, data)))]
    rows += [("weights", weights)]
    values = flatten(as_lists(dataclasses.asdict(config)))
    kept = [(key, " ".join(texts)) for key, texts in values if key.startswith(KEYS)]
    if not (config.lora.rank or config.lora.path):
        kept = [(key, text) for key, text in kept if not key.startswith("lora")]
    rows += [(code(key), code(text)) for key, text in kept if text not in ("", "None", "-1", "-1.0")]  # unset
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{markdown_table(('', ''), rows)}\n\nAll keys are in [{SETTINGS}]({SETTINGS}). Versions: {versions}."


def loss_section(term: Mapping[str, Any]) -> str:
    """Returns the name, the equation and the options of a term of the loss, as Markdown."""
    found = describe_loss(term["name"])
    options = ", ".join(f"{key} {value}" for key, value in term.items() if key != "name")
    paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", found.paper)
    head = f"{code(term['name'])}: {one_line(found.title)}{f' ({paper})' if paper else ''}."
    formula = "\n".join(("```", *found.formula, "```")) if found.formula else "Its docstring has no equation."
    return "\n\n".join((head, formula, f"Options: {code(options)}." if options else "No options."))


def _notation() -> str:
    return "\n".join(("Notation:", "", "```", *NOTATION, "```"))


def _results(found: Evaluated, step: int) -> str:
    """Returns the metrics of an evaluation as a table of Markdown."""
    if not found:
        return f"The run holds no evaluation of step {step}."
    rows = []
    for name, entry in found.items():
        rows.append([code(name), f"{entry['mean']:.4f}", interval_text(entry), str(entry.get("n", ""))])
    return markdown_table(("metric", "mean", "95% interval", "comparisons"), rows)


def _eval_results(found: Evaluated, loaded: LoadedModel, hubs: Sequence[str], shown: Sequence[str]) -> list[Any]:
    """Returns the means of an evaluation as the hub reads them."""
    from huggingface_hub import EvalResult

    task = "text-classification" if loaded.model.architecture.score else "text-generation"
    data: dict[str, Any] = {"dataset_type": hubs[0] if hubs else "held-out"}
    data["dataset_name"] = f"held-out part of {', '.join(shown)}"
    means = {name: float(entry["mean"]) for name, entry in found.items() if math.isfinite(entry["mean"])}
    return [
        EvalResult(task_type=task, **data, metric_type=name.removeprefix("eval_"), metric_name=name, metric_value=mean)
        for name, mean in means.items()
    ]


def citations(names: Sequence[str]) -> str:
    """Returns the papers of DPO and of the losses as BibTeX."""
    entries = {"2305.18290": DPO}
    for name in names:
        found = re.match(r"(.+?) (\d{4}), arXiv (\d{4}\.\d{5})", describe_loss(name).paper)
        if found is None or found[3] in entries:
            continue
        author = found[1].replace(" et al.", " and others")
        fields = {"author": author, "year": found[2], "eprint": found[3], "archivePrefix": "arXiv"}
        fields["url"] = f"https://arxiv.org/abs/{found[3]}"
        body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
        entries[found[3]] = f"@misc{{arxiv{found[3]},\n{body}\n}}"
    return "\n".join(("```bibtex", "\n\n".join(entries.values()), "```"))
