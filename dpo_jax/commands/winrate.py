"""`dpo-jax winrate`: samples policies at several temperatures, or best of N, and judges the samples."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.commands.common import log_line, print_table
from dpo_jax.config.commands import WinrateConfig
from dpo_jax.config.schema import ModelConfig
from dpo_jax.config.yaml import dump
from dpo_jax.data import chat
from dpo_jax.data.sources.base import only_comparisons, prompt_key
from dpo_jax.errors import UserError
from dpo_jax.intervals import mean_interval
from dpo_jax.models.huggingface.lazy import load_into_memory
from dpo_jax.models.huggingface.safetensors import weights_hash
from dpo_jax.pages.winrate import WinrateRow, render_winrate, winrate_json, winrate_table
from dpo_jax.paths import cache_folder, is_run, read_checked, refuse_links, write_checked, written
from dpo_jax.records import Array
from dpo_jax.rewards.endpoint import EndpointClient
from dpo_jax.rewards.judge import Judge, Match, Verdict, by_asking, by_reward
from dpo_jax.rewards.registry import REWARDS, get_reward
from dpo_jax.rewards.winrate import WinShare, controlled_share, match_outcome, pick_best, tally_wins
from dpo_jax.rewards.words import Reward
from dpo_jax.runs.settings import config_of_path
from dpo_jax.sampling import generate
from dpo_jax.training.load import LoadedModel, compute_dtype
from dpo_jax.training.restore import load_sampled
from dpo_jax.training.run_folder import check_secrets, run_config
from dpo_jax.training.tables import decode_texts, held_out_comparisons, prompt_ids, prompt_texts


class SampledPolicy(NamedTuple):
    """A policy and its tokenized prompts.

    Attributes:
      name: label in the tables.
      key: hash input of everything, beside the sampling options, that its samples depend on.
    """

    name: str
    loaded: LoadedModel
    tokenizer: Any
    prompts: list[list[int]]
    key: str


class WinrateQuestion(NamedTuple):
    """Prompts as texts, and the response to each that policies are compared with."""

    prompts: list[str]
    others: list[str]
    other: str  # where the responses come from, for messages


def winrate_command(argv: list[str]) -> None:
    """`dpo-jax winrate RUN_OR_MODEL ... --judge NAME [--against data|RUN_OR_MODEL] [--temperatures 0 0.5 1]`."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    paths, rest = argv[:first], argv[first:]
    if not paths:
        raise UserError("dpo-jax winrate: give the folders of runs or models, then options such as --judge happy")
    settings = config_of_path(paths[0], rest, WinrateConfig, "dpo-jax winrate RUN_OR_MODEL")
    check_secrets(settings)
    if is_run(paths[0]):
        refuse_links(paths[0])
    if settings.checkpoint and not any(map(is_run, paths)):
        raise UserError("--checkpoint: no run folder is named, and a model folder has no checkpoints; remove it")
    judge, client, best = _judge(settings)
    policies, question = _load_policies(paths, settings)
    rows, judged = [], []
    for row, matches, verdicts in _measure(policies, question, judge, best, settings):
        rows.append(row)
        judged += [_as_json(row, *pair) for pair in zip(matches, verdicts, strict=True)]
        log_line(f"{row.policy} at {row.temperature:g}, best of {row.best_of}: {_percent(row.tally.wins)}")
    lines = _summary(settings, question, client)
    _print(rows, lines)
    log_line(f"page: {_write(_folder(paths[0], settings), settings, rows, judged, lines)}")


def _judge(settings: WinrateConfig) -> tuple[Judge, EndpointClient | None, Reward | None]:
    """Returns the judge, its client if it asks a model, and the reward that picks the best of N."""
    if not settings.judge:
        raise UserError(f"--judge: name a reward ({', '.join(REWARDS)}, ...), or endpoint to ask a model")
    if min(settings.best_of, default=0) < 1 or min(settings.temperatures, default=-1) < 0 or settings.prompts < 1:
        raise UserError("--best-of and --prompts must be at least 1, --temperatures at least 0")
    if max(settings.best_of) > 1 and not settings.best_by:
        raise UserError("--best-of needs --best-by REWARD")
    if max(settings.best_of) > 1 and 0 in settings.temperatures:
        raise UserError("--best-of: all samples at temperature 0 are the same; remove 0 from --temperatures")
    best = get_reward(settings.best_by) if settings.best_by else None
    if settings.judge != "endpoint":
        return by_reward(get_reward(settings.judge)), None, best
    client = EndpointClient(settings.endpoint, cache_folder() / "answers")
    return by_asking(client.ask, settings.question, settings.order, settings.seed), client, best


def _load_policies(paths: Sequence[str], settings: WinrateConfig) -> tuple[list[SampledPolicy], WinrateQuestion]:
    """Returns the policies, and the prompts and responses to compare them on."""
    from_data = settings.against == "data"
    rows = held_out_comparisons(settings.data, int(from_data))
    found: dict[int, Any] = {}
    for row in only_comparisons(rows):
        if len(found) == settings.prompts:
            break
        found.setdefault(prompt_key(row.prompt), row)
    comparisons = list(found.values())
    raw = [c.prompt for c in comparisons]
    names = [Path(path).resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    which = settings.checkpoint
    policies = [_policy(name, path, raw, settings, which) for name, path in zip(names, paths, strict=True)]
    texts = prompt_texts(raw, policies[0].tokenizer, settings.data)
    if from_data:
        return policies, WinrateQuestion(
            texts, [chat.plain_text(c.responses[0]) for c in comparisons], "the data's responses"
        )
    other = _policy(settings.against, settings.against, raw, settings)
    temperature = settings.samples.temperature
    drawn = _sample_texts(other, temperature, 1, settings.seed + 1, settings)  # other random numbers than the policies
    return policies, WinrateQuestion(texts, [c for (c,) in drawn], f"{settings.against} at {temperature:g}")


def _policy(name: str, path: str, prompts: Sequence[Any], settings: WinrateConfig, which: str = "") -> SampledPolicy:
    """Returns the policy of a run, at the checkpoint `which`, or of a model folder.

    A run's prompts are tokenized by the run's config.
    """
    own = run_config(path) if is_run(path) else settings
    model = ModelConfig(tokenizer=own.model.tokenizer, compute=settings.model.compute)
    loaded, tokenizer = load_sampled(path, model, settings.seed, which if is_run(path) else "")
    ids = prompt_ids(prompts, tokenizer, own.data)
    hashed = weights_hash(loaded.params, loaded.model.architecture)
    key = json.dumps([hashed, compute_dtype(model), loaded.end_ids(tokenizer), ids])
    return SampledPolicy(name, loaded, tokenizer, ids, key)


def _sample_texts(
    policy: SampledPolicy, temperature: float, copies: int, seed: int, settings: WinrateConfig
) -> list[list[str]]:
    """Returns `copies` completions of each prompt, from the cache if they are there."""
    names = ("max_new_tokens", "top_k", "top_p")
    options = {name: getattr(settings.samples, name) for name in names}
    options |= {"temperature": temperature, "copies": copies, "seed": seed}
    key = hashlib.blake2b(f"{json.dumps(options)} {policy.key}".encode(), digest_size=16).hexdigest()
    path = cache_folder() / "completions" / f"{key}.json"
    if (content := read_checked(path)) is not None:
        texts = json.loads(content)
    else:
        ends = policy.loaded.end_ids(policy.tokenizer)
        how = options | {"eos_id": ends, "batch_size": settings.batch_size}
        ids = generate(policy.loaded.model, load_into_memory(policy.loaded.params), policy.prompts, **how)
        texts = decode_texts(policy.tokenizer, ids, ends)
        write_checked(path, json.dumps(texts).encode())
    return [texts[i : i + copies] for i in range(0, len(texts), copies)]


def _measure(
    policies: Sequence[SampledPolicy],
    question: WinrateQuestion,
    judge: Judge,
    best: Reward | None,
    settings: WinrateConfig,
) -> Iterator[tuple[WinrateRow, list[Match], list[tuple[Verdict, ...]]]]:
    """Yields the win rate of each policy, temperature and N of best of N, with its matches and verdicts."""
    most = max(settings.best_of)
    for policy in policies:
        for temperature in settings.temperatures:
            drawn = _sample_texts(policy, temperature, most, settings.seed, settings)
            scores = _scores(question.prompts, drawn, best)
            for n in settings.best_of:
                chosen = pick_best(scores, n)
                responses = [texts[i] for texts, i in zip(drawn, chosen, strict=True)]
                matches = [Match(*m) for m in zip(question.prompts, responses, question.others, strict=True)]
                verdicts = judge(matches)
                kept = np.take_along_axis(scores, chosen[:, None], axis=1)[:, 0]
                found = mean_interval(kept)
                reward = (found.mean, found.half) if best else None
                words = float(np.mean([len(text.split()) for text in responses]))
                tally = tally_wins(verdicts), wins_at_equal_length(matches, verdicts)
                yield WinrateRow(policy.name, temperature, n, *tally, reward, words), matches, verdicts


def wins_at_equal_length(matches: Sequence[Match], verdicts: Sequence[Sequence[Verdict]]) -> WinShare:
    """Returns the share of wins between responses with as many words, over the matches with a readable verdict."""
    outcomes = map(match_outcome, verdicts)
    read = [
        (won, len(m.a.split()) - len(m.b.split())) for won, m in zip(outcomes, matches, strict=True) if won is not None
    ]
    return controlled_share([won for won, _ in read], np.array([more for _, more in read]))


def _scores(prompts: list[str], drawn: list[list[str]], best: Reward | None) -> Array:
    """Returns the reward of each completion, float64[prompts, copies]; zeros without a reward."""
    copies = len(drawn[0])
    if best is None:
        return np.zeros((len(prompts), copies))
    found = best([p for p in prompts for _ in range(copies)], [text for texts in drawn for text in texts])
    return found.reshape(len(prompts), copies)


def _as_json(row: WinrateRow, match: Match, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Returns the line of judgements.jsonl for one match."""
    where = {"policy": row.policy, "temperature": row.temperature, "best_of": row.best_of}
    texts = {"prompt": match.prompt, "response": match.a, "other": match.b}
    found = [{"score": v.score, "response_first": v.a_first, "said": v.reason} for v in verdicts]
    return where | texts | {"outcome": match_outcome(verdicts), "verdicts": found}


def _summary(settings: WinrateConfig, question: WinrateQuestion, client: EndpointClient | None) -> list[str]:
    """Returns lines on the prompts, the judge and its cost."""
    words = np.mean([len(text.split()) for text in question.others])
    lines = [f"{len(question.prompts):,} prompts, against {question.other} ({words:.1f} words), judge {settings.judge}"]
    lines.append("at equal length: by a logistic regression of the wins on the difference in words, where that is 0")
    if client:
        cost = f", which cost {client.cost:.4g}" if settings.endpoint.price_in is not None else ""
        lines.append(
            f"{settings.endpoint.model} was asked {client.asked:,} times{cost}; {client.found:,} answers cached"
        )
    return lines


def _percent(share: WinShare) -> str:
    return f"{share.mean:.1%} ({share.low:.1%} .. {share.high:.1%}) of {share.n:,}"


def _print(rows: Sequence[WinrateRow], lines: Sequence[str]) -> None:
    head, *body = winrate_table(rows)
    print_table(head, body, wrap=False)
    for line in lines:
        log_line(line)


def _folder(path: str, settings: WinrateConfig) -> Path:
    name = Path(path).resolve().name
    return Path(settings.out or (Path(path) / "winrate" if is_run(path) else Path("runs") / f"{name}.winrate"))


def _write(
    folder: Path, settings: WinrateConfig, rows: list[WinrateRow], judged: list[dict[str, Any]], lines: list[str]
) -> Path:
    """Writes the config, the table, the judgements and the page; returns the page's path."""
    with written(folder / "config.yaml") as f:
        f.write(dump(settings))
    with written(folder / "judgements.jsonl") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in judged)
    with written(folder / "winrate.json") as f:
        json.dump([winrate_json(row) for row in rows], f, indent=1)
    with written(folder / "winrate.html") as f:
        f.write(render_winrate(rows, lines, judged))
    return folder / "winrate.html"
