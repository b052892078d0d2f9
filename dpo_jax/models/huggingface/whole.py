"""A model that reads images too, whose language model was trained: that is written back among its other tensors."""

import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.errors import UserError
from dpo_jax.models.families.hf_config import HfConfig
from dpo_jax.models.families.wrappers import ELSEWHERE, PREFIXES, language_model_name
from dpo_jax.models.huggingface.older import with_older_keys
from dpo_jax.models.huggingface.safetensors import HeaderEntry, read_json, weight_files
from dpo_jax.models.reward_head import is_reward_config

WHOLE = "_whole_model"  # key of a language model's config: the folder of the model that it is a part of
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # how images become inputs


class Whole(NamedTuple):
    """A folder of a model that reads images too.

    Attributes:
      folder: the folder.
      config: its config.json.
      names: name of a tensor in the files of its language model's family, without the family's prefix -> its name here.
      others: name -> file, shape and dtype of the tensors that are no part of the language model.
    """

    folder: Path
    config: dict[str, Any]
    names: Mapping[str, str]
    others: Mapping[str, tuple[Path, HeaderEntry]]

    def around(
        self, entries: Mapping[str, HeaderEntry], tensors: Iterator[np.ndarray], prefix: str
    ) -> tuple[dict[str, HeaderEntry], Iterator[np.ndarray]]:
        """Returns the tensors of the whole model, given those of its language model, with the family's prefix."""
        outer = next(p for p in PREFIXES if any(name.startswith(p) for name in self.names.values()))
        own = {name: name.removeprefix(prefix) for name in entries}
        renamed = {self.names.get(own[name], outer + own[name]): entry for name, entry in entries.items()}
        others = {name: entry for name, (_, entry) in self.others.items()}
        return renamed | others, chain(tensors, self._other_tensors())

    def _other_tensors(self) -> Iterator[np.ndarray]:
        """Yields the tensors that are no part of the language model, in the order of `others`.

        Raises:
          UserError: a file has been changed or removed.
        """
        for name, (file, _) in self.others.items():
            try:
                with safe_open(file, framework="numpy") as source:
                    yield np.ascontiguousarray(source.get_tensor(name))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: was changed or removed while it was in use; put it back") from error

    def config_with(self, language: HfConfig) -> dict[str, Any]:
        """Returns the whole model's config.json, given the new one of its language model."""
        keys = ("vocab_size", "vocab_size_per_layer_input", "dtype", "model_type")
        new = {key: language[key] for key in keys if key in language}
        text = with_older_keys({**_plain(self.config["text_config"]), **new})
        return {**with_older_keys({**_plain(self.config), "dtype": language["dtype"]}), "text_config": text}

    def copy_processors(self, folder: Path) -> None:
        """Copies the files that say how images become inputs."""
        for name in PROCESSORS:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)


def _plain(config: HfConfig) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("torch_dtype", "transformers_version")}


def is_part(hf_config: HfConfig) -> bool:
    """Returns whether a model is written as a part of one that reads images too; a reward model is not."""
    return WHOLE in hf_config and not is_reward_config(hf_config)


def whole_model(hf_config: HfConfig, prefix: str) -> Whole | None:
    """Returns the model that a language model is a part of; None if it is a model of its own.

    Args:
      hf_config: config.json of the language model, as `open_folder` returns it.
      prefix: of the family's tensor names.

    Raises:
      UserError: the model's folder is gone or damaged.
    """
    if not is_part(hf_config):
        return None
    folder, names, others = Path(hf_config[WHOLE]), {}, {}
    if not folder.is_dir():
        raise UserError(f"{folder}: is gone, and has the tensors for images; put it back, or export the language model")
    for file in weight_files(folder):
        with safe_open(file, framework="numpy") as source:
            for key in source.keys():  # noqa: SIM118 (it is no dict)
                if key.startswith(ELSEWHERE):
                    view = source.get_slice(key)
                    others[key] = file, HeaderEntry(tuple(view.get_shape()), view.get_dtype())
                else:
                    names[language_model_name(key, prefix)] = key
    return Whole(folder, read_json(folder / "config.json"), names, others)
