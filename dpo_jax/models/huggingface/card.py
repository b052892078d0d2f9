"""The model card of an exported folder (README.md), and the license and tags of the base model."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_jax import __version__
from dpo_jax.errors import printable
from dpo_jax.models.huggingface.hub import fetch_model, hub_repository, is_hub_name
from dpo_jax.models.huggingface.replace import LISTING
from dpo_jax.models.huggingface.whole import is_part
from dpo_jax.models.reward_head import is_reward_config
from dpo_jax.paths import is_run

log = logging.getLogger(__name__)
CARD = "README.md"
LICENSES = re.compile(r"(LICEN[SC]E|NOTICE|COPYING)([.\-_][\w.\-]+)?", re.IGNORECASE)  # file names
LARGEST = 2**20  # bytes of a file that is carried over
LONGEST = 500  # characters of a value of the front matter that is carried over
LICENSE_KEYS = ("license", "license_name", "license_link")  # of a card's front matter


class CardSource(NamedTuple):
    """The model that an export was made from, as its card shows it.

    Attributes:
      name: its hub id or the name of its folder; "" for random weights.
      hub: owner/name of the hub that it is or was made from; "" if none is known.
      license: the license keys of its card.
      files: name -> text of its license files.
    """

    name: str = ""
    hub: str = ""
    license: Mapping[str, Any] = {}
    files: Mapping[str, str] = {}


def card_source(path: str) -> CardSource:
    """Returns what a card says about a model: a folder, a run folder, or a hub id; "" for random weights.

    A license is that of the model's card, else that of its license file. A card or file that cannot be read is left
    out, with a warning.
    """
    if not path:
        return CardSource()
    folder = fetch_model(path) if is_hub_name(path) else Path(path) / ("model" if is_run(path) else "")
    if not folder.is_dir():
        log.warning(f"{folder}: is gone; the card of the exported model names no license")
        return CardSource(Path(path).name)
    known = _front_matter(folder / CARD)
    hub = hub_repository(path) if is_hub_name(path) else ""
    if not hub and (folder / LISTING).is_file():  # an export, whose card names the model that it was made from
        hub = known.get("base_model") if isinstance(known.get("base_model"), str) else ""
    files = _license_files(folder)
    license = {k: known[k] for k in LICENSE_KEYS if isinstance(known.get(k), str) and len(known[k]) < LONGEST}
    if files and "license" not in license:
        license = {"license": "other", "license_name": "license-of-the-base", "license_link": min(files)}
    link = license.get("license_link", "")
    if "://" not in link and link not in files:
        license.pop("license_link", None)
    return CardSource(path if is_hub_name(path) else Path(path).resolve().name, hub or "", license, files)


def _front_matter(file: Path) -> dict[str, Any]:
    """Returns the metadata of a card; {} without one."""
    from huggingface_hub import metadata_load

    try:
        return (metadata_load(file) or {}) if file.is_file() and file.stat().st_size < LARGEST else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        log.warning(f"{file}: its front matter cannot be read ({' '.join(str(e).split())[:200]}); left out of the card")
        return {}


def _license_files(folder: Path) -> dict[str, str]:
    """Returns name -> text of the license files in a model folder."""
    found: dict[str, str] = {}
    for file in sorted(folder.iterdir()):
        if not LICENSES.fullmatch(file.name) or not file.is_file():
            continue
        try:
            if file.stat().st_size < LARGEST:
                found[file.name] = file.read_text(encoding="utf-8")
                continue
            why = f"{LARGEST:,} bytes or more"
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or "not a text file"
        log.warning(f"{file}: {why}; not carried over, copy it beside the exported model")
    return found


def model_card(
    title: str,
    source: CardSource,
    hf_config: Mapping[str, Any],
    sections: Sequence[tuple[str, str]] = (),
    repository: str = "",
    adapters: bool = False,
    **metadata: Any,
) -> str:
    """Returns a model card: front matter that the hub reads, how to load the model, and further sections.

    Args:
      title: name of the model.
      source: the model that it was made from.
      hf_config: its config.json.
      sections: (heading, text in Markdown) between use and license.
      repository: owner/name on the hub, for the examples; "" for a folder.
      adapters: whether the folder has adapters in PEFT's format, and no model.
      **metadata: further fields of `huggingface_hub.ModelCardData`; `tags` are added to ours.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rewards = is_reward_config(hf_config)
    kind = "AutoModelForSequenceClassification" if rewards else "AutoModelForCausalLM"
    task = "text-classification" if rewards else "text-generation"
    if is_part(hf_config):
        kind, task = "AutoModelForImageTextToText", "image-text-to-text"
    tags = ["dpo_jax", *metadata.pop("tags", ())]
    # Adapters fit the weights that they were trained on, not those which an export was made from.
    base = source.hub if not adapters or is_hub_name(source.name) else ""
    library = "peft" if adapters else "transformers"
    known = {"library_name": library, "pipeline_tag": task, "base_model": base or None, "tags": tags}
    data = ModelCardData(**known, **source.license, model_name=one_line(title), **metadata)
    name = repository or "path/to/this/folder"
    use = _use_adapters(name, base or "path/to/the/base", kind) if adapters else _use(name, kind)
    parts = [("Use", use), *sections, ("License", _license_text(source))]
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in parts)
    made = f"Written by dpo_jax {__version__}{f', made from {code(source.name)}' if source.name else ''}."
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {_escaped(title)}\n\n{made}\n\n{body}\n"))


def _use(name: str, kind: str) -> str:
    """Returns how to load a model of a class of transformers, as Markdown."""
    lines = [f"from transformers import {kind}, AutoTokenizer", ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    lines += [f'model = {kind}.from_pretrained("{name}", dtype="auto")']
    text = "\n".join(("```python", *lines, "```"))
    return text if kind == "AutoModelForSequenceClassification" else f"{text}\n\n`vllm serve {name}` serves it."


def _use_adapters(name: str, base: str, kind: str) -> str:
    """Returns how to load adapters and their base by PEFT, as Markdown."""
    lines = ["from peft import PeftModel", f"from transformers import {kind}, AutoTokenizer", ""]
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{base}")']
    lines += [f'model = {kind}.from_pretrained("{base}", dtype="auto")']
    lines += [f'model = PeftModel.from_pretrained(model, "{name}")']
    return "\n".join(("```python", *lines, "```"))


def _license_text(source: CardSource) -> str:
    if not source.license:
        whose = f"of {code(source.name)} " if source.name else ""
        return f"No license {whose}was found when this folder was written, so that none is stated here."
    files = f" See {', '.join(f'[{_escaped(name)}]({name})' for name in source.files)}." if source.files else ""
    return f"That of the model it was made from: {code(' '.join(map(str, source.license.values())))}.{files}"


def code(text: Any) -> str:
    """Returns a text as code in Markdown, on one line."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def one_line(text: Any) -> str:
    """Returns a text on one line, without control characters."""
    return " ".join(printable(str(text)).split())


def _escaped(text: Any) -> str:
    """Returns a text on one line in which Markdown sees no markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line(text))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of Markdown; the cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
