"""The card of a model, the plain values that travel with its weights: checked before anything is built from them."""

from __future__ import annotations

from typing import Any

from effad_lib.documents import Takes, fault, is_count, is_number, is_seconds, is_text, is_whole, parse_json
from effad_lib.reading import check_levels, check_size


class CardError(ValueError):
    """A card with a field that is missing or impossible; the message names it, what it holds and what it takes."""


MOST = 3.4028234663852886e38
"""The largest float32: so large a score can be, and twice as much is still a number on the scale of a picture."""


def _is_score(value: Any) -> bool:
    return is_number(value, -MOST, MOST)


def _is_threshold(value: Any) -> bool:
    return value is None or _is_score(value)


def _is_calibration(value: Any) -> bool:
    """{} or the scores of so many normal images, from the lowest, and the rule by which one of them was chosen."""
    if not isinstance(value, dict) or not value:
        return value == {}
    lists = [value.get("scores"), value.get("pixels")]
    count = value.get("normals")
    sound = is_count(count) and all(isinstance(some, list) and len(some) == count for some in lists)
    sound = sound and all(all(map(_is_score, some)) and some == sorted(some) for some in lists)
    sound = sound and is_count(value.get("tile_overlap", 1)) and is_text(value.get("source", ""))
    rule = [value[name] for name in ("rank", "false_alarm_rate", "confidence") if name in value]
    return sound and (not rule or (len(rule) == 3 and all(map(is_number, rule)) and is_whole(rule[0], 1, count)))


def _is_range(value: Any) -> bool:
    """Two numbers above 0, the first not the higher one."""
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value)) and 0 < value[0] <= value[1]


NEEDED: Takes = {
    "size": (is_text, "the name of a network"),
    "channels": (is_count, "a whole number of at least 1"),
    "padding": (lambda value: isinstance(value, bool), "true or false"),
    "image_size": (lambda value: isinstance(value, list), "height and width"),
    "threshold": (_is_threshold, "a number that float32 holds, or null"),
}
"""Fields that every card has, what they take, and how an error says so."""

KNOWN = NEEDED | {
    "pixel_threshold": (_is_threshold, "a number that float32 holds, or null"),
    "calibration": (_is_calibration, "scores and pixels of so many normals, sorted, a rank among them, and its rule"),
    "aspects": (_is_range, "the lowest and the highest width of the training images, in heights"),
    "levels": (lambda value: isinstance(value, list) and all(map(is_number, value)), "two numbers, or none"),
    "data": (is_text, "a name"),
    "seconds": (is_seconds, "seconds"),
    "steps": (is_whole, "a whole number"),
}
"""With those that models have had from some version on."""


def read_card(text: str) -> dict[str, Any]:
    """Return the card of a model from its JSON. Raises `CardError`, `DocumentError` or `ImageError`."""
    card = parse_json(text, "its card")
    if wrong := fault(card, KNOWN, NEEDED):
        raise CardError(f"its card {wrong}")
    check_size(card["image_size"])
    check_levels(card.get("levels", ()))
    return card
