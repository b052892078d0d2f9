"""The description of a loss, from its docstring and signature: for `dpo-jax losses` and for model cards."""

import inspect
import itertools
import re
from typing import NamedTuple

from dpo_jax.losses.registry import Entry, find_entry

NOTATION = (
    "c, r       log pi(y | x) - log ref(y | x) of the chosen and the rejected response, summed over tokens",
    "p_c, p_r   log pi(y | x) of both;  L_c, L_r  their lengths in tokens;  m_c = p_c / L_c, m_r = p_r / L_r",
    "           (tokens with weights: means, as c / L_c, are over the sum of weights; L_c - L_r counts tokens)",
    "ref_c, m_g log ref(y | x) of the chosen response;  p / L of a gold one;  z, d  beta (c - r), eta (s_c - s_r)",
    "r_c, r_r   their rewards by the trained reward model",
    "z_k        beta (log pi - log ref) of the response of rank k;  s  scores of the data",
)


class Description(NamedTuple):
    """The description of a loss.

    Attributes:
      title: name in words.
      paper: authors, year, arXiv number and equation.
      formula: lines of the formula.
      hyper: hyper-parameter -> default.
      takes: the data that it takes, and options of a term that it supports.
    """

    title: str
    paper: str
    formula: tuple[str, ...]
    hyper: dict[str, object]
    takes: str


def describe_loss(name: str, entry: Entry | None = None) -> Description:
    """Returns the description of a loss, from its docstring and signature; of an entry, with what that one takes.

    The first line is its title and (paper), as of all built-in losses; a user's may name no paper. Indented lines
    before `Args:` are the formula.
    """
    entry = entry or find_entry(name)
    lines = (inspect.getdoc(entry.function) or "No description.").splitlines()
    found = re.fullmatch(r"(.*?) \(([^()]* \d{4}, arXiv [^()]*)\)(.*)", lines[0])
    before, paper, after = found.groups() if found else (lines[0], "", "")
    described = itertools.takewhile(lambda line: line != "Args:", lines)
    formula = tuple(line[4:] for line in described if line.startswith("    "))
    parameters = inspect.signature(entry.function).parameters.values()
    hyper = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return Description((before + after).rstrip("."), paper, formula, hyper, _takes(entry))


def _takes(entry: Entry) -> str:
    """Returns the data that a loss takes, and the options of a term that it supports."""
    responses = {1: "responses", 2: "pairs", 3: "gold, chosen and rejected responses", None: "rankings"}
    features = {
        "pairs, and responses to other prompts" if entry.mismatched else responses[entry.responses]: True,
        "or single responses": entry.unpaired,
        "no reference": not entry.uses_reference,
        "a reward model": entry.rewards,
        "soft labels": entry.soft_labels,
        "f-divergences": entry.divergences,
        "scores": entry.scores,
        "whole batches": entry.whole_batch,
    }
    return ", ".join(text for text, holds in features.items() if holds)
