"""RewardBench (Lambert et al. 2024, arXiv 2403.13787): how often the chosen answer has the higher reward.

Sections, their subsets and weights are those of allenai/reward-bench (`rewardbench/constants.py`,
`calculate_scores_per_section`) and of its leaderboard: a section is the mean of its subsets weighted by their sizes,
where math-prm counts as much as all code, and the score is the mean of the sections, prior sets with weight one half.
"""

import re
from typing import Any

from dpo_jax.errors import UserError, closest
from dpo_jax.runs.suites.examples import column, suite_examples
from dpo_jax.runs.suites.registry import SuiteResult, SuiteTask, register_suite
from dpo_jax.runs.suites.scoring import averaged, proportion, score_answers

PRIOR = "Prior Sets"
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984} | {f"hep-{code}": 164 for code in ("cpp", "go", "java", "js", "python", "rust")},
    PRIOR: dict.fromkeys(("anthropic_helpful", "anthropic_hhh", "shp", "summarize"), 1),
}
WEIGHTS = {name: 0.5 if name == PRIOR else 1.0 for name in SECTIONS}
MEANINGS = {
    subset: f"Of the section {section}: share of pairs whose chosen answer has the higher reward. Chance has 50%."
    for section, subsets in SECTIONS.items()
    for subset in subsets
}
MEANINGS |= {
    section: f"Mean of its subsets ({', '.join(subsets)}), weighted by their published sizes."
    for section, subsets in SECTIONS.items()
}
MEANINGS |= {
    "Reasoning": "Mean of its subsets; math-prm counts as much as all code (hep-*).",
    PRIOR: f"Plain mean of its subsets ({', '.join(SECTIONS[PRIOR])}).",
    "score": f"Mean of the sections, in which {PRIOR} has weight 1/2.",
}
SUBSETS = [subset for subsets in SECTIONS.values() for subset in subsets]


@register_suite("rewardbench", data="allenai/reward-bench", split="filtered", keys=("reward",), meanings=MEANINGS)
def measure_rewardbench(task: SuiteTask) -> SuiteResult:
    """Returns the share of pairs whose chosen answer has the higher reward, by subset and section, and the score."""
    found = [_pair(file, *example) for file, example in suite_examples(task.data)]
    doubled = [(prompt, text, where) for where, _, prompt, *texts in found for text in texts]
    rewards, notes = score_answers(task, *zip(*doubled, strict=True))
    pairs = rewards.reshape(-1, 2)
    wins = (pairs[:, 0] > pairs[:, 1]).astype(float)
    by_subset: dict[str, list[float]] = {}
    for (_, subset, *_), win in zip(found, wins, strict=True):
        by_subset.setdefault(subset, []).append(float(win))
    if ties := int((pairs[:, 0] == pairs[:, 1]).sum()):
        notes += (f"{ties} pairs of equal rewards count as lost, as published",)
    metrics, more = rewardbench_scores(by_subset)
    rows = tuple(
        {"where": where, "subset": subset, "chosen": float(pair[0]), "rejected": float(pair[1])}
        for (where, subset, *_), pair in zip(found, pairs, strict=True)
    )
    return SuiteResult(metrics, len(found), notes + more, rows)


def rewardbench_scores(wins: dict[str, list[float]]) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Returns metrics of `subset -> 1 or 0 for each pair`, and notes: every subset, the sections, then the score."""
    subsets, sections, notes = {}, {}, []
    for section, sizes in SECTIONS.items():
        there = [subset for subset in sizes if subset in wins]
        subsets |= {subset: proportion(wins[subset]) for subset in there}
        if there:
            credits = [win for subset in there for win in wins[subset]]
            weights = [sizes[subset] / len(wins[subset]) for subset in there for _ in wins[subset]]
            sections[section] = proportion(credits, weights)
        if there and (absent := [subset for subset in sizes if subset not in wins]):
            notes.append(f"{section}: no examples of {', '.join(absent)}; the section is the mean of the others")
    if absent := [section for section in SECTIONS if section not in sections]:
        notes.append(f"score: without {', '.join(absent)}, which have no examples")
    return subsets | sections | {"score": averaged(sections, WEIGHTS)}, tuple(notes)


def _pair(file: str, where: str, example: dict[str, Any]) -> tuple[str, str, Any, str, str]:
    """Returns where, subset, prompt, chosen and rejected of an example."""
    stem = re.sub(r"-\d+-of-\d+$", "", file.partition(".")[0])
    subset = example.get("subset")
    subset = stem if subset not in SUBSETS and stem in SUBSETS else subset  # prior sets are a file each
    if subset not in SUBSETS:
        raise UserError(f"{where}: subset {subset!r} is not of RewardBench; {closest(str(subset), SUBSETS)}")
    chosen, rejected = (column(where, example, name, str) for name in ("chosen", "rejected"))
    return where, str(subset), _prompt(where, example), chosen, rejected


def _prompt(where: str, example: dict[str, Any]) -> Any:
    prompt = example.get("prompt")
    if not isinstance(prompt, list):
        return column(where, example, "prompt", str)
    if not prompt or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
        raise UserError(f"{where}: prompt must be a text or a list of messages with role and content; correct it")
    return prompt
