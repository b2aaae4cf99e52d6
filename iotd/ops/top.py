"""What `iotd top` shows of a running daemon: its context, queue, speeds, last answers, memory and temperature.

Knows no terminal: it turns two moments of a daemon's status into lines of text.
"""

from datetime import datetime

from iotd.events import Answered, CostStatus, ServerStatus

_BAR = 30
_SPEEDS = {"context_tokens_read": "read", "prompt_tokens": "prefill", "generation_tokens": "decode"}
_SKIPS = {
    "dropped_readings": "no room",
    "coalesced_readings": "newer came",
    "dropped_frames": "frames",
    "lost_events": "defects",
}


def lines(now: ServerStatus, before: ServerStatus | None, time_s: float) -> list[str]:
    """One moment. before: an earlier one, for the speeds. time_s: Unix time."""
    engine = now.engine
    temperature = "" if now.temperature_c is None else f" · {now.temperature_c:.0f} °C"
    memory = f"{now.resident_nbytes / 1e6:.0f} MB resident, {engine.state_nbytes / 1e6:.0f} MB reserved for states"
    return [
        f"iotd {now.version} · {engine.model or 'no model yet'} · {now.state.value} · up {_span(now.uptime_s)}",
        f"memory   {memory}{temperature}",
        f"context  {_bar(engine.context_tokens, engine.context_window)} {_ages(now, time_s)}",
        f"backlog  {engine.backlog} waiting; skipped {_skipped(engine.counters)}",
        f"asks     {engine.queue_depth} open, {engine.sessions} sessions kept; {_ends(engine.counters)}",
        f"speed    {_speeds(now, before)}",
        f"plans    {_plans(engine.costs)}",
        f"broker   {_broker(now)}",
        "answers  " + ("none yet" if not engine.recent else "the last ones, newest first"),
        *(f"  {_answer(answer)}" for answer in reversed(engine.recent)),
    ]


def _bar(tokens: int, window: int) -> str:
    full = round(_BAR * tokens / window) if window else 0
    return f"[{'#' * full}{'.' * (_BAR - full)}] {tokens}/{window} tokens"


def _ages(now: ServerStatus, time_s: float) -> str:
    oldest_s, newest_s = now.engine.oldest_event_s, now.engine.newest_event_s
    swaps = now.engine.counters.get("context_swaps", 0)
    if not oldest_s:
        return "and no events"
    return f"from {_clock(oldest_s)}, newest {_span(max(0.0, time_s - newest_s))} ago; {swaps} swaps"


def _skipped(counters: dict[str, int]) -> str:
    told = [f"{counters[name]} {text}" for name, text in _SKIPS.items() if counters.get(name)]
    return ", ".join(told) or "nothing"


def _ends(counters: dict[str, int]) -> str:
    ends = {name.removeprefix("asks_"): n for name, n in counters.items() if name.startswith("asks_") and n}
    return ", ".join(f"{n} {name}" for name, n in sorted(ends.items())) or "none so far"


def _speeds(now: ServerStatus, before: ServerStatus | None) -> str:
    elapsed_s = now.uptime_s - before.uptime_s if before is not None else 0.0
    if before is None or elapsed_s <= 0:
        return "measuring"
    counts, earlier = now.engine.counters, before.engine.counters
    rates = {text: (counts.get(name, 0) - earlier.get(name, 0)) / elapsed_s for name, text in _SPEEDS.items()}
    return ", ".join(f"{text} {max(0.0, rate):.0f}" for text, rate in rates.items()) + " tokens/s"


def _broker(now: ServerStatus) -> str:
    link = now.link
    if link is None:
        return "none configured"
    state = f"connected (MQTT {link.protocol})" if link.connected else "away"
    return f"{link.broker} {state}; {link.counters.get('messages', 0)} messages, {link.reconnects} reconnects"


def _answer(answer: Answered) -> str:
    times = answer.timings
    if not times.total_s:
        return f"{answer.outcome:<10} of {answer.budget_s:.2f} s"
    first = f", first token after {times.first_token_s:.2f} s" if times.first_token_s else ""
    tokens = f"{answer.usage.generation_tokens} tokens"
    predicted = f", predicted {answer.predicted_s:.2f} s" if answer.predicted_s else ""
    return f"{answer.outcome:<10} {tokens:>11} in {times.total_s:.2f} s of {answer.budget_s:.2f} s{predicted}{first}"


def _plans(costs: CostStatus) -> str:
    if not costs.decode_token_s:
        return "none yet"
    token = f"a token {1e3 * costs.prefill_token_s:.1f} ms to read, {1e3 * costs.decode_token_s:.1f} ms to write"
    if not costs.predictions:
        return token
    return f"{token}; off by {costs.median_error:.0%}, {costs.high_error:.0%} at most of 95 %"


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s).strftime("%d %b %H:%M:%S")


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
