"""How the figures of `iotd bench budget` are shown: as lines of a terminal, and as figures of a plot."""

from collections.abc import Callable, Iterator

from iotd.demo.bench_budget import Calibration
from iotd.demo.budget_asks import CUT_TOKENS
from iotd.demo.budget_score import Bin, LoadScore, Share, Spread
from iotd.ops.bench import Figure

NOTHING = "-"
AXIS = "budget, ms"
"""Of the plot."""


def opening(found: Calibration) -> Iterator[str]:
    """What the package takes, for the lines above all tables."""
    low_s, high_s = found.budgets_s
    sees = "with" if found.vision else "without"
    yield f"idle: first text after {_time(found.first_s)}, a token each {_time(found.step_s)}; {sees} vision"
    yield f"budgets from {_time(low_s)} to {_time(high_s)}; an ask takes {_time(found.service_s)} on average"


def table(score: LoadScore) -> Iterator[str]:
    """One load: a line for each figure, then one for each range of budgets."""
    yield f"load {score.load:g}: {score.asks} asks, {score.rate_hz:.3g} a second"
    for name, told in _lines(score):
        yield f"  {name:<24}{told}"
    yield ""
    yield f"  {'budget':<18}{'asks':>6}{'refused':>9}{'in time':>9}{'used':>8}{'whole':>8}{'right':>8}{'cut':>8}"
    yield from map(_row, score.bins)


def _lines(score: LoadScore) -> Iterator[tuple[str, str]]:
    yield "accepted", f"{score.accepted}, after {_times(score.accepted_s)}"
    yield "refused", f"{score.refused.n} ({_part(score.refused)}), after {_times(score.refused_s)}"
    yield "  as the daemon says", f"99 of the last 100 within {_time(score.costs.slow_refusal_s)} of their arrival"
    yield "  wrongly", _counted(score.refused_wrongly)
    if score.errors:
        yield "failed", ", ".join(f"{code} {n}" for code, n in score.errors.items())
    yield "in time", _counted(score.in_time)
    for third, share in score.thirds.items():
        yield f"  {third} the hog", _counted(share)
    yield "late", _times(score.late_s)
    yield "late, in steps", _percentiles(score.late_steps)
    yield "used, more to say", _used(score.used)
    yield "  with no other ask", _used(score.used_alone)
    yield "whole sentences", f"{_counted(score.whole_sentences)}; with an ellipsis {_part(score.broken_off)}"
    yield "  of all in words", _counted(score.whole_answers)
    yield "valid in form", _counted(score.valid)
    if score.right.of:
        yield "right and in time", f"{_counted(score.right)}; of accepted {_part(score.right_of_accepted)}"
    if score.right_cut.of:
        yield f"  cut at {CUT_TOKENS} tokens", _counted(score.right_cut)
    off, costs = score.predicted_error, score.costs
    yield "plans off by", _errors(off.p50, off.p95, off.n) if off else NOTHING
    yield "  as the daemon says", _errors(costs.median_error, costs.high_error, costs.predictions)
    yield "sent late", _times(score.lag_s)


def _row(found: Bin) -> str:
    used = f"{found.used.p50:.0%}" if found.used else NOTHING
    shares = found.whole_sentences, found.right, found.right_cut
    budgets = f"{_time(found.low_s)} to {_time(found.high_s)}"
    return (
        f"  {budgets:<18}{found.refused.of:>6}{_whole(found.refused):>9}{_whole(found.in_time):>9}{used:>8}"
        + "".join(f"{_whole(share):>8}" for share in shares)
    )


def _counted(share: Share) -> str:
    if not share.of:
        return NOTHING
    low, high = share.interval
    return f"{_part(share)} ({share.n} of {share.of}; 95 %: {low:.1%} to {high:.1%})"


def _part(share: Share) -> str:
    return f"{share.part:.1%}" if share.of else NOTHING


def _whole(share: Share) -> str:
    return f"{share.part:.0%}" if share.of else NOTHING


def _used(spread: Spread | None) -> str:
    return f"median {spread.p50:.1%}, mean {spread.mean:.1%} ({spread.n})" if spread else NOTHING


def _errors(p50: float, p95: float, n: int) -> str:
    return f"p50 {p50:.1%}, p95 {p95:.1%} ({n})" if n else NOTHING


def _percentiles(spread: Spread | None) -> str:
    return f"p50 {spread.p50:.1f}, p99 {spread.p99:.1f}, most {spread.most:.1f}" if spread else NOTHING


def _times(spread: Spread | None) -> str:
    if not spread:
        return NOTHING
    return f"p50 {_time(spread.p50)}, p99 {_time(spread.p99)}, most {_time(spread.most)}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def figures(score: LoadScore) -> Iterator[Figure]:
    """What is drawn of a load: shares over the budget, with their intervals."""
    lines: dict[str, Callable[[Bin], Share]] = {
        "in time": lambda found: found.in_time,
        "whole sentences": lambda found: found.whole_sentences,
        "right": lambda found: found.right,
        f"right if cut at {CUT_TOKENS}": lambda found: found.right_cut,
    }
    for name, share_of in lines.items():
        for found in score.bins:
            share = share_of(found)
            if share.of:
                low, high = share.interval
                at = round(1e3 * found.middle_s)
                yield Figure(name, "share", share.part, low, high, engine=name, chart=f"load {score.load:g}", at=at)
