"""`iotd top` shows what a daemon's status says, in words."""

from dataclasses import replace

from scripted_engine import STATUS

from iotd.events import Answered, CostStatus, Timings, Usage
from iotd.ops.top import lines

NOW_S = 1_700_000_110.5


def shown(**changes: object) -> dict[str, str]:
    """Each line by its first word."""
    status = replace(STATUS, engine=replace(STATUS.engine, **changes))  # type: ignore[arg-type]
    return {line.split()[0]: line for line in lines(status, STATUS, NOW_S)}


def test_it_tells_the_context_and_its_age() -> None:
    line = shown()["context"]
    assert "[##########....................] 700/2048 tokens" in line
    assert "newest 10 s ago" in line
    assert "no events" in shown(oldest_event_s=0.0)["context"]


def test_speeds_are_what_was_counted_in_between() -> None:
    later = replace(
        STATUS, uptime_s=14.5, engine=replace(STATUS.engine, counters={"context_tokens_read": 176, "prompt_tokens": 8})
    )
    assert "read 88, prefill 4, decode 0 tokens/s" in "\n".join(lines(later, STATUS, NOW_S))
    assert "measuring" in "\n".join(lines(STATUS, None, NOW_S))


def test_it_tells_what_was_skipped_and_how_asks_ended() -> None:
    found = shown(counters={"coalesced_readings": 4, "asks_stop": 2, "asks_rejected": 1})
    assert "skipped 4 newer came" in found["backlog"]
    assert "1 rejected, 2 stop" in found["asks"]


def test_what_plans_are_made_with_is_told_and_how_far_they_were_off() -> None:
    costs = CostStatus(prefill_token_s=0.0102, decode_token_s=0.034, predictions=9, median_error=0.041, high_error=0.13)
    assert shown(costs=costs)["plans"].endswith(
        "a token 10.2 ms to read, 34.0 ms to write; off by 4%, 13% at most of 95 %"
    )
    assert shown(costs=CostStatus())["plans"].endswith("none yet")


def test_the_last_answers_are_there_failed_ones_too() -> None:
    failed = Answered("x", "DEADLINE_EXCEEDED", 0.5, Usage(), Timings())
    text = "\n".join(
        lines(replace(STATUS, engine=replace(STATUS.engine, recent=(*STATUS.engine.recent, failed))), None, 0)
    )
    assert text.index("DEADLINE_EXCEEDED of 0.50 s") < text.index("2 tokens in 2.50 s of 2.00 s")
