"""What makes runs hard to compare, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from steerfm.report.rows import LARGEST_DIMENSION
from steerfm.report.sources import Source, same_tensor


def warnings_about(sources: Sequence[Source]) -> list[str]:
    """Return one sentence for each thing that the reader of a comparison must know before trusting it."""
    found = [warning for source in sources for warning in (*source.samples.warnings, *_about_one(source))]
    for source in sources[1:]:
        found += _about_two(sources[0], source)
    counts = {len(source.rows) for source in sources}
    if len(counts) > 1:
        found.append(
            f"Runs have different numbers of samples ({min(counts)} to {max(counts)}): "
            "Fréchet distances fall as samples grow, so compare them at equal n only."
        )
    return found


def _about_one(source: Source) -> list[str]:
    """Say what is wrong within one run."""
    found = []
    for where in ["reward", *(f"held_out.{name}" for name in source.names("held_out"))]:
        values = source.values(where)
        missing = int(np.isnan(values).sum())
        if missing > 0 and (missing < len(values) or where != "reward"):
            found.append(
                f"'{source.label}': {missing} of {len(values)} values of {where} are missing or not finite; left out."
            )
    twice = sum(count > 1 for count in Counter(source.pairs).values())
    if twice:
        found.append(
            f"'{source.label}' has {twice} (prompt, seed) pairs more than once: left out of paired differences."
        )
    lost = sum(bool(row.get("image")) and source.samples.picture(i) is None for i, row in enumerate(source.rows))
    if lost:
        found.append(
            f"'{source.label}' lacks {lost} of its {len(source.rows)} pictures: copy its folder images/ too. Without "
            "any, pixels beyond [-1, 1] count in its diversity and Fréchet distance."
        )
    if source.x0 is not None and not bool(source.x0.isfinite().all()):
        found.append(f"'{source.label}' has samples that are not finite: no diversity, no Fréchet distance.")
    if source.reference is not None and source.reference[0].numel() > LARGEST_DIMENSION:
        found.append(
            f"'{source.label}': no Fréchet distance, since model space has {source.reference[0].numel()} dimensions "
            f"(more than {LARGEST_DIMENSION})."
        )
    return found


def _about_two(first: Source, other: Source) -> list[str]:
    """Say how a run differs from the first in what should be the same."""
    found, mine, theirs = [], set(first.pairs), set(other.pairs)
    prompts, others = {prompt for prompt, _ in mine}, {prompt for prompt, _ in theirs}
    both = f"'{other.label}' and '{first.label}'"
    if prompts != others:
        found.append(
            f"{both} differ in prompts: {len(prompts & others)} in common, "
            f"{len(others - prompts)} only in the former, {len(prompts - others)} only in the latter."
        )
    elif not (mine <= theirs or theirs <= mine):  # more of the same seeds compare on those in common
        found.append(
            f"{both} differ in seeds: {len(mine & theirs)} (prompt, seed) pairs in common, "
            f"of {len(theirs)} and {len(mine)}."
        )
    here, there = set(other.names("parts")), set(first.names("parts"))
    if here and there and here != there:
        found.append(
            f"{both} have different rewards ({', '.join(sorted(here))}; {', '.join(sorted(there))}): "
            "compare their held-out values only."
        )
    without = [source.label for source in (other, first) if source.reference is None]
    if len(without) == 1:
        found.append(f"'{without[0]}' has no reference data: no Fréchet distance, no share of the data's diversity.")
    elif not same_tensor(other.reference, first.reference):
        found.append(f"{both} have different reference data: their distances do not compare.")
    return found
