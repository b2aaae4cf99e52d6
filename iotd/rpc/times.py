"""Seconds to google.protobuf.Duration and back."""

from google.protobuf.duration_pb2 import Duration


def duration(seconds: float) -> Duration:
    """seconds: finite. Rounded to the nanosecond."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def seconds(message: Duration) -> float:
    """In seconds, whatever is in the message: a Duration out of its range is no error here."""
    return message.seconds + message.nanos / 1e9
